"""Whether a fused forward may read the weights of a layer's inner modules, or must call the modules.

Reading is right for plain modules alone: who hooks, wraps, replaces, parametrises, prunes, quantises, shards or
offloads a module counts on its being called. Each function here says in a few words why a part must be called; None
where its weights may be read. A part may change at any time, so every call asks, if only a snapshot of the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as _modules

from ._snapshot import Snapshot

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# as PyTorch has them: some tools replace a class's methods
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_FORWARD: dict[type, Callable] = {
    cls: cls.forward for cls in (nn.Linear, *_CONVOLUTIONS, nn.GELU, nn.LayerNorm, nn.Sequential, nn.Identity)
}
_CONV_FORWARD: dict[type, Callable] = {cls: cls._conv_forward for cls in _CONVOLUTIONS}
_TENSORS = {nn.Parameter, Tensor, FakeTensor}  # functional_call puts tensors in the parameters' place
_NONE: Mapping[type, Callable] = {}


Module = Any  # an nn.Module of somebody's, whose attributes are known by name alone


class Parts(NamedTuple):
    """The inner modules of a layer, by role. A fused forward does not call them, but reads their weights.

    `extra`: what a form has beyond the common roles, by name; `norm_is_on`: what the layer's flag says of its norm.
    """

    f: Module
    h: Module
    proj: Module
    focal_layers: Module
    norm: Module | None = None
    act: Module | None = None
    extra: tuple[tuple[str, Module], ...] = ()
    norm_is_on: bool = False

    def weights(self) -> tuple[tuple, dict]:
        """Arguments of `functional.focal_modulation` after x, of parts that need not be called."""
        f, h, proj = self.f._parameters, self.h._parameters, self.proj._parameters  # not by getattr: slow for modules
        weights, biases = self.levels()
        args = (f["weight"], f["bias"], weights, h["weight"], h["bias"], proj["weight"], proj["bias"])
        kwargs = {} if biases is None else {"focal_biases": biases}
        if self.norm is None:
            return args, kwargs
        norm = self.norm._parameters
        return args, kwargs | {"ln_weight": norm["weight"], "ln_bias": norm["bias"], "ln_eps": self.norm.eps}

    def levels(self) -> tuple[list[Tensor], list[Tensor | None] | None]:
        """The depthwise convolutions' weights and biases; None where no level has one."""
        convs = [next(iter(level._modules.values()))._parameters for level in self.focal_layers._modules.values()]
        biases = [conv["bias"] for conv in convs]
        return [conv["weight"] for conv in convs], None if all([bias is None for bias in biases]) else biases

    def snapshot(self) -> Snapshot:
        """Of all of them."""
        modules = (*self[:6], *[part for _, part in self.extra])
        return Snapshot(self, [module for module in modules if module is not None])


def why_call_all() -> str | None:
    """What holds for every module of the process."""
    if (
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    ):
        return "hooks on all modules are registered, which a fused forward would not fire"
    # torch.export replaces it too, to note which module it is in
    replaced = nn.Module.__call__ is not _CALL and not torch.compiler._is_exporting_flag
    return "nn.Module.__call__ was replaced" if replaced else None


_snapshots: MutableMapping[nn.Module, Snapshot] = WeakKeyDictionary()  # by layer; nothing is written onto layers


def why_call_any(layer: nn.Module, parts: Any, why_call_these: Callable[[Any], str | None]) -> str | None:
    """What sets any of a layer's or a block's parts apart from what `why_call_these` expects, or holds for all modules.

    While all stays as it was when it said None, it is not asked again.
    """
    reason = why_call_all()
    if reason is not None:
        return reason
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which want to see the same steps in every call
        return why_call_these(parts)
    last = _snapshots.get(layer)
    if last is not None and last.still_true(parts):
        return None
    reason = why_call_these(parts)
    if reason is None:
        _snapshots[layer] = parts.snapshot()
    else:
        _snapshots.pop(layer, None)
    return reason


def why_call(part: nn.Module, forwards: Mapping[type, Callable] = _NONE, bound: Any = None) -> str | None:
    """What sets `part` apart from a plain module of its class.

    Args:
        forwards: further classes that are known, each with the forward that is known of it.
        bound: a forward that it may have of its own.
    """
    cls = type(part)
    forward = _FORWARD.get(cls) or forwards.get(cls)
    if forward is None:
        return f"is a {cls.__name__}, which a fused forward would not call"
    if cls.forward is not forward or (cls in _CONV_FORWARD and cls._conv_forward is not _CONV_FORWARD[cls]):
        return f"is a {cls.__name__}, whose class was given another forward"
    if cls._call_impl is not _CALL_IMPL or cls.__call__ is not nn.Module.__call__:
        return f"is a {cls.__name__}, which is called in another way than PyTorch's modules"
    if torch.compiler.is_compiling():  # it guards what is looked up by attribute, and nothing in __dict__
        part.forward, getattr(part, "_conv_forward", None)
    own = part.__dict__
    if own.get("forward") is not bound or "_conv_forward" in own or "_call_impl" in own or "_compiled_call_impl" in own:
        return "has a forward of its own, which a fused forward would not call"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return "has hooks, which a fused forward would not fire"
    for tensor in part._parameters.values():
        if tensor is not None and type(tensor) not in _TENSORS:
            return f"holds a {type(tensor).__name__}, expected plain Parameters"
    return None


def why_call_projection(part: nn.Module, kind: type[nn.Module], channels: tuple[int, int] | None = None) -> str | None:
    """As `why_call`, for what is to be a Linear or a 1x1 convolution, of so many output and input channels."""
    reason = why_call(part)
    if reason is not None:
        return reason
    if type(part) is not kind:
        return f"is a {type(part).__name__}, expected a {kind.__name__}"
    weight = part._parameters.get("weight")
    if weight is None or "bias" not in part._parameters:
        return "has no weight or bias among its parameters"
    shape = tuple(weight.shape)
    if kind is not nn.Linear and not _is_pointwise(part, shape[2:]):
        return "is not a plain 1x1 convolution"
    if channels is not None and shape[:2] != channels:
        return f"has {shape[0]} output and {shape[1]} input channels, expected {channels[0]} and {channels[1]}"
    return None


def why_call_levels(levels: nn.Module, conv: type[nn.Module], C: int) -> str | None:
    """The same for all levels, naming one: each a Sequential of a depthwise convolution and the exact GELU."""
    if type(levels) is not nn.ModuleList:
        return f"focal_layers is a {type(levels).__name__}, expected a ModuleList"
    for i, level in enumerate(levels._modules.values()):
        reason = why_call(level)
        if reason is not None:
            return f"focal_layers[{i}] {reason}"
        inner = tuple(level._modules.values())
        for j, part in enumerate(inner):
            reason = why_call(part)
            if reason is not None:
                return f"focal_layers[{i}][{j}] {reason}"
        if (
            type(level) is not nn.Sequential
            or len(inner) != 2
            or type(inner[0]) is not conv
            or type(inner[1]) is not nn.GELU
        ):
            return f"focal_layers[{i}] is not Sequential({conv.__name__}, GELU)"
        reason = _why_call_depthwise(inner[0], C)
        if reason is not None:
            return f"focal_layers[{i}][0] {reason}"
        if inner[1].approximate != "none":
            return f"focal_layers[{i}][1] is {inner[1]}, expected the exact GELU"
    return None


def _why_call_depthwise(conv: nn.Module, C: int) -> str | None:
    weight = conv._parameters.get("weight")
    if weight is None:
        return "has no weight among its parameters"
    channels, per_group, *kernel = weight.shape
    padding = []
    for k in kernel:
        if k % 2 == 0 and conv.padding != "same":
            return f"has the even kernel {tuple(kernel)}, which changes the map's size"
        padding.append(k // 2)
    if conv.padding not in (tuple(padding), "same") or not _is_dense(conv, _ONES[len(kernel)]):
        return "is not of stride 1, dilation 1 and zero padding k // 2"
    # a bias that is no parameter is a plain attribute or a buffer
    if (channels, per_group, conv.groups) != (C, 1, C) or "bias" not in conv._parameters:
        return f"is not depthwise over {C} channels"
    return None


def dropped(dropout: Module, y: Tensor) -> Tensor:
    """What a layer's dropout makes of its output. It is not called where it is off and nobody would see the call."""
    return y if is_off(dropout) else dropout(y)


def is_off(dropout: Module) -> bool:
    """Whether it changes nothing, and nobody would see a call."""
    off = type(dropout) is nn.Dropout and (not dropout.training or dropout.p == 0.0)
    return (off or type(dropout) is nn.Identity) and why_call(dropout, _DROPOUT) is None


_DROPOUT: Mapping[type, Callable] = {nn.Dropout: nn.Dropout.forward}


def why_call_gelu(part: Module, forwards: Mapping[type, Callable] = _NONE) -> str | None:
    """As `why_call`, for what is to be the exact GELU: PyTorch's module, or another that calls the function `act`."""
    reason = why_call(part, forwards)
    if type(part) is nn.GELU:
        exact = part.approximate == "none"
    else:
        exact = getattr(part, "act", None) is nn.functional.gelu
    return reason if reason is not None or exact else f"is {part}, expected the exact GELU"


def why_call_norm(part: nn.Module, C: int, forwards: Mapping[type, Callable] = _NONE) -> str | None:
    """As `why_call`, for what is to be an affine LayerNorm over C channels."""
    reason = why_call(part, forwards)
    if reason is not None:
        return reason
    affine = part._parameters.get("weight") is not None and part._parameters.get("bias") is not None
    if isinstance(part, nn.LayerNorm) and affine and tuple(part.normalized_shape) == (C,):
        return None
    return f"is {part}, expected an affine LayerNorm over {C} channels"


def _is_pointwise(conv: nn.Module, kernel: tuple[int, ...]) -> bool:
    ones = _ONES[len(kernel)]
    return kernel == ones and conv.groups == 1 and conv.padding == _ZEROS[len(kernel)] and _is_dense(conv, ones)


def _is_dense(conv: nn.Module, ones: tuple[int, ...]) -> bool:
    """Whether it takes every pixel, and zeros beyond the map."""
    return conv.stride == ones and conv.dilation == ones and conv.padding_mode == "zeros"


_ONES, _ZEROS = ({n: (number,) * n for n in (1, 2, 3)} for number in (1, 0))
