"""The implementations under comparison: the authors' form, timm, transformers, their compiled forms, our backends.

Every provider of a case computes the same function of the same numbers, drawn once in the case's dtype, and is held
to its baseline: the eager form of that function.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .. import dispatch
from ..functional import explain, focal_context, focal_modulation, modulate
from ..integrations import accelerate
from ..models.key_maps import convert_state_dict, rename_key
from ..models.variants import VARIANTS, create_model
from ..nn import FocalModulation, FocalModulation3d
from ..nn.block import FocalNetBlock
from ..ops import keep_packed
from ..testing import make_context_inputs, make_modulate_inputs
from . import engines
from .cases import PEERS, Case
from .layers import published_layers

AUTHORS = "authors' form"
BACKENDS = dispatch.BACKENDS[2:]  # without "auto" and the reference, which is the authors' form
COMPILE_MODES = ("default", "max-autotune")


@dataclass
class Subject:
    """One provider's computation of a case, its tensors in place.

    Args:
        call: takes `inputs`, returns the result.
        inputs: by name.
        module: whose parameters get gradients besides.
        channels_first: x and y are (B, C, H, W), where the case has (B, H, W, C).
        images: x is data, which gets no gradient.
        authors_name: of a parameter, by its name in `module`.
        infers_alone: there is no backward.
    """

    call: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    module: nn.Module | None = None
    channels_first: bool = False
    images: bool = False
    authors_name: Callable[[str], str] = str
    infers_alone: bool = False

    def __call__(self) -> Tensor:
        return self.call(*self.inputs.values())

    def leaves(self) -> dict[str, Tensor]:
        """What gets gradients, by name: the inputs, unless they are images, and the parameters."""
        parameters = {} if self.module is None else dict(self.module.named_parameters())
        return parameters if self.images else self.inputs | parameters

    def forget_gradients(self) -> None:
        for leaf in self.leaves().values():
            leaf.grad = None

    def canonical(self, value: Tensor) -> Tensor:
        """The result, or a gradient of x, in the case's axes."""
        return value.movedim(1, -1) if self.channels_first else value


@dataclass(frozen=True)
class Provider:
    """Who computes a case.

    Args:
        name: as in tables.
        build: takes the case and whether to compute exactly, on the numbers of the case's dtype all the same.
        baseline: the name of the eager provider of the same function; its own for that one.
        backend: of ours that it runs on; None for everything else.
        compiled: the mode of torch.compile, or None.
        needs: packages.
        engine: of engines.py.
    """

    name: str
    build: Callable[[Case, bool], Subject]
    baseline: str = AUTHORS
    backend: str | None = None
    compiled: str | None = None
    needs: tuple[str, ...] = ()
    engine: str | None = None

    def why_not(self, case: Case) -> str | None:
        """Why this machine cannot run it on this case, as far as that can be said without trying; or None."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if "timm" in self.needs and case.target.endswith("_iso") and case.level == "model":
            return f"timm has no {case.target}"
        if self.needs and case.layer is not None and case.layer.frames is not None:
            return f"{self.needs[0]} has no layer of volumes"
        if self.compiled == "max-autotune" and case.device == "cpu" and case.dtype == torch.float16:
            return "torch.compile has no float16 products to tune on a CPU"
        if self.engine is not None and (reason := engines.why_not(self.engine, case)) is not None:
            return reason
        return None if self.backend is None else _reason_against(self.backend, case)


def providers(case: Case, compile_modes: Sequence[str] = ()) -> list[Provider]:
    """All that compute this case, whether or not this machine can.

    Args:
        compile_modes: of torch.compile, for a compiled form of each eager provider and of our best model.
    """
    if case.level == "peers":
        return _peers(case, compile_modes)
    eager = [Provider(AUTHORS, partial(_on, "reference", _ours[case.level]))]
    if case.level == "op":
        last = partial(_op, layout="channels_last")
        eager.append(Provider(f"{AUTHORS} channels_last", partial(_on, "reference", last)))
        ours = [Provider(f"ours {b} channels_last", partial(_on, b, last), backend=b) for b in BACKENDS]
    else:
        eager += [
            Provider("timm", _timm, needs=("timm",)),
            Provider("timm channels_last", partial(_channels_last, _timm), needs=("timm",)),
            Provider("transformers", _transformers, needs=("transformers",)),
        ]
        ours = [
            Provider(f"timm accelerated {b}", partial(_accelerated, b, _timm), backend=b, needs=("timm",))
            for b in BACKENDS
            if case.level != "layer"
        ]
        if case.level == "model":
            ours += [
                *[
                    replace(p, name=f"timm keep_hidden {p.backend}", build=partial(p.build, keep_hidden=True))
                    for p in ours
                ],
                *[
                    Provider(
                        f"transformers accelerated {b}",
                        partial(_accelerated, b, _transformers),
                        backend=b,
                        needs=("transformers",),
                    )  # fmt: skip
                    for b in BACKENDS
                ],
                Provider("timm packed cpu", _packed, backend="cpu", needs=("timm",)),
                Provider("timm frozen", partial(_engine, "frozen"), needs=("timm",), engine="frozen"),
                Provider(
                    "timm accelerated cpu frozen",
                    partial(_engine, "frozen", accelerated="cpu"),
                    backend="cpu",
                    needs=("timm",),
                    engine="frozen",
                ),  # fmt: skip
                *[
                    Provider(shown, partial(_engine, name), needs=("timm", "onnxscript", name), engine=name)
                    for shown, name in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino"))
                ],
            ]
    plain = [p for p in eager + ours if "channels_last" not in p.name and p.engine is None]
    compiled = [_compiled(p, mode) for p in plain for mode in compile_modes]
    ours += [Provider(f"ours {b}", partial(_on, b, _ours[case.level]), backend=b) for b in BACKENDS]
    return eager + compiled + ours


def _compiled(provider: Provider, mode: str) -> Provider:
    name = f"{provider.name} compiled" + ("" if mode == "default" else f" {mode}")
    return replace(provider, name=name, build=partial(_compile, mode, provider.build), compiled=mode)


def _reason_against(backend: str, case: Case) -> str | None:
    """dispatch's own reason, for tensors of the case's shapes that take no memory."""

    def empty(*shape):
        return torch.empty(1, dtype=case.dtype, device=case.device).expand(shape)

    if case.device.startswith("cuda") and not torch.cuda.is_available():
        return "there is no GPU"
    if case.layer is None:
        layers = published_layers(case.target, case.image)
    else:
        layers = [case.layer]
    for layer in layers:
        C, spatial, p = layer.dim, layer.spatial, layer.parameters(empty)
        maps, gates = empty(case.batch, C, *spatial), empty(case.batch, layer.focal_level + 1, *spatial)
        x = empty(case.batch, *spatial, C)
        layer_arguments = (x, p.f_weight, p.f_bias, p.focal_weights, p.h_weight, p.h_bias, p.proj_weight, p.proj_bias)
        op, arguments, options = {
            "focal_context": (focal_context, (maps, gates, p.focal_weights), {}),
            "modulate": (modulate, (maps, maps, p.h_weight, p.h_bias), {}),
        }.get(case.what, (focal_modulation, layer_arguments, {"ln_weight": p.ln_weight, "ln_bias": p.ln_bias}))
        found = explain(op, *arguments, **options, backend=backend)
        if found.backend != backend:
            return found.reasons[backend]
    return None


# ---------------------------------------------------------------------------------------------- ways to run a subject


def _on(backend: str, build: Callable, case: Case, exact: bool) -> Subject:
    subject = build(case, exact)
    call = subject.call

    def on_backend(*inputs):
        with dispatch.use_backend(backend):
            return call(*inputs)

    return replace(subject, call=on_backend)


def _compile(mode: str, build: Callable, case: Case, exact: bool) -> Subject:
    """Compiled for this case's shape: one graph for all stages would be slower than any of them needs."""
    subject = build(case, exact)
    return replace(subject, call=torch.compile(subject.call, mode=mode, dynamic=False))


def _channels_last(build: Callable, case: Case, exact: bool) -> Subject:
    subject = build(case, exact)
    subject.module.to(memory_format=torch.channels_last)
    inputs = {n: t.contiguous(memory_format=torch.channels_last) for n, t in subject.inputs.items()}
    return replace(subject, inputs=inputs)


def _accelerated(backend: str, build: Callable, case: Case, exact: bool, keep_hidden: bool = False) -> Subject:
    subject = build(case, exact)
    report = accelerate(subject.module, backend=backend, keep_hidden=keep_hidden)
    if not report.replaced:
        raise RuntimeError(f"accelerate left everything as it was: {report}")
    return subject


def _packed(case: Case, exact: bool) -> Subject:
    """Accelerated, its weights kept packed: in inference alone."""
    subject = _accelerated("cpu", _timm, case, exact)
    keep_packed(subject.module)
    return replace(subject, infers_alone=True)


# ------------------------------------------------------------------------------------------------- the functions


def _input(case: Case, exact: bool) -> Tensor:
    """x of `case.shape`, the same for every provider."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(case.device, case.dtype)
    return x.to(_exact_dtype(case)) if exact else x


def _placed(case: Case, module: nn.Module, exact: bool) -> nn.Module:
    module = module.to(case.device, case.dtype)
    return module.to(_exact_dtype(case)) if exact else module


def _exact_dtype(case: Case) -> torch.dtype:
    """float32 is exact enough for 16 bits, and takes a tenth of float64's time in a depthwise convolution on a CPU."""
    return torch.float32 if case.dtype.itemsize == 2 else torch.float64


def randomize_weights(module: nn.Module) -> nn.Module:
    """Weights under which every part shows in the result: a layer scale of 1e-4 would hide the layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln.weight", "gamma_1", "gamma_2")):
                p.fill_(1.0)
            else:
                p.normal_(std=0.1, generator=generator)
    return module


def _op(case: Case, exact: bool, layout: str = "contiguous") -> Subject:
    """focal_context or modulate by itself."""
    options = {"dtype": case.dtype, "device": case.device, "seed": 0}
    if case.what == "focal_context":
        drawn = make_context_inputs(case.shape, case.layer.kernels, **options)
        inputs = {"ctx": drawn["ctx"], "gates": drawn["gates"]}
        inputs |= {f"weights[{i}]": w for i, w in enumerate(drawn["weights"])}
        normalize = case.layer.normalize_modulator

        def call(ctx, gates, *weights):
            return focal_context(ctx, gates, weights, normalize=normalize)
    else:
        inputs, call = make_modulate_inputs(case.shape, **options), modulate
    if layout == "channels_last":
        inputs = {n: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 2 else t for n, t in inputs.items()}
    if exact:
        inputs = {name: t.double() for name, t in inputs.items()}
    return Subject(call, inputs)


def _layer_module(case: Case) -> nn.Module:
    layer = case.layer
    Layer = FocalModulation if layer.frames is None else FocalModulation3d
    return randomize_weights(Layer(layer.dim, **layer.options))


def _block_options(case: Case) -> dict:
    config = VARIANTS.get(case.target, {})
    return {name: config.get(name, False) for name in ("use_layerscale", "use_postln")}


def _block_module(case: Case) -> nn.Module:
    return randomize_weights(FocalNetBlock(case.layer.dim, **case.layer.options, **_block_options(case)))


def _model_module(case: Case) -> nn.Module:
    return randomize_weights(create_model(case.target, drop_path_rate=0.0))


_module = {"layer": _layer_module, "block": _block_module, "model": _model_module}


def _our(case: Case, exact: bool) -> Subject:
    module = _placed(case, _module[case.level](case), exact)
    return Subject(module, {"x": _input(case, exact)}, module, images=case.level == "model")


_ours = {"op": _op, "layer": _our, "block": _our, "model": _our}
_PREFIX = {"layer": "layers.0.blocks.0.modulation.", "block": "layers.0.blocks.0.", "model": ""}  # in a whole model


def _foreign(
    case: Case, exact: bool, module: nn.Module, layout: str, prefix: str, x: Tensor, call: Callable, **options
) -> Subject:
    """Their module with our weights; `prefix`: where it stands in a whole model of theirs."""
    our_prefix = _PREFIX[case.level]
    ours = {our_prefix + name: value for name, value in _module[case.level](case).state_dict().items()}
    state = convert_state_dict(ours, "authors", layout)
    shapes = module.state_dict()
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    module.load_state_dict({name: value.reshape(shapes[name].shape) for name, value in state.items()})
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5  # the authors'; timm's varies

    def authors_name(name):
        return rename_key(prefix + name, layout, "authors").removeprefix(our_prefix)

    images = case.level == "model"
    return Subject(call, {"x": x}, _placed(case, module, exact), images=images, authors_name=authors_name, **options)


def _timm_module(case: Case) -> nn.Module:
    focalnet = importlib.import_module("timm.models.focalnet")
    if case.level == "model":
        config = VARIANTS[case.target]
        return importlib.import_module("timm").create_model(
            case.target, num_classes=config["num_classes"], drop_path_rate=0.0,
            normalize_modulator=config.get("normalize_modulator", False),
        )  # fmt: skip
    options = dict(case.layer.options)
    postln = options.pop("use_postln_in_modulation")
    if case.level == "layer":
        return focalnet.FocalModulation(case.layer.dim, **options, use_post_norm=postln)
    block = _block_options(case)
    return focalnet.FocalNetBlock(
        case.layer.dim, **options, use_post_norm_in_modulation=postln, use_post_norm=block["use_postln"],
        layerscale_value=1e-4 if block["use_layerscale"] else None,
    )  # fmt: skip


def _timm(case: Case, exact: bool) -> Subject:
    layout = "timm_postln" if VARIANTS.get(case.target, {}).get("use_postln", False) else "timm"
    module, x, maps = _timm_module(case), _input(case, exact), case.level != "model"
    x = x.movedim(-1, 1).contiguous() if maps else x
    return _foreign(case, exact, module, layout, _PREFIX[case.level], x, module, channels_first=maps)


def _engine(name: str, case: Case, exact: bool, accelerated: str | None = None) -> Subject:
    subject = _timm(case, exact) if accelerated is None else _accelerated(accelerated, _timm, case, exact)
    x, module = subject.inputs["x"], subject.module
    call = engines.frozen(module) if name == "frozen" else getattr(engines, name)(case, module, x)
    return Subject(call, {"x": x}, images=True, infers_alone=True)


def _transformers_config(case: Case):
    config = VARIANTS.get(case.target, {})
    layer = case.layer
    options = {
        "focal_levels": list(config["focal_levels"]) if layer is None else [layer.focal_level],
        "focal_windows": list(config["focal_windows"]) if layer is None else [layer.focal_window],
        "use_post_layernorm_in_modulation": config.get("use_postln_in_modulation", False),
        "use_post_layernorm": config.get("use_postln", False),
        "use_layerscale": config.get("use_layerscale", False),
        "normalize_modulator": config.get("normalize_modulator", False),
        "drop_path_rate": 0.0,
    }
    if layer is None:
        options |= {
            "image_size": list(case.image),
            "patch_size": config.get("patch_size", 4),
            "embed_dim": config["embed_dim"],
            "depths": list(config["depths"]),
            "use_conv_embed": config.get("use_conv_embed", False),
            "num_labels": config["num_classes"],
        }
    return importlib.import_module("transformers").FocalNetConfig(**options)


def _transformers(case: Case, exact: bool) -> Subject:
    focalnet = importlib.import_module("transformers.models.focalnet.modeling_focalnet")
    config, prefix = _transformers_config(case), "focalnet.encoder.stages.0.layers.0."
    if case.level == "model":
        module, prefix = focalnet.FocalNetForImageClassification(config), ""

        def call(x):
            return module(x).logits
    elif case.level == "layer":
        module = call = focalnet.FocalNetModulation(config, 0, case.layer.dim)
        prefix += "modulation."
    else:
        spatial = case.layer.spatial
        module = focalnet.FocalNetLayer(config, 0, case.layer.dim, spatial)

        def call(x):
            return module(x.flatten(1, 2), spatial).unflatten(1, spatial)

    return _foreign(case, exact, module, "huggingface", prefix, _input(case, exact), call)


# --------------------------------------------------------------------------------------------------------- peers


def _peers(case: Case, compile_modes: Sequence[str]) -> list[Provider]:
    """The FocalNet through timm, accelerated, and Swin and ConvNeXt of its size."""
    names = (case.target, *PEERS[case.target])
    eager = [Provider(name, partial(_timm_peer, name), name, needs=("timm",)) for name in names]
    own = eager[0]
    ours = [
        replace(own, name=f"{own.name} accelerated {b}", build=partial(_accelerated, b, own.build), backend=b)
        for b in BACKENDS
    ]
    return eager + ours + [_compiled(p, mode) for p in eager + ours for mode in compile_modes]


def _timm_peer(name: str, case: Case, exact: bool) -> Subject:
    torch.manual_seed(0)
    options = {"img_size": case.image} if "swin" in name else {}  # its windows need to know
    model = importlib.import_module("timm").create_model(name, drop_path_rate=0.0, **options)
    return Subject(model, {"x": _input(case, exact)}, _placed(case, model, exact), images=True)
