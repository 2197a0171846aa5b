"""The user's functions: they check arguments, follow autocast, and hand over to the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .dispatch import Explanation, explain_call
from .ops.focal_modulation.parameters import LayerParameters
from .ops.focal_modulation.reference import focal_modulation_reference

__all__ = ["explain", "focal_context", "focal_modulation", "modulate"]


def focal_context(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], *, normalize: bool = False) -> Tensor:
    """Gather context at every focal level and mix the levels by their gates (paper, section 3.2).

    With ctx_0 = ctx and ctx_l = GELU(depthwise_conv_l(ctx_{l-1})):
    ctx_all = sum_l gates_l * ctx_l + gates_{L+1} * GELU(mean(ctx_L)), over (L + 1) if `normalize`.
    GELU is the exact (erf) one; gates are used as they are.

    Args:
        ctx: (B, C, *spatial), one to three spatial axes, any strides; float64/32/16 or bfloat16.
        gates: (B, L+1, *spatial), same dtype and device.
        weights: L tensors (C, 1, *k) with odd k; L = 0 is legal.
        normalize: divide by L + 1 (the authors' `normalize_modulator`).

    Returns:
        ctx_all: (B, C, *spatial), dtype of `ctx` (the autocast dtype under autocast). Kernels keep the memory order of
        `ctx`; the reference leaves it to PyTorch.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    return ops.focal_context(*_prepare_focal_context(ctx, gates, weights, normalize=normalize))


def modulate(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Modulate the query: q * (weight @ ctx_all + bias), the product taken over channels.

    Args:
        q: (B, C, *spatial), any strides.
        ctx_all: (B, C, *spatial), any strides; the result of `focal_context`.
        weight: (C, C), or a 1x1 convolution's (C, C, 1, ...): the paper's h.
        bias: (C,) or None.

    Returns:
        (B, C, *spatial), dtype and, from kernels, memory order of `q`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    return ops.modulate(*_prepare_modulate(q, ctx_all, weight, bias))


def focal_modulation(
    x: Tensor,
    f_weight: Tensor,
    f_bias: Tensor | None,
    focal_weights: Sequence[Tensor],
    h_weight: Tensor,
    h_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-5,
    normalize: bool = False,
    return_gates: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The whole focal modulation layer: y = proj(LN?(q * h(focal_context(ctx, gates)))), q, ctx, gates = f(x).

    Args:
        x: (B, *spatial, C), channels last, any strides (a permuted NCHW view as well).
        f_weight, f_bias: (2C+L+1, C) and (2C+L+1,) or None. Rows: q, ctx, gates.
        focal_weights: L tensors (C, 1, *k), odd k.
        h_weight, h_bias: (C, C) and (C,) or None.
        proj_weight, proj_bias: (C, C) and (C,) or None.
        ln_weight, ln_bias: (C,) each, for the LayerNorm of `use_postln_in_modulation`; None without it.
        ln_eps: its epsilon.
        normalize: divide ctx_all by L + 1.
        return_gates: also return what the authors' visualisation reads; the layer then runs part by part.

    Returns:
        y: (B, *spatial, C), from kernels with the memory order of `x`. With `return_gates` (y, gates, modulator):
        shapes (B, *spatial, C), (B, L+1, *spatial), (B, C, *spatial).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    arguments = _prepare_focal_modulation(
        x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias,
        ln_weight=ln_weight, ln_bias=ln_bias, ln_eps=ln_eps, normalize=normalize,
    )  # fmt: skip
    if return_gates:
        return focal_modulation_reference(*arguments, focal_context=ops.focal_context)
    return ops.focal_modulation(*arguments)


def explain(op, *args, **kwargs) -> Explanation:
    """Which backend would run `op` for these tensors, and for each other backend the reason why not.

    Args:
        op: `focal_context`, `modulate` or `focal_modulation` (the function or its name), or a module such as
            `FocalModulation`.
        *args, **kwargs: what it would be called with.

    Returns:
        An `Explanation`: `.backend`, `.reasons` by backend; printing it shows both.

    Raises:
        TypeError: `op` is none of these.
    """
    if isinstance(op, torch.nn.Module) and hasattr(op, "functional_arguments"):
        (x,) = args
        return explain("focal_modulation", *op.functional_arguments(x)[0], **op.functional_arguments(x)[1])
    name = getattr(op, "__name__", op)
    if name not in _PREPARE:
        raise TypeError(f"explain(op): expected {', '.join(_PREPARE)} or a focal modulation module, got {op!r}")
    return explain_call(name, *_PREPARE[name](*args, **kwargs))


def _prepare_focal_context(ctx, gates, weights, *, normalize=False):
    _check_map("ctx", ctx)
    weights = _levels("weights", weights, ctx.shape[1], ctx.ndim - 2)
    expected = (ctx.shape[0], len(weights) + 1, *ctx.shape[2:])
    _check_shape("gates", gates, expected, f"(B, L+1, *spatial) for L = {len(weights)} weights")
    ctx, gates, *weights = _same_kind((ctx, gates, *weights), ("ctx", "gates"), "weights")
    return ctx, gates, tuple(weights), bool(normalize)


def _prepare_modulate(q, ctx_all, weight, bias=None):
    _check_map("q", q)
    _check_shape("ctx_all", ctx_all, tuple(q.shape), "q's shape")
    C = q.shape[1]
    weight = _matrix("weight", weight, C, C)
    _check_shape("bias", bias, (C,), "(C,)", optional=True)
    return tuple(_same_kind((q, ctx_all, weight, bias), ("q", "ctx_all", "weight", "bias")))


_LAYER = ("x", "f_weight", "f_bias", "h_weight", "h_bias", "proj_weight", "proj_bias", "ln_weight", "ln_bias")


def _prepare_focal_modulation(
    x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, *,
    ln_weight=None, ln_bias=None, ln_eps=1e-5, normalize=False, return_gates=False,
):  # fmt: skip
    _check_map("x", x, layout="(B, *spatial, C)")
    C = x.shape[-1]
    focal_weights = _levels("focal_weights", focal_weights, C, x.ndim - 2)
    f_out = 2 * C + len(focal_weights) + 1
    f_weight = _matrix("f_weight", f_weight, f_out, C)
    h_weight = _matrix("h_weight", h_weight, C, C)
    proj_weight = _matrix("proj_weight", proj_weight, C, C)
    _check_shape("f_bias", f_bias, (f_out,), "(2C+L+1,)", optional=True)
    _check_shape("h_bias", h_bias, (C,), "(C,)", optional=True)
    _check_shape("proj_bias", proj_bias, (C,), "(C,)", optional=True)
    _check_shape("ln_weight", ln_weight, (C,), "(C,)", optional=True)
    _check_shape("ln_bias", ln_bias, (C,), "(C,)", optional=True)
    if (ln_weight is None) != (ln_bias is None):
        raise ValueError("ln_weight, ln_bias: give both or neither")
    tensors = (x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, *focal_weights)
    x, *flat = _same_kind(tensors, _LAYER, "focal_weights")
    return x, LayerParameters.from_flat(flat), bool(normalize), float(ln_eps)


_PREPARE = {
    "focal_context": _prepare_focal_context,
    "modulate": _prepare_modulate,
    "focal_modulation": _prepare_focal_modulation,
}


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_tensor(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_map(name: str, tensor, layout: str = "(B, C, *spatial)") -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}")
    if not 3 <= tensor.ndim <= 5:
        raise ValueError(f"{name}: expected {layout} with one to three spatial axes, got shape {tuple(tensor.shape)}")


def _check_shape(name: str, tensor, expected: tuple, meaning: str, optional: bool = False) -> None:
    if optional and tensor is None:
        return
    _check_tensor(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} = {meaning}, got {tuple(tensor.shape)}")


def _levels(name: str, weights, C: int, ndim: int) -> tuple[Tensor, ...]:
    try:
        weights = tuple(weights)
    except TypeError:
        got = type(weights).__name__
        raise TypeError(f"{name}: expected a sequence with one tensor per level, got {got}") from None
    for i, weight in enumerate(weights):  # messages are made where they are needed: this runs in every call
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(weight).__name__}")
        shape = tuple(weight.shape)
        if len(shape) != ndim + 2 or shape[:2] != (C, 1):
            raise ValueError(f"{name}[{i}]: expected shape ({C}, 1, {', '.join('k' * ndim)}) = (C, 1, *k), got {shape}")
        for k in shape[2:]:
            if k % 2 == 0:
                raise ValueError(
                    f"{name}[{i}]: expected odd kernel sizes, got {shape[2:]} (an even one would change the map's size)"
                )
    return weights


def _matrix(name: str, weight, rows: int, columns: int) -> Tensor:
    """A Linear's weight, or a 1x1 convolution's with its ones dropped."""
    _check_tensor(name, weight)
    shape = tuple(weight.shape)
    if shape[:2] != (rows, columns) or any(n != 1 for n in shape[2:]):
        raise ValueError(f"{name}: expected shape ({rows}, {columns}) or a 1x1 convolution's, got {shape}")
    return weight.flatten(1) if weight.ndim > 2 else weight


def _same_kind(tensors: Sequence[Tensor | None], names: tuple[str, ...], levels: str = "") -> Sequence[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on; otherwise checked to share one dtype and device.

    `names` of the first tensors; the others are the list called `levels`.
    """
    device = tensors[0].device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    dtype = tensors[0].dtype
    for i, tensor in enumerate(tensors):
        if tensor is None or (tensor.dtype == dtype and tensor.device == device):
            continue
        name = names[i] if i < len(names) else f"{levels}[{i - len(names)}]"
        if tensor.device != device:
            raise ValueError(f"{name}: expected {names[0]}'s device {device}, got {tensor.device}")
        raise TypeError(f"{name}: expected {names[0]}'s dtype {dtype}, got {tensor.dtype}")
    return tensors
