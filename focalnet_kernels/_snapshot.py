"""What a layer's parts were like when `_parts.py` found them plain, so that the next call need not ask again.

`_parts.py` walks over some fifty attributes; most calls find nothing changed. A snapshot keeps all that it looks at,
and compares it in a few microseconds: where anything differs, `_parts.py` judges anew. Under torch.compile, which
guards what is read attribute by attribute, there are no snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

# what `_parts.py` reads of a module's attributes, by class; a LayerNorm's subclass has what its class has
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "_call_impl", "__call__")
_CONVOLUTION = ("in_channels", "out_channels", "stride", "padding", "dilation", "groups", "padding_mode")
_OPTIONS: dict[type, tuple[str, ...]] = {
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.GELU: ("approximate",),
    nn.LayerNorm: ("normalized_shape",),
}
_OF_OTHERS = ("act",)  # the function that an activation's module calls


class Snapshot:
    """Of some modules and all modules within them."""

    def __init__(self, parts: tuple, modules: Iterable[nn.Module]):
        """`parts`: what `still_true` will be asked with, equal where all are the same; `modules`: those in it."""
        self._parts = parts
        self._modules = list(dict.fromkeys(inner for module in modules for inner in module.modules()))
        self._own: list[tuple[dict, Callable, Any, Any]] = []
        self._hooks: list[dict] = []
        for module in self._modules:
            own = vars(module)
            options = next((names for cls, names in _OPTIONS.items() if isinstance(module, cls)), _OF_OTHERS)
            options = tuple([name for name in options if name in own])
            read = itemgetter(*_HOOKS, *options)
            self._own.append((own, read, read(own), own.get("forward")))
            self._hooks += [own[name] for name in _HOOKS]
        self._inner = [(vars(m), m._modules, [*m._modules.values()]) for m in self._modules if m._modules]
        self._parameters = [(vars(m), m._parameters) for m in self._modules if m._parameters]
        tensors = self._read_tensors()
        self._tensors = [*map(type, tensors)]
        self._shapes = [None if t is None else t.shape for t in tensors]
        self._types = [*map(type, self._modules)]
        self._classes: list[tuple[type, Callable, Any]] = []
        for cls in set(self._types):
            methods = attrgetter(*_METHODS, *(["_conv_forward"] if hasattr(cls, "_conv_forward") else []))
            self._classes.append((cls, methods, methods(cls)))

    def _read_tensors(self) -> list[Tensor | None]:
        return [tensor for _, parameters in self._parameters for tensor in parameters.values()]

    def still_true(self, parts: tuple) -> bool:
        """Whether nothing has changed that a judgement of these parts may rest on."""
        if parts != self._parts or any(self._hooks) or [*map(type, self._modules)] != self._types:
            return False
        for own, read, state, forward in self._own:
            if (
                own.get("forward") is not forward
                or "_conv_forward" in own
                or "_call_impl" in own
                or "_compiled_call_impl" in own
            ):
                return False
            try:
                if read(own) != state:
                    return False
            except KeyError:
                return False
        for own, inner, modules in self._inner:
            if own["_modules"] is not inner or [*inner.values()] != modules:
                return False
        for own, parameters in self._parameters:
            if own["_parameters"] is not parameters:
                return False
        tensors = self._read_tensors()
        if [*map(type, tensors)] != self._tensors or [None if t is None else t.shape for t in tensors] != self._shapes:
            return False
        for cls, read, methods in self._classes:
            if read(cls) != methods:
                return False
        return True
