"""Whether a foreign forward computes our formula: both are run on a twin of the layer with random parameters.

Look-alikes share names, members and shapes with focal modulation and differ in the formula (sigmoid gates,
levels in parallel, ...). Only running them tells. The twin lives on the CPU in float64, so the answer depends
on the class and its configuration alone, not on the layer's device, dtype or weights (zero or meta, perhaps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .blocks import BlockAdapter
from .embeddings import EmbeddingAdapter

AnyAdapter = Adapter | BlockAdapter | EmbeddingAdapter

TOLERANCE = 1e-9  # relative; the same formula in another order of sums stays below 1e-13


class Verdict(NamedTuple):
    """Why the forwards differ, or None; and the tensors that the original leaves on the module."""

    why_not: str | None
    stores: tuple[str, ...] = ()


def configuration(module: nn.Module) -> tuple:
    """What a verdict depends on: the classes, and all attributes of the layer and its inner modules."""
    return tuple(
        (name, type(inner), type(inner).forward, tuple(_attributes(inner))) for name, inner in module.named_modules()
    )


def compare(adapter: AnyAdapter, module: nn.Module) -> Verdict:
    """Run the class's own forward and ours; the module and the random state stay untouched."""
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=()),
            torch.autocast("cpu", enabled=False),
            _one_thread(),
        ):
            return _compare(adapter, module)
    except Exception as error:  # the forward is foreign code: whatever it raises, the layer is left alone
        return Verdict(f"its forward fails on input for the {adapter.form} form: {type(error).__name__}: {error}")


def _compare(adapter: AnyAdapter, module: nn.Module) -> Verdict:
    generator = torch.Generator().manual_seed(0)
    twin = _twin(module, lambda shape: _random(shape, generator))
    adapter.silence(twin)

    def ours(twin, *args, **kwargs):
        inputs = adapter.inputs(twin, args)
        assert inputs is not None
        return adapter.forward(twin, adapter.parts(twin), *inputs, backend="reference", **kwargs)

    stores: tuple[str, ...] = ()
    for shapes in adapter.examples(twin, adapter.channels(module)):
        xs = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
        args = adapter.arguments(twin, xs)
        for mode in ("evaluation", "training"):
            twin.train(mode == "training")
            y, stored = _run(type(module).forward, twin, args)
            if strange := sorted(stored.keys() - set(adapter.storable)):
                return Verdict(f"its forward also stores {', '.join(strange)} on the module")
            our_y, our_stored = _run(ours, twin, args, stores=adapter.storable)
            for name, theirs in {"output": y, **stored}.items():
                difference = _relative_difference(theirs, our_stored.get(name, our_y))
                if not difference <= TOLERANCE:
                    return Verdict(
                        f"its forward computes something else ({name} differs by {difference:.1e} in {mode} mode)"
                    )
            stores = tuple(name for name in adapter.storable if name in stored)
        if adapter.in_autocast and (reason := _compare_dtypes(type(module).forward, ours, twin, args)):
            return Verdict(reason)
    return Verdict(None, stores)


def _compare_dtypes(theirs: Callable, ours: Callable, twin: nn.Module, args: tuple) -> str | None:
    """Whether the outputs differ in dtype where mixed precision rounds some of their steps."""
    twin = _twin(twin, lambda shape: torch.zeros(shape, dtype=torch.float32, device="cpu"))
    args = tuple([x.float() if isinstance(x, Tensor) else x for x in args])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (_dtype(_run(forward, twin, args)[0]) for forward in (theirs, ours))
    return None if expected == found else f"its forward answers with {expected} in autocast, ours with {found}"


@contextmanager
def _one_thread():
    """These maps are small: with more threads they wait for one another, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(forward, twin: nn.Module, args: tuple, **kwargs) -> tuple[Any, dict[str, Any]]:
    """The output, and what the forward left on the module, which is taken off it."""
    torch.default_generator.manual_seed(0)  # for drop path; torch.manual_seed would seed every GPU's generator too
    before = dict(vars(twin))
    y = forward(twin, *[x.clone() if isinstance(x, Tensor) else x for x in args], **kwargs)
    stored = {name: value for name, value in vars(twin).items() if before.get(name, twin) is not value}
    twin.__dict__ = before
    return y, stored


def _twin(module: nn.Module, draw: Callable[[torch.Size], Tensor]) -> nn.Module:
    """A copy with fresh parameters. Not by deepcopy, which activations stored on the layer refuse."""
    twin = module.__new__(type(module))
    twin.__dict__ = {
        name: value for name, value in vars(module).items() if name not in _INSTANCE and not isinstance(value, Tensor)
    }
    twin._parameters = {
        name: parameter if parameter is None else nn.Parameter(draw(parameter.shape), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    twin._modules = {name: child if child is None else _twin(child, draw) for name, child in module._modules.items()}
    return twin


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    fan_in = shape[1:].numel() if len(shape) > 1 else 1
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") / fan_in**0.5


def _relative_difference(theirs: Any, ours: Any) -> float:
    """Of a tensor, or of all that a tuple or list holds: tensors, and numbers or None, which must be the same. NaN for
    another kind."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and theirs.shape == ours.shape:
        return ((theirs - ours).norm() / ours.norm()).item()
    if type(ours) in (tuple, list) and type(theirs) is type(ours) and len(theirs) == len(ours):
        return sum(map(_relative_difference, theirs, ours))  # unlike max(), it passes NaN on
    return 0.0 if type(ours) in (int, type(None)) and type(theirs) is type(ours) and theirs == ours else float("nan")


def _dtype(y: Any) -> torch.dtype:
    """A result's, or that of the tensor which a tuple begins with."""
    return y[0].dtype if isinstance(y, tuple) else y.dtype


_INSTANCE = {"forward", "__prepare_scriptable__", "__reduce_ex__"}  # what an accelerated layer has of its own
_INTERNAL = {*vars(nn.Module()), *_INSTANCE}


def _attributes(module: nn.Module):
    for name, value in sorted(vars(module).items()):
        if name not in _INTERNAL and not isinstance(value, Tensor):
            if name == "drop_prob":  # a rate per block: whether it drops is all that counts
                value = bool(value)
            yield name, _key(value)


def _key(value: Any) -> Any:
    """Equal for values that are the same to a forward."""
    if dataclasses.is_dataclass(type(value)) and hasattr(value, "__dict__"):
        # it is its fields: transformers' configuration, say, of which every model has one of its own
        return type(value), tuple((name, _plain(field, dict)) for name, field in sorted(vars(value).items()))
    return _plain(value)


def _plain(value: Any, *further: type) -> Any:
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, *further))
    return repr(value) if plain else _Identity(value)


class _Identity:
    """Equal to itself alone; kept in a key, it keeps the object's id from passing to another one."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
