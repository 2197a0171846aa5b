"""What an adapter is: where one foreign class keeps the layer's parts, and its forward through our ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._parts import (
    Module,
    Parts,
    dropped,
    why_call,
    why_call_gelu,
    why_call_levels,
    why_call_norm,
    why_call_projection,
)
from ..functional import focal_modulation


class BoundForward:
    """What `accelerate` puts on a module as its forward."""


class Adapter:
    """One foreign form of the layer: 2-D, channels last and Linear projections unless a subclass says otherwise.

    The attributes are the names under which the form keeps each role. A form is recognised by these members,
    their types and shapes (`why_not`); that its forward computes our formula is checked by `equivalence.py`.
    """

    form: str
    f, h, proj, act, drop = "f", "h", "proj", "act", "proj_drop"
    norm, levels = "ln", "focal_layers"
    norm_flag: str
    extra: tuple[str, ...] = ()  # inner modules that only this form has
    projection: type[nn.Module] = nn.Linear
    conv: type[nn.Module] = nn.Conv2d
    storable: tuple[str, ...] = ("gates", "modulator")  # what its class may leave on the module
    in_autocast = True  # whether the op has the class's dtypes there

    def missing(self, module: Module) -> list[str]:
        """The members of this form that `module` lacks: none where it looks like the form."""
        names = [self.f, self.h, self.proj, self.act, self.drop, self.levels, *self.extra]
        return [name for name in names if name not in module._modules] + (
            [] if hasattr(module, self.norm_flag) else [self.norm_flag]
        )

    def distance(self, module: Module) -> tuple:
        """How far `module` is from the form: the nearest form is the one that explains most of its members."""
        other_dimension = type(getattr(module, self.h, None)) is not self.conv
        return len(self.missing(module)), other_dimension, -len(self.extra)

    def parts(self, module: Module) -> Parts:
        """The inner modules as they are now."""
        inner = module._modules  # not by getattr, which is slow for modules
        return Parts(
            inner[self.f],
            inner[self.h],
            inner[self.proj],
            inner[self.levels],
            self.post_norm(module),
            inner[self.act],
            tuple([(name, inner[name]) for name in self.extra]),
            bool(getattr(module, self.norm_flag)),
        )

    def post_norm(self, module: Module) -> nn.Module | None:
        """The LayerNorm between q * modulator and proj, if the layer has one."""
        return self.called_norm(module) if getattr(module, self.norm_flag) else None

    def called_norm(self, module: Module) -> Module | None:
        """What the class calls by the norm's name: also where somebody put no module there."""
        norm = module._modules.get(self.norm)
        return getattr(module, self.norm, None) if norm is None else norm

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        """Calls to try the layer with, each the shapes of its arguments; small, and no two axes alike."""
        return [((2, 5, 4, C),)]

    def is_plain(self) -> bool:
        """Whether it is focal modulation alone, so that a block may take it for a body."""
        return type(self).forward is Adapter.forward

    def channels(self, module: Module) -> int:
        """C."""
        return self.parts(module).h.in_channels

    def silence(self, module: Module) -> None:
        """Take off what is random, but honoured by both forwards."""
        setattr(module, self.drop, nn.Identity())

    def arguments(self, module: Module, xs: list[Tensor]) -> tuple:
        """A call of the class's forward with these tensors."""
        return tuple(xs)

    def may_run(self, parts: Parts, x: Tensor) -> bool:
        """Whether our ops do what the module would now do with this input, whose parts are plain."""
        return True

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor, ...] | None:
        """The tensors of a call with these arguments, for `forward`; None for a call that is left to the class."""
        return args if len(args) == 1 and isinstance(args[0], Tensor) else None

    def channels_last(self, x: Tensor) -> Tensor:
        """The layer's input as (B, *spatial, C)."""
        return x

    def as_original(self, module: Module, parts: Parts, y: Tensor, x: Tensor) -> Tensor:
        """(B, *spatial, C) in the layout and memory order in which the original answers for `x`, after dropout."""
        return dropped(getattr(module, self.drop), y.contiguous())

    def functional_arguments(self, module: Module, parts: Parts, x: Tensor) -> tuple[tuple, dict]:
        """What the layer hands to `functional.focal_modulation`."""
        args, kwargs = parts.weights()
        kwargs["normalize"] = normalizes(module)
        return (self.channels_last(x), *args), kwargs

    def forward(
        self, module: Module, parts: Parts, x: Tensor, *, stores: tuple[str, ...] = (), backend: str | None = None
    ) -> Tensor:
        """The layer's forward through our ops.

        Args:
            module: the layer.
            parts: its inner modules, none of which must be called.
            x: its input, in its own layout.
            stores: which of `storable` to leave on the module, as the original does.
            backend: see `functional.focal_context`.
        """
        args, kwargs = self.functional_arguments(module, parts, x)
        if stores:
            y, gates, modulator = focal_modulation(*args, **kwargs, backend=backend, return_gates=True)
            for name, value in (("gates", gates), ("modulator", modulator)):
                if name in stores:
                    setattr(module, name, value)
        else:
            y = focal_modulation(*args, **kwargs, backend=backend)
        return self.as_original(module, parts, y, x)

    def bypassed(self, parts: Parts, norms: Mapping[type, Callable]) -> str | None:
        """What an accelerated forward would pass by: an inner module that is not, or no longer, as its role has it.

        Args:
            parts: of the layer, which may have changed since it was accelerated.
            norms: subclasses of LayerNorm that a layer of this form was found to be right with, and their forwards.
        """
        reason = why_call_projection(parts.h, self.conv)
        if reason is not None:
            return f"h {reason}"
        C = parts.h.in_channels
        reason = why_call_levels(parts.focal_layers, self.conv, C)
        if reason is not None:
            return reason
        if parts.h.out_channels != C:
            return f"h has {parts.h.out_channels} output and {C} input channels"
        reason = why_call_projection(parts.f, self.projection, (self.f_outputs(C, len(parts.focal_layers)), C))
        if reason is not None:
            return f"f {reason}"
        reason = why_call_projection(parts.proj, self.projection, (C, C))
        if reason is not None:
            return f"proj {reason}"
        reason = why_call_gelu(parts.act)
        if reason is not None:
            return f"act {reason}"
        reason = None if parts.norm is None else why_call_norm(parts.norm, C, norms)
        if reason is not None:
            return f"norm {reason}"
        for name, part in parts.extra:
            for path, inner in part.named_modules(prefix=name):
                reason = None if type(inner) is nn.ModuleList else why_call(inner)
                if reason is not None:
                    return f"{path} {reason}"
        return None

    def norms(self, module: Module) -> dict[type[nn.Module], Callable]:
        """The class of the layer's norm with its forward, where it is a subclass of LayerNorm: see `bypassed`."""
        norm = self.post_norm(module)
        return {type(norm): type(norm).forward} if isinstance(norm, nn.LayerNorm) else {}

    def why_not(self, module: Module) -> str | None:
        """Why these members are not focal modulation in this form; None where they are."""
        return self.bypassed(self.parts(module), self.norms(module)) or self._why_not_only(module)

    def f_outputs(self, C: int, L: int) -> int:
        """Output channels of f: q, ctx and the gates."""
        return 2 * C + L + 1

    def _why_not_only(self, module: Module) -> str | None:
        parts = self.parts(module)
        inner = [parts.f, parts.h, parts.proj, parts.act, parts.focal_layers, getattr(module, self.drop)]
        inner += [part for _, part in parts.extra] + ([] if parts.norm is None else [parts.norm])
        return why_not_only(module, inner)


def normalizes(layer: Module) -> bool:
    """Whether the gathered context is divided by L + 1. The oldest forms cannot; SEEM, X-Decoder and OpenSeeD call it
    `scaling_modulator`."""
    return bool(getattr(layer, "normalize_modulator", False) or getattr(layer, "scaling_modulator", False))


def why_not_only(module: Module, inner: Sequence[Module], parameters: Sequence[Any] = ()) -> str | None:
    """What `module` has beside these inner modules and parameters: a further member with a state of its own may take
    part in its forward."""
    known = {id(module), *(id(m) for part in inner for m in part.modules())}
    own = {*map(id, parameters), *(id(p) for part in inner for p in part.parameters())}
    for name, parameter in module.named_parameters():
        if id(parameter) not in own:
            return f"parameter {name} is no part of the form"
    for name, member in module.named_modules():
        if id(member) not in known and type(member) is not nn.Identity:
            return f"{name} ({type(member).__name__}) is no part of the form"
    return next((f"buffer {name} is no part of the form" for name, _ in module.named_buffers()), None)
