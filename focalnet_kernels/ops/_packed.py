"""Weights kept in the form in which the CPU's products read them, for inference: where the user asked for it.

Copies stand beside the modules that have the parameters: they are never copied, pickled or saved, and go with them. One
is made when a forward without gradients first wants it, and again whenever the parameter is not what it was: another
version (as autograd counts them), memory, dtype or shape; or an optimizer stepped, for fused ones count no version. A
write that nobody counts, through `.data` or NumPy, is found by samples, which the kernel compares in every call; it
then packs the weight anew.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._namespace import OPS
from ._library import define

# (N, K), any strides, or a 1x1 convolution's -> bytes in the order of the instruction set in force; no trace knows it


@define("pack_weight(Tensor weight) -> Tensor", flops=lambda *shapes, **results: 0)
def _(weight):
    raise NotImplementedError("pack_weight has no fake: what is traced reads the weights as they are")


class _Kept:
    """One parameter's copy: None, or what the parameter was when it was made, and the panels."""

    __slots__ = ("copy", "name", "owner")

    def __init__(self, owner: nn.Module, name: str, number: int):
        # of the module, not of the parameter: tensors that have a weak reference cannot be swapped
        self.owner = weakref.ref(owner, lambda owner: _drop(number, owner))
        self.name = name
        self.copy: tuple[Any, Tensor] | None = None


_all: dict[int, _Kept] = {}  # by the parameter's id: a tensor's == compares numbers


def _drop(number: int, owner: weakref.ref) -> None:
    kept = _all.get(number)
    if kept is not None and kept.owner is owner:
        del _all[number]


def _forget(weights: Iterable[Tensor]) -> None:
    for weight in weights:
        if kept := _all.get(id(weight)):
            kept.copy = None


@functools.cache
def _watch_optimizers() -> None:
    """Once, and for all of the process."""
    register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: _forget([p for group in optimizer.param_groups for p in group["params"]])
    )


def keep_packed(model: nn.Module, keep: bool = True) -> None:
    """Keep the weights of `model` packed for inference on a CPU, or no longer.

    Products read weights in an order of their own. They are brought into it in every call, so that a changed weight
    counts at once; who serves one image at a time with weights that stay may keep them in that order. From the first
    call without gradients on that takes as much memory again as the weights of focal modulation layers and of their
    blocks' MLPs (twice as much in float16, and in bfloat16 without AVX512_BF16). Weights that autocast casts are new
    in every call, and are not kept.

    In-place changes, `load_state_dict`, `.to`, optimizer steps and the like are noticed, as autograd notices that a
    saved tensor was changed. So is a write through `.data` or a NumPy array that changes all of a weight. One that
    changes a few of its numbers is NOT: call `keep_packed(model)` after it. Not kept, until asked for, are a parameter
    that takes another's place and a copy of the model; and never parameters that were made in inference mode, whose
    changes nobody counts.

    Args:
        model: any module; one of another library after `accelerate`.
        keep: False drops the copies.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"keep_packed(model): expected an nn.Module, got {type(model).__name__}")
    modules = set(model.modules())
    for number, kept in list(_all.items()):
        if kept.owner() in modules:
            _all.pop(number, None)
    if not keep:
        return
    _watch_optimizers()
    for module in modules:
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and parameter.ndim >= 2:
                _all[id(parameter)] = _Kept(module, name, id(parameter))


def packed_forward(op: str, x: Tensor, parameters: Sequence[Any], weights: Sequence[Tensor], *options) -> Tensor | None:
    """The CPU's forward of `op` by kept copies of `weights`, which its products read; None where none is kept."""
    if not _all or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    copies = [_copy_of(weight) for weight in weights]
    if all([copy is None for copy in copies]):
        return None
    y, up_to_date = getattr(OPS, f"{op}_packed")(x, list(parameters), copies, *options)
    if not up_to_date:
        _forget(weights)  # of which one was not what its copy is
    return y


def _copy_of(weight: Tensor) -> Tensor | None:
    kept = _all.get(id(weight))
    owner: Any = None if kept is None else kept.owner()
    if kept is None or owner is None or owner._parameters.get(kept.name) is not weight:
        return None
    if weight.is_inference():  # which has no version
        return None
    now = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
    copy = kept.copy
    if copy is None or copy[0] != now:
        kept.copy = copy = now, OPS.pack_weight(weight)
    return copy[1]
