"""What an adapter is: where one foreign class keeps the layer's parts, and its forward through our ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..functional import focal_modulation


class Parts(NamedTuple):
    """The inner modules of a layer, by role. The accelerated forward does not call them as the original does.

    `extra`: what a form has beyond the common roles, by name.
    """

    f: nn.Module
    h: nn.Module
    proj: nn.Module
    act: nn.Module
    focal_layers: nn.ModuleList
    norm: nn.Module | None
    extra: tuple[tuple[str, nn.Module], ...] = ()

    def flat(self) -> list[nn.Module]:
        """Every inner module, those within `focal_layers` too."""
        modules = [self.f, self.h, self.proj, self.act, self.focal_layers]
        if self.norm is not None:
            modules.append(self.norm)
        for level in self.focal_layers:
            modules += (level, *level._modules.values())
        for _, part in self.extra:
            modules += part.modules()
        return modules

    def name(self, module: nn.Module) -> str:
        """By which role `flat` knows it."""
        for role, part in zip(self._fields, self, strict=True):
            if part is module:
                return role
        for i, level in enumerate(self.focal_layers):
            if level is module:
                return f"focal_layers[{i}]"
            for j, inner in level._modules.items():
                if inner is module:
                    return f"focal_layers[{i}][{j}]"
        for name, part in self.extra:
            for path, inner in part.named_modules(prefix=name):
                if inner is module:
                    return path
        raise KeyError(module)


class Adapter:
    """One foreign form of the layer: 2-D, channels last and Linear projections unless a subclass says otherwise.

    The attributes are the names under which the form keeps each role. A form is recognised by these members,
    their types and shapes (`why_not`); that its forward computes our formula is checked by `equivalence.py`.
    """

    form: str
    f, h, proj, act, drop = "f", "h", "proj", "act", "proj_drop"
    norm = "ln"
    norm_flag: str
    extra: tuple[str, ...] = ()  # inner modules that only this form has
    projection: type[nn.Module] = nn.Linear
    conv: type[nn.Module] = nn.Conv2d
    storable: tuple[str, ...] = ("gates", "modulator")  # what its class may leave on the module

    def missing(self, module: nn.Module) -> list[str]:
        """The members of this form that `module` lacks: none where it looks like the form."""
        names = [self.f, self.h, self.proj, self.act, self.drop, "focal_layers", self.norm_flag, *self.extra]
        return [name for name in names if not hasattr(module, name)]

    def distance(self, module: nn.Module) -> tuple:
        """How far `module` is from the form: the nearest form is the one that explains most of its members."""
        other_dimension = type(getattr(module, self.h, None)) is not self.conv
        return len(self.missing(module)), other_dimension, -len(self.extra)

    def parts(self, module: nn.Module) -> Parts:
        """The inner modules as they are now."""
        return Parts(
            getattr(module, self.f),
            getattr(module, self.h),
            getattr(module, self.proj),
            getattr(module, self.act),
            module.focal_layers,
            self.post_norm(module),
            tuple((name, getattr(module, name)) for name in self.extra),
        )

    def post_norm(self, module: nn.Module) -> nn.Module | None:
        """The LayerNorm between q * modulator and proj, if the layer has one."""
        return getattr(module, self.norm, None) if getattr(module, self.norm_flag) else None

    def examples(self, module: nn.Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        """Calls to try the layer with, each the shapes of its arguments; small, and no two axes alike."""
        return [((2, 5, 4, C),)]

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
        """The tensors of a call, for `forward`; None for a call that is left to the class."""
        return args if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None

    def channels_last(self, x: Tensor) -> Tensor:
        """The layer's input as (B, *spatial, C)."""
        return x

    def as_original(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """(B, *spatial, C) in the layout and memory order in which the original answers for `x`, after dropout."""
        return getattr(module, self.drop)(y.contiguous())

    def functional_arguments(self, module: nn.Module, x: Tensor) -> tuple[tuple, dict]:
        """What the layer hands to `functional.focal_modulation`."""
        f, h, proj, _, focal_layers, norm, _ = self.parts(module)
        args = (
            self.channels_last(x),
            f.weight,
            f.bias,
            tuple(level[0].weight for level in focal_layers),
            h.weight,
            h.bias,
            proj.weight,
            proj.bias,
        )
        kwargs = {"normalize": getattr(module, "normalize_modulator", False)}  # not in the oldest forms
        if norm is not None:
            kwargs |= {"ln_weight": norm.weight, "ln_bias": norm.bias, "ln_eps": norm.eps}
        return args, kwargs

    def forward(self, module: nn.Module, x: Tensor, *, stores: tuple[str, ...] = ()) -> Tensor:
        """The layer's forward through our ops.

        Args:
            module: the layer.
            x: its input, in its own layout.
            stores: which of `storable` to leave on the module, as the original does.
        """
        args, kwargs = self.functional_arguments(module, x)
        if stores:
            y, gates, modulator = focal_modulation(*args, **kwargs, return_gates=True)
            for name, value in (("gates", gates), ("modulator", modulator)):
                if name in stores:
                    setattr(module, name, value)
        else:
            y = focal_modulation(*args, **kwargs)
        return self.as_original(module, y, x)

    def bypassed(self, module: nn.Module) -> str | None:
        """What an accelerated forward would pass by: a replaced or hooked inner module.

        Cheap, for it runs in every call: a layer may be wrapped or hooked after it was accelerated.
        """
        if type(module.focal_layers) is not nn.ModuleList:
            return f"focal_layers is a {type(module.focal_layers).__name__}, expected a ModuleList"
        parts = self.parts(module)
        for part in parts.flat():
            if type(part) not in _PLAIN and not isinstance(part, nn.LayerNorm):
                name = parts.name(part)
                return f"{name} is a {type(part).__name__}, which an accelerated forward would not call"
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"{parts.name(part)} has hooks, which an accelerated forward would not fire"
        return None

    def why_not(self, module: nn.Module) -> str | None:
        """Why these members are not focal modulation in this form; None where they are."""
        return (
            self.bypassed(module)
            or self._why_not_projections(self.parts(module))
            or self._why_not_levels(self.parts(module))
            or _why_not_norm(self.parts(module))
            or self._why_not_only(module)
        )

    def f_outputs(self, C: int, L: int) -> int:
        """Output channels of f: q, ctx and the gates."""
        return 2 * C + L + 1

    def _why_not_projections(self, parts: Parts) -> str | None:
        for role, kind in {"f": self.projection, "h": self.conv, "proj": self.projection}.items():
            part = getattr(parts, role)
            if type(part) is not kind:
                return f"{role} is a {type(part).__name__}, expected a {kind.__name__}"
            if kind is not nn.Linear and not _is_pointwise(part):
                return f"{role} is not a plain 1x1 convolution"
        C, L = parts.h.in_channels, len(parts.focal_layers)
        for role, expected in {"f": (self.f_outputs(C, L), C), "h": (C, C), "proj": (C, C)}.items():
            channels = _channels(getattr(parts, role))
            if channels != expected:
                return (
                    f"{role} has {channels[0]} output and {channels[1]} input channels, "
                    f"expected {expected[0]} and {expected[1]} for C = {C} and L = {L}"
                )
        return None if _is_exact_gelu(parts.act) else f"act is {parts.act}, expected the exact GELU"

    def _why_not_levels(self, parts: Parts) -> str | None:
        C = parts.h.in_channels
        for i, level in enumerate(parts.focal_layers):
            if type(level) is not nn.Sequential or [type(inner) for inner in level] != [self.conv, nn.GELU]:
                return f"focal_layers[{i}] is not Sequential({self.conv.__name__}, GELU)"
            conv, act = level
            k = conv.kernel_size
            if not _is_exact_gelu(act):
                return f"focal_layers[{i}][1] is {act}, expected the exact GELU"
            if any(size % 2 == 0 for size in k):
                return f"focal_layers[{i}][0] has the even kernel {k}, which changes the map's size"
            if _geometry(conv) != _same_size(k):
                return f"focal_layers[{i}][0] is not of stride 1, dilation 1 and zero padding k // 2"
            if (*_channels(conv), conv.groups) != (C, C, C) or conv.bias is not None:
                return f"focal_layers[{i}][0] is not depthwise over {C} channels without bias"
        return None

    def _why_not_only(self, module: nn.Module) -> str | None:
        """A further member with a state of its own may take part in the forward."""
        parts = self.parts(module).flat()
        known = {id(p) for part in parts for p in part.parameters(recurse=False)}
        for name, parameter in module.named_parameters():
            if id(parameter) not in known:
                return f"parameter {name} is no part of the form"
            if type(parameter) is not nn.Parameter:
                return f"parameter {name} is a {type(parameter).__name__}, expected a plain Parameter"
        known = {id(part) for part in (module, getattr(module, self.drop), *parts)}
        for name, inner in module.named_modules():
            if id(inner) not in known and type(inner) is not nn.Identity:
                return f"{name} ({type(inner).__name__}) is no part of the form"
        return next((f"buffer {name} is no part of the form" for name, _ in module.named_buffers()), None)


_PLAIN = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GELU, nn.Sequential, nn.ModuleList}


def _channels(part: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Output and input channels."""
    linear = isinstance(part, nn.Linear)
    return (part.out_features, part.in_features) if linear else (part.out_channels, part.in_channels)


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode


def _same_size(kernel: tuple[int, ...]) -> tuple:
    """The geometry of a convolution that keeps the size of its map."""
    ones = (1,) * len(kernel)
    return kernel, ones, tuple(size // 2 for size in kernel), ones, "zeros"


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return _geometry(conv) == _same_size((1,) * len(conv.kernel_size)) and conv.groups == 1


def _is_exact_gelu(module: nn.Module) -> bool:
    return type(module) is nn.GELU and module.approximate == "none"


def _why_not_norm(parts: Parts) -> str | None:
    norm, C = parts.norm, parts.h.in_channels
    if norm is None or (norm.normalized_shape == (C,) and norm.weight is not None and norm.bias is not None):
        return None
    return f"norm is {norm}, expected an affine LayerNorm over {C} channels"
