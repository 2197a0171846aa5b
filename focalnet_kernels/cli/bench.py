"""`bench`: the layer at every stage of a published model, and the model, ours beside what people use today."""

from __future__ import annotations

import copy
import csv
import importlib.util
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.testing import assert_close

from .._version import __version__
from ..dispatch import use_backend
from ..functional import explain
from ..integrations import accelerate
from ..models.layers import published_layers
from ..models.variants import VARIANTS, create_model
from ..nn import FocalModulation
from ..testing import FORWARD_FACTOR, assert_accurate
from ..bench.machine import cpu_name
from ..bench.timing import interleaved

MODES = ("forward", "forward+backward")


@click.command()
@click.option("--what", default="layers", show_default=True, type=click.Choice(["layers", "model"]))
@click.option("--variant", default="focalnet_tiny_lrf", show_default=True, type=click.Choice(sorted(VARIANTS)))
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--size", default=224, show_default=True, type=click.IntRange(min=32), help="Pixels per side.")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=3))
@click.option("--compile", "with_compile", is_flag=True, help="Also torch.compile of timm's and transformers' layer.")
@click.option("--output", default="bench.csv", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
def bench(what, variant, batch, size, dtypes, rounds, with_compile, output) -> None:
    """Time the focal modulation layer of every stage, or a whole model: forward, and forward with backward.

    Providers run in turn in one process, so that drift hits all alike; figures are milliseconds. Among the layers,
    "products" are the layer's own matrix products through torch alone: what no rearrangement of the rest can save.
    """
    console = Console()
    cases = _layer_cases if what == "layers" else _model_cases
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=None)
        for dtype in dtypes:
            for shape, mode, calls in cases(variant, batch, size, getattr(torch, dtype), with_compile):
                for name, times in interleaved(calls, rounds).items():
                    rows.append({"dtype": dtype, "shape": shape, "mode": mode, "provider": name} | times)
                progress.update(task, description=f"{dtype} {shape} {mode}")
    machine = {
        "variant": variant,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "focalnet_kernels": __version__,
        "backend": explain(FocalModulation(8, 3, 1), torch.zeros(1, 4, 4, 8)).backend,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    for mode in MODES:
        console.print(_table([row for row in rows if row["mode"] == mode], f"{mode}, milliseconds (times ours)"))
    console.print(f"wrote {output}", highlight=False, soft_wrap=True)


def _layer_cases(variant, batch, size, dtype, with_compile):
    """(shape, mode, {provider: call}) for every stage."""
    for layer in published_layers(variant, size):
        providers, x = _providers(layer.dim, layer.size, layer.options, batch, dtype, with_compile)
        for mode in MODES:
            yield "x".join(map(str, x.shape)), mode, {name: _call(run, x, mode) for name, run in providers.items()}


def _model_cases(variant, batch, size, dtype, with_compile):
    """The same for a whole model: timm's, timm's accelerated ("ours"), and this package's own."""
    timm = importlib.import_module("timm")
    x, target = torch.randn(batch, 3, size, size, dtype=dtype), torch.randint(1000, (batch,))
    torch.manual_seed(0)
    models = {"ours": timm.create_model(variant).to(dtype)}
    models["timm"] = copy.deepcopy(models["ours"])
    models["FocalNet"] = create_model(variant).to(dtype)
    accelerate(models["ours"])
    if with_compile:
        models["timm compiled"] = torch.compile(copy.deepcopy(models["timm"]))
    with torch.inference_mode():
        for model in models.values():
            model.eval()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert_close(models["ours"](x[:1]), models["timm"](x[:1]), rtol=tolerance, atol=tolerance)

    def infer(model):
        with torch.inference_mode():
            model(x)

    def step(model):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()

    for mode, run in zip(MODES, (infer, step), strict=True):
        for model in models.values():
            model.train(run is step)
        yield "x".join(map(str, x.shape)), mode, {name: partial(run, model) for name, model in models.items()}


def _providers(C, H, config, batch, dtype, with_compile) -> tuple[dict[str, Callable], Tensor]:
    """Each provider's layer with the same weights, checked against the first; and the input (B, H, W, C)."""
    torch.manual_seed(0)
    ours = FocalModulation(C, **config).to(dtype)
    x = torch.randn(batch, H, H, C, dtype=dtype)
    layers: dict[str, Callable] = {"ours": ours}
    reference = copy.deepcopy(ours)
    layers["authors' form"] = _on_reference(reference)
    if importlib.util.find_spec("timm"):
        layers["timm"] = _timm_layer(ours, config, dtype)
    if importlib.util.find_spec("transformers"):
        layers["transformers"] = _transformers_layer(ours, config, dtype)
    if with_compile:
        for name in [n for n in ("timm", "transformers") if n in layers]:
            layers[f"{name} compiled"] = torch.compile(layers[name])
    with torch.no_grad():
        exact = _on_reference(copy.deepcopy(ours).double())(x.double())
        eager = layers["authors' form"](x)
        for name, layer in layers.items():
            y = layer(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1) if name.startswith("timm") else layer(x)
            if name == "ours":
                assert_accurate(name, y, eager, exact, FORWARD_FACTOR)
            error = ((y.double() - exact).norm() / exact.norm()).item()
            if not error <= max(1e-5, 8 * torch.finfo(dtype).eps):  # others only have to be the same function
                raise click.ClickException(f"{name}: relative error {error:.1e} against float64; no figure for it")
    return layers | {"products": None}, x


def _on_reference(layer: nn.Module) -> Callable:
    def run(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return layer(x)

    return run


def _timm_layer(ours: FocalModulation, config, dtype) -> nn.Module:
    from timm.models.focalnet import FocalModulation as Timm

    options = dict(config)
    options["use_post_norm"] = options.pop("use_postln_in_modulation")
    layer = Timm(ours.dim, **options)
    state = {k.replace("ln.", "norm."): v for k, v in ours.state_dict().items()}
    shapes = layer.state_dict()
    layer.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in state.items()})
    if ours.use_postln_in_modulation:
        layer.norm.eps = ours.ln.eps
    return layer.to(dtype)


def _transformers_layer(ours: FocalModulation, config, dtype) -> nn.Module:
    from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

    names = {"f": "projection_in", "h": "projection_context", "proj": "projection_out", "ln": "layernorm"}
    settings = SimpleNamespace(
        focal_windows=[config["focal_window"]],
        focal_levels=[config["focal_level"]],
        use_post_layernorm_in_modulation=config["use_postln_in_modulation"],
        normalize_modulator=config["normalize_modulator"],
        layer_norm_eps=1e-5,
    )
    layer = FocalNetModulation(settings, 0, ours.dim)
    state = {}
    for key, value in ours.state_dict().items():
        first, _, rest = key.partition(".")
        state[f"{names.get(first, first)}.{rest}"] = value
    layer.load_state_dict(state)
    return layer.to(dtype)


def _call(layer: Callable | None, x: Tensor, mode: str) -> Callable:
    if layer is None:
        return _products(x, mode)
    if getattr(layer, "input_split", None) or hasattr(getattr(layer, "_orig_mod", None), "input_split"):
        x = x.permute(0, 3, 1, 2).contiguous()  # timm's layout
    grad_output = torch.randn_like(x)

    def forward():
        with torch.inference_mode():
            layer(x)

    def both():
        layer(x.detach().requires_grad_()).backward(grad_output)

    return forward if mode == "forward" else both


def _products(x: Tensor, mode: str) -> Callable:
    """The matrix products of f, h and proj (and of their backward), each into fresh memory."""
    C = x.shape[-1]
    tokens, wide = x.reshape(-1, C), torch.randn(x.numel() // C, 2 * C + 4, dtype=x.dtype)
    f, square = torch.randn(2 * C + 4, C, dtype=x.dtype), torch.randn(C, C, dtype=x.dtype)

    def run():
        tokens @ f.t(), tokens @ square.t(), tokens @ square.t()
        if mode != "forward":
            wide @ f, wide.t() @ tokens
            tokens @ square, tokens.t() @ tokens, tokens @ square, tokens.t() @ tokens

    return run


def _table(rows: list[dict], title: str) -> Table:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    table = Table("", *providers, title=title)
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        cells.setdefault(f"{row['dtype']} {row['shape']}", {})[row["provider"]] = row["p50_ms"]
    for what, times in cells.items():
        table.add_row(what, *(f"{times[p]:.2f} ({times[p] / times['ours']:.2f}x)" for p in providers))
    return table
