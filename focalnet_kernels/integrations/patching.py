"""`accelerate` and `restore`: bind the forward of live layers to our ops, and take it back."""

from __future__ import annotations

import inspect
import re
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from .._parts import why_call_any
from .._warnings import warn_once
from ..forms import SimilarityFocalModulation
from ..nn.focal_modulation import FocalModulationNd
from .adapter import Adapter, BoundForward
from .blocks import BLOCKS
from .embeddings import EMBEDDINGS, EmbeddingAdapter
from .equivalence import AnyAdapter, Verdict, compare, configuration
from .focalcodec import FocalCodec
from .official import OfficialClassification, OfficialDetection
from .query_context import QueryContext
from .spatio_temporal import SpatioTemporal
from .timm import Timm
from .transformers import Transformers
from .volume import Volume
from .yolo import Yolo

ADAPTERS: tuple[Adapter, ...] = (
    OfficialClassification(),
    OfficialDetection(),
    Timm(),
    Transformers(),
    Volume(),
    Yolo(),
    SpatioTemporal(),
    QueryContext(),
    FocalCodec(),
)

OURS = (FocalModulationNd, SimilarityFocalModulation)  # cross modulation is the former's
_NAMED_SO = re.compile(r"Focal(Net)?Modulat(e|ion|or)(\d[dD])?$")
_ALREADY_OURS = "already ours"


@dataclass
class Report:
    """What `accelerate` did.

    Args:
        replaced: (qualified name, form) of each layer that now runs through our ops.
        kept: (qualified name, reason) of each layer that was left as it is.
        blocks: (qualified name, form) of each block that runs through them as a whole.
        kept_blocks: (qualified name, reason) of each block of which the layer alone does.
        embeddings: (qualified name, form) of each patch embedding that runs through them. Others are not mentioned, as
            any convolution with a norm looks like one.
        notes: what an accelerated layer does otherwise than the class it belongs to.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[tuple[str, str]] = field(default_factory=list)
    kept_blocks: list[tuple[str, str]] = field(default_factory=list)
    embeddings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} focal modulation layers accelerated, {len(self.kept)} kept"]
        lines += [f"  accelerated {name or '(the model itself)'}: {form}" for name, form in self.replaced]
        lines += [f"  kept {name or '(the model itself)'}: {reason}" for name, reason in self.kept]
        if self.blocks or self.kept_blocks:
            lines += [f"{len(self.blocks)} blocks accelerated as a whole, {len(self.kept_blocks)} in their layer alone"]
        lines += [f"  accelerated {name or '(the model itself)'}: {form}" for name, form in self.blocks]
        lines += [f"  its layer alone, {name or '(the model itself)'}: {why}" for name, why in self.kept_blocks]
        if self.embeddings:
            lines.append(f"{len(self.embeddings)} patch embeddings accelerated")
        lines += [f"  accelerated {name or '(the model itself)'}: {form}" for name, form in self.embeddings]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class AcceleratedForward(BoundForward):
    """The bound `forward` of one accelerated layer, block or patch embedding.

    A callable object and no bound function: it is copied and pickled together with its module, and the copy then
    reads the copy's parameters. It holds the module weakly, so that a model is freed with its last name.
    """

    def __init__(self, module: nn.Module, adapter: AnyAdapter, backend: str | None, stores: tuple[str, ...]):
        self.adapter = adapter
        self.backend = backend
        self.stores = stores
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        # what was compared with ours, class by class: another forward may take its place
        self.original: dict[type[nn.Module], Callable] = {type(module): type(module).forward}
        self.norms: dict[type[nn.Module], Callable] = adapter.norms(module)
        self._module: weakref.ref[nn.Module] | None = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The layer."""
        module = None if self._module is None else self._module()
        if module is None:
            raise RuntimeError("accelerate: this forward has outlived its layer, or was copied or pickled without it")
        return module

    def __call__(self, *args, **kwargs) -> Any:
        module = self.module
        # not ours: an FX proxy, say, or a call for the class to refuse in its own words
        positional = self._positional(args, kwargs)
        inputs = None if positional is None else self.adapter.inputs(module, positional)
        parts = None if inputs is None else self._plain_parts(module)
        if parts is None or inputs is None or not self.adapter.may_run(parts, inputs[0]):
            return type(module).forward(module, *args, **kwargs)
        return self.adapter.forward(module, parts, *inputs, stores=self.stores, backend=self.backend)

    def _positional(self, args: tuple, kwargs: dict) -> tuple | None:
        """The arguments in the order of the class's forward; None where that leaves some over."""
        if kwargs:
            named = [name for name in self.names[len(args) :] if name in kwargs]
            if named != list(self.names[len(args) :][: len(named)]) or len(named) != len(kwargs):
                return None
            args = (*args, *[kwargs[name] for name in named])
        return args

    def _plain_parts(self, module: nn.Module) -> Any:
        """Its inner modules; None where the class's forward must run."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return None  # what leaves this process must not need our ops
        parts = self.adapter.parts(module)
        reason = why_call_any(module, parts, partial(self.adapter.bypassed, norms=self.norms))
        if reason is None and not self._knows(type(module)):
            reason = f"{type(module).__name__}.forward was replaced"
        if reason is None:
            return parts
        kind = " layer" if isinstance(self.adapter, Adapter) else ""
        warn_once(f"a {self.adapter.form}{kind} changed after accelerate() and runs its own forward: {reason}")
        return None

    def _knows(self, cls: type[nn.Module]) -> bool:
        """Whether modules of this class do what was compared: FSDP, say, makes a class of its own of a module's."""
        if cls in self.original:
            return cls.forward is self.original[cls]
        for known, forward in self.original.items():
            if issubclass(cls, known) and cls.forward is forward:
                added = {name for c in cls.__mro__[: cls.__mro__.index(known)] for name in vars(c)}
                return not any(name in added and not name.startswith("__") for name in vars(known))
        return False

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's: exporters name inputs by it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> types.CodeType:
        """The class's: torch.export tells by it where a model's code stands."""
        return type(self.module).forward.__code__

    def functional_arguments(self, x: Tensor) -> tuple[tuple, dict]:
        """What the layer hands to `functional.focal_modulation` for this input."""
        adapter: Any = self.adapter
        return adapter.functional_arguments(self.module, adapter.parts(self.module), x)

    def bind(self) -> None:
        """Make it the module's forward. Plain attributes, so neither parameters nor state_dict see them."""
        # torch.jit.script compiles source code and cannot take a callable object: it gets the class's forward
        vars(self.module).update(zip(_BOUND, (self, self.unbind, self.reduce_module), strict=True))

    def unbind(self) -> nn.Module:
        """Give the module its class's forward back, unless somebody wrapped this one."""
        module = self.module
        if vars(module).get("forward", self) is self:
            for name in _BOUND:
                vars(module).pop(name, None)
        return module

    def reduce_module(self, protocol: int) -> tuple:
        """The module's `__reduce_ex__`: its copies, shallow ones too, get a forward of their own."""
        module = self.module
        reduced: Any = type(module).__reduce_ex__(module, protocol)
        if vars(module).get("forward") is not self or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        make, args, state, *rest = reduced
        twin = AcceleratedForward.__new__(AcceleratedForward)
        twin.__setstate__(self.__getstate__() | {"_module": None})
        state = {name: value for name, value in state.items() if name not in _BOUND}
        return _make_accelerated, (twin, make, args), state, *rest

    def __getstate__(self) -> dict:
        """With the module itself, which is copied or pickled along; and no functions, which may not pickle."""
        return vars(self) | {
            "_module": None if self._module is None else self._module(),
            "original": {cls: cls.forward is forward for cls, forward in self.original.items()},
            "norms": {cls: cls.forward is forward for cls, forward in self.norms.items()},
        }

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for name in ("original", "norms"):  # a class that had been patched stays unknown
            setattr(self, name, {cls: cls.forward for cls, same in state[name].items() if same})
        self._module = None if state["_module"] is None else weakref.ref(state["_module"])


_BOUND = ("forward", "__prepare_scriptable__", "__reduce_ex__")


def _make_accelerated(forward: AcceleratedForward, make: Callable, args: tuple) -> nn.Module:
    """A copy of an accelerated layer, still without its state, with `forward` bound to it."""
    module = make(*args)
    forward._module = weakref.ref(module)
    forward.bind()
    return module


def _bound_to(module: nn.Module) -> AcceleratedForward | None:
    """The module's accelerated forward, be it wrapped by somebody."""
    owner = getattr(vars(module).get("__reduce_ex__"), "__self__", None)
    return owner if isinstance(owner, AcceleratedForward) else None


LEVELS = ("block", "layer")


def accelerate(
    model: nn.Module,
    backend: str | None = None,
    *,
    keep_modulator: bool = False,
    level: str = "block",
    keep_hidden: bool = False,
) -> Report:
    """Make the focal modulation layers inside a live model, the blocks around them, and the patch embeddings before
    them, run through our ops.

    Known are the authors' classes (classification; detection and segmentation), timm's, Hugging Face
    transformers', 3-D volumes, the channels-first form of YOLO forks, Video-FocalNets' spatio-temporal layer,
    FocalCodec's of sequences, and layers whose query and context are two inputs. Each instance gets its own bound
    `forward`; parameters, state_dict, the layer's hooks and dropout stay as they are, and `type(layer).forward`
    remains the original. A layer is recognised by its members and by running both forwards on random numbers, never by
    its name: one that computes anything else is left alone and reported. Calling it again replaces the earlier choice.

    The class's own forward still runs under torch.jit.trace, torch.export and FX tracing, and when an inner
    module gets replaced or hooked later on; torch.jit.script restores the layers that it compiles. Not for
    nn.DataParallel, whose replicas share the bound forward; DistributedDataParallel is fine.

    Args:
        model: any module; the layer itself will do.
        backend: a name as in `use_backend`, for these instances only. None: the choice at call time.
        keep_modulator: also store `gates` and `modulator` on the layers whose class does so. The layer then runs
            part by part and keeps these activations alive; blocks run as their classes do.
        level: "block": where a block is known too (the authors', timm's, transformers', Video-FocalNets',
            FocalCodec's), its norms, MLP, layer scale, drop path and residuals join the layer in two ops. Drop path
            draws the numbers that it always drew. Where a dropout acts within a block, or where somebody hooks or
            replaces one of its modules, the block runs as its class does, and its layer alone through our ops. Patch
            embeddings (the authors', timm's, transformers') in a model with accelerated layers run through an op where
            that helps, in evaluation mode on a CPU without gradients. "layer": layers alone.
        keep_hidden: blocks keep their MLP's hidden values for a faster backward: see `mlp_branch`.

    Returns:
        A `Report` of what was replaced, what was kept, and why. A RuntimeWarning when nothing was replaced.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `backend` is no backend's name, or `level` none of these.

    Examples:
        >>> report = accelerate(timm.create_model("focalnet_tiny_lrf"))
        >>> print(report)
    """
    _check_model(model, "accelerate")
    if backend is not None:
        dispatch.check_backend(backend, "accelerate(backend)")
    check_level(level, "accelerate(level)")
    report, verdicts, layers_without_state = Report(), dict[tuple, Verdict](), 0
    for name, module in model.named_modules():
        if not is_candidate(module):
            continue
        adapter, verdict = accelerate_layer(module, backend, keep_modulator, verdicts)
        if adapter is not None and verdict.why_not is None:
            report.replaced.append((name, adapter.form))
            layers_without_state += bool(verdict.stores) and not keep_modulator
        elif verdict.why_not is not None:
            report.kept.append((name, verdict.why_not))
    for name, module in model.named_modules():
        form, reason = accelerate_block(module, level, keep_modulator, keep_hidden, verdicts)
        if form is not None:
            report.blocks.append((name, form))
        elif reason is not None and level == "block":
            report.kept_blocks.append((name, reason))
    if report.replaced:  # elsewhere it is nobody's business here
        for name, module in model.named_modules():
            form = accelerate_embedding(module, backend, level, verdicts)
            if form is not None:
                report.embeddings.append((name, form))
    if layers_without_state:
        report.notes.append(
            f"{layers_without_state} layers no longer store gates and modulator: keep_modulator=True keeps that"
        )
    if not report.replaced and (_ALREADY_OURS not in dict(report.kept).values()):
        warnings.warn(f"accelerate: nothing was replaced\n{report}", RuntimeWarning, stacklevel=2)
    return report


def accelerate_layer(
    module: nn.Module, backend: str | None, keep_modulator: bool, verdicts: dict
) -> tuple[Adapter | None, Verdict]:
    """Bind one layer's forward to our ops if its form is known. `verdicts`: those of earlier layers, added to."""
    adapter, verdict = _recognise(module, verdicts)
    if adapter is not None and verdict.why_not is None:
        if not keep_modulator:
            for stored in verdict.stores:
                vars(module).pop(stored, None)  # from an earlier forward: stale from now on
        AcceleratedForward(module, adapter, backend, verdict.stores if keep_modulator else ()).bind()
    return adapter, verdict


def accelerate_block(
    module: nn.Module, level: str, keep_modulator: bool, keep_hidden: bool, verdicts: dict
) -> tuple[str | None, str | None]:
    """Bind the forward of a block around an accelerated layer to our ops, on the layer's backend, if its form is known.

    Returns its form and None; or None and why it runs its class's forward; None twice where there is no such layer.
    """
    inner = module._modules.get("modulation")
    layer = None if inner is None else vars(inner).get("forward")
    if not isinstance(layer, AcceleratedForward) or not isinstance(layer.adapter, Adapter):
        return None, None
    bound = vars(module).get("forward")
    if isinstance(bound, AcceleratedForward):
        bound.unbind()
    elif bound is not None:
        return None, f"its forward is already bound to something else ({bound!r})"
    if keep_modulator or layer.stores:
        return None, "keep_modulator=True was asked for"
    if level == "layer":
        return None, "level='layer' was asked for"
    form = min(BLOCKS, key=lambda form: len(form.missing(module)))
    if missing := form.missing(module):
        return None, f"not a known form: nearest is {form.form}, without {', '.join(missing)}"
    adapter = form(layer.adapter, keep_hidden)
    reason = adapter.why_not(module)
    if reason is None:
        reason = _verdict(adapter, module, (form, layer.adapter), verdicts).why_not
    if reason is not None:
        return None, reason
    AcceleratedForward(module, adapter, layer.backend, ()).bind()
    return adapter.form, None


def accelerate_embedding(module: nn.Module, backend: str | None, level: str, verdicts: dict) -> str | None:
    """Bind the forward of a patch embedding to our op if its form is known: the form, or None."""
    bound = vars(module).get("forward")
    if isinstance(bound, AcceleratedForward) and isinstance(bound.adapter, EmbeddingAdapter):
        bound.unbind()
    elif bound is not None:
        return None
    for adapter in EMBEDDINGS if level == "block" else ():
        if adapter.missing(module) or adapter.why_not(module) is not None:
            continue
        if _verdict(adapter, module, (adapter,), verdicts).why_not is None:
            AcceleratedForward(module, adapter, backend, ()).bind()
            return adapter.form
    return None


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: all that it changed inside `model` runs its class's own forward again.

    Args:
        model: any module, accelerated or not.

    A layer whose bound forward somebody wrapped stays as it is, with a RuntimeWarning that names it.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_model(model, "restore")
    for name, module in model.named_modules():
        bound = _bound_to(module)
        if bound is not None and "forward" in vars(bound.unbind()):
            warnings.warn(
                f"restore: {name or 'the model itself'} stays accelerated: its forward was wrapped afterwards, "
                f"by {vars(module)['forward']!r}; take that off first",
                RuntimeWarning,
                stacklevel=2,
            )


def check_level(level: str, source: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"{source}: expected one of {', '.join(LEVELS)}, got {level!r}")


def _check_model(model, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(model): expected an nn.Module, got {type(model).__name__}")


def is_candidate(module: nn.Module) -> bool:
    """Worth a line in the report: a name alone never gets a layer replaced, but may get it mentioned."""
    return "focal_layers" in module._modules or _NAMED_SO.search(type(module).__name__) is not None


def _recognise(module: nn.Module, verdicts: dict) -> tuple[Adapter | None, Verdict]:
    """The form of a candidate, and why to leave it alone. Layers of one configuration share a verdict."""
    if isinstance(module, OURS):
        return None, Verdict(_ALREADY_OURS)
    forward = vars(module).get("forward")
    if forward is not None and not isinstance(forward, AcceleratedForward):
        return None, Verdict(f"its forward is already bound to something else ({forward!r})")
    adapter = min(ADAPTERS, key=lambda adapter: adapter.distance(module))
    if missing := adapter.missing(module):
        return None, Verdict(f"not a known form: nearest is {adapter.form}, without {', '.join(missing)}")
    if reason := adapter.why_not(module):
        return None, Verdict(reason)
    return adapter, _verdict(adapter, module, (adapter,), verdicts)


def _verdict(adapter: AnyAdapter, module: nn.Module, form: tuple, verdicts: dict) -> Verdict:
    """Whether both forwards agree, which those of one form and configuration are asked once."""
    key = (*form, configuration(module))
    if key not in verdicts:
        verdicts[key] = compare(adapter, module)
    return verdicts[key]
