"""`demo`: real photographs through timm's FocalNet, untouched and accelerated: same logits, and the times."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .._machine import cpu_name
from .._version import __version__
from ..bench.timing import interleaved
from ..functional import explain
from ..integrations import accelerate, restore
from ..models import create_model, load_checkpoint
from ..models.key_maps import convert_state_dict, recognise_layout
from .extras import import_extra

VARIANT = "focalnet_tiny_lrf"
ROUNDS, WARM = 5, 1
# colour photographs that scikit-image's wheel carries, so that nothing is downloaded
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
UNTOUCHED, ACCELERATED, OURS, COMPILED = "timm", "timm accelerated", "focalnet_kernels", "timm compiled"
_COLOURS = {UNTOUCHED: "#9a9a9a", ACCELERATED: "#1f77b4", OURS: "#2ca02c", COMPILED: "#ff7f0e"}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider at one thing: median, and the 20th and 80th percentile."""

    what: str
    shape: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float


@click.command()
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A photograph; repeat for more. Default: those that scikit-image brings.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"A {VARIANT} checkpoint (the authors', timm's or Hugging Face's). Default: random, seed 0.",
)
@click.option("--compile", "with_compile", is_flag=True, help="Also time torch.compile of timm's model.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images per forward.")
@click.option("--size", default=224, show_default=True, type=click.IntRange(min=32), help="Pixels per side.")
@click.option(
    "--output",
    default="demo_output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for demo.png and demo.csv.",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
def demo(images, weights, with_compile, batch, size, output, dtype) -> None:
    """Show that accelerated layers give the same logits on photographs, and how much faster they are."""
    timm = import_extra("timm", "the demo")
    figure = import_extra("matplotlib.figure", "the demo")
    console = Console()
    paths = images or _bundled_photographs()
    photographs = _load(timm, paths, batch, size).to(getattr(torch, dtype))
    untouched, ours = _models(timm, weights, getattr(torch, dtype))

    models = {UNTOUCHED: untouched, ACCELERATED: copy.deepcopy(untouched), OURS: ours}
    report = accelerate(models[ACCELERATED])
    console.print(f"{len(report.replaced)} layers accelerated, {len(report.kept)} kept", highlight=False)
    with torch.inference_mode():
        logits = {name: model(photographs) for name, model in models.items()}
        _show_agreement(console, untouched, photographs, logits)
        if weights:
            _show_top5(console, timm, paths[:batch], logits[ACCELERATED])
        if with_compile:
            models[COMPILED] = torch.compile(copy.deepcopy(untouched))
        with Progress(console=console, transient=True) as progress:
            timings, backends = _time_all(models, photographs, progress)
        restore(models[ACCELERATED])
        if not torch.equal(models[ACCELERATED](photographs), logits[UNTOUCHED]):
            raise click.ClickException("restored: logits differ from the untouched model's")
    console.print("restored: logits are the untouched model's, bit for bit")

    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "focalnet_kernels": __version__,
        "dtype": dtype,
        "batch": batch,
        "size": size,
        "backend": " ".join(sorted(set(backends))),
    }
    _show_timings(console, timings, machine)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_csv(output / "demo.csv", timings, machine)
        _plot(figure, output / "demo.png", timings, machine)
    except OSError as error:
        raise click.BadParameter(f"{output}: cannot be written: {error}", param_hint="--output") from error
    console.print(f"wrote {output / 'demo.png'} and {output / 'demo.csv'}", highlight=False, soft_wrap=True)


def _models(timm, weights: Path | None, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """timm's model, and ours with the same weights."""
    torch.manual_seed(0)
    untouched = timm.create_model(VARIANT).eval()
    if weights:
        try:
            load_checkpoint(untouched, weights)
        except ValueError as error:
            raise click.BadParameter(f"expected weights of {VARIANT}. {error}", param_hint="--weights") from error
    ours = create_model(VARIANT).eval()
    state = untouched.state_dict()
    ours.load_state_dict(convert_state_dict(state, recognise_layout(state), "authors"))
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = untouched.stem.norm.eps  # timm's differs from the authors'
    return untouched.to(dtype), ours.to(dtype)


def _bundled_photographs() -> list[Path]:
    folder = Path(import_extra("skimage", "the demo").__file__).parent / "data"
    paths = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]
    if not paths:
        raise click.UsageError(f"{folder}: no photographs in this scikit-image; give some by --image")
    return paths


def _load(timm, paths: Sequence[Path], batch: int, size: int) -> Tensor:
    """The photographs as timm's evaluation transform makes them, repeated in turn to fill the batch."""
    Image = import_extra("PIL.Image", "the demo")
    published = timm.get_pretrained_cfg(VARIANT).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=published) | {"input_size": (3, size, size)}
    transform = timm.data.create_transform(**config, is_training=False)
    loaded = []
    for path in paths[:batch]:
        try:
            with Image.open(path) as image:
                loaded.append(transform(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise click.BadParameter(
                f"{path}: expected an image that Pillow can read: {error}", param_hint="--image"
            ) from error
    return torch.stack([loaded[i % len(loaded)] for i in range(batch)])


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _show_agreement(console, untouched: nn.Module, photographs: Tensor, logits: dict[str, Tensor]) -> None:
    """Two are enough for float64: no model mixes images."""
    exact = copy.deepcopy(untouched).double()(photographs[:2].double())
    table = Table("logits of", "difference to timm's", "error against float64", title="Agreement")
    errors = {name: _relative_error(result[:2], exact) for name, result in logits.items()}
    for name, error in errors.items():
        table.add_row(name, f"{_relative_error(logits[name], logits[UNTOUCHED]):.1e}", f"{error:.1e}")
    console.print(table)
    allowed = 2 * errors[UNTOUCHED] + torch.finfo(photographs.dtype).eps
    for name, error in errors.items():
        if not error <= allowed:
            raise click.ClickException(f"{name}: error {error:.1e} against float64, allowed {allowed:.1e}")


def _show_top5(console, timm, paths: Sequence[Path], logits: Tensor) -> None:
    names = timm.data.ImageNetInfo()
    for path, probabilities in zip(paths, logits.float().softmax(-1), strict=False):
        best = probabilities.topk(5)
        console.print(f"[bold]{path.name}[/bold]")
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            console.print(f"  {probability:6.1%}  {names.index_to_description(index)}", highlight=False)


def _time_all(models: dict[str, nn.Module], photographs: Tensor, progress: Progress) -> tuple[list[Timing], list[str]]:
    """Times of the first modulation layer of each stage and of whole models; the backend of each stage."""
    compiled = COMPILED in models
    things = len(models[UNTOUCHED].layers) + 1
    task = progress.add_task("timing", total=things * len(models) * (ROUNDS + WARM))
    timings, backends = [], []
    for stage, x in enumerate(_stage_inputs(models[UNTOUCHED], photographs)):
        layers = {name: models[name].layers[stage].blocks[0].modulation for name in models if name != COMPILED}
        calls = {name: _call(layer, x) for name, layer in layers.items()}
        calls[OURS] = _call(layers[OURS], x.permute(0, 2, 3, 1).contiguous())
        if compiled:
            calls[COMPILED] = _call(torch.compile(layers[UNTOUCHED]), x)
        arguments, options = layers[ACCELERATED].forward.functional_arguments(x)
        backends.append(explain("focal_modulation", *arguments, **options).backend)
        shape = "x".join(map(str, x.shape))
        timings += _time(calls, f"stage {stage + 1} layer", shape, lambda: progress.advance(task))
    calls = {name: _call(model, photographs) for name, model in models.items()}
    shape = "x".join(map(str, photographs.shape))
    return timings + _time(calls, "whole model", shape, lambda: progress.advance(task)), backends


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x)


def _stage_inputs(model: nn.Module, photographs: Tensor) -> list[Tensor]:
    """What the first modulation layer of each stage is given."""
    seen: list[Tensor] = []
    hooks = [
        stage.blocks[0].modulation.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for stage in model.layers
    ]
    model(photographs)
    for hook in hooks:
        hook.remove()
    return seen


def _time(calls: dict[str, Callable], what: str, shape: str, tick: Callable) -> list[Timing]:
    times = interleaved(calls, ROUNDS, warm=WARM, tick=tick)
    return [Timing(what, shape, name, **found) for name, found in times.items()]


def _medians(timings: list[Timing]) -> dict[str, dict[str, float]]:
    """{what: {provider: milliseconds}}"""
    medians: dict[str, dict[str, float]] = {}
    for timing in timings:
        medians.setdefault(timing.what, {})[timing.provider] = timing.p50_ms
    return medians


def _headline(machine: dict) -> str:
    return (
        f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}, {machine['dtype']}, "
        f"batch {machine['batch']}, {machine['size']} px, backend {machine['backend']}"
    )


def _show_timings(console, timings: list[Timing], machine: dict) -> None:
    medians = _medians(timings)
    providers = list(next(iter(medians.values())))
    table = Table(title=f"Median milliseconds (times faster than timm)\n{_headline(machine)}")
    table.add_column("")
    for provider in providers:
        table.add_column(provider, justify="right")
    for what, row in medians.items():
        cells = [f"{row[p]:.2f} ({row[UNTOUCHED] / row[p]:.2f}x)" for p in providers[1:]]
        table.add_row(what, f"{row[UNTOUCHED]:.2f}", *cells)
    console.print(table)


def _write_csv(path: Path, timings: list[Timing], machine: dict) -> None:
    rows = [asdict(timing) | machine for timing in timings]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _plot(figure_module, path: Path, timings: list[Timing], machine: dict) -> None:
    medians = _medians(timings)
    *layers, whole = medians
    figure = figure_module.Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(len(layers), 1.4))
    for panel, names in zip(panels, (layers, [whole]), strict=True):
        providers = list(medians[whole])
        width = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            positions = [j + (i - (len(providers) - 1) / 2) * width for j in range(len(names))]
            times = [medians[name][provider] for name in names]
            bars = panel.bar(positions, times, width, label=provider, color=_COLOURS[provider])
            panel.bar_label(bars, fmt="{:.1f}", fontsize=7)
        panel.set_xticks(range(len(names)), names)
        panel.set_ylabel("ms (median)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"{VARIANT}: {_headline(machine)}", fontsize=9)
    figure.savefig(path, dpi=150)
