"""The user's functions: their arguments are checked and follow autocast (`_prepare.py`), and go to the ops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from ._arguments import as_levels
from ._calls import Call
from ._prepare import (
    PREPARE,
    context_of,
    prepare_cross_focal_modulation,
    prepare_focal_branch,
    prepare_focal_modulation,
    prepare_levels,
    prepare_mlp_branch,
    prepare_modulate,
    prepare_patch_embed,
)
from .dispatch import Explanation, explain_call
from .ops._autograd import needs_grad
from .ops.focal_branch.parameters import FocalBranchParameters
from .ops.focal_modulation.parameters import LayerParameters
from .ops.mlp_branch.parameters import MlpBranchParameters

__all__ = [
    "cross_focal_modulation",
    "explain",
    "focal_branch",
    "focal_context",
    "focal_modulation",
    "mlp_branch",
    "modulate",
    "patch_embed",
]


def focal_context(
    ctx: Tensor,
    gates: Tensor,
    weights: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Gather context at every focal level and mix the levels by their gates (paper, section 3.2).

    With ctx_0 = ctx and ctx_l = GELU(depthwise_conv_l(ctx_{l-1})):
    ctx_all = sum_l gates_l * ctx_l + gates_{L+1} * GELU(mean(ctx_L)), over (L + 1) if `normalize`.
    GELU is the exact (erf) one; gates are used as they are.

    Args:
        ctx: (B, C, *spatial), one to three spatial axes, any strides; float64/32/16 or bfloat16.
        gates: (B, L+1, *spatial), same dtype and device.
        weights: L tensors (C, 1, *k); L = 0 is legal. A kernel of even k lies as in PyTorch's convolutions with
            padding="same": (k - 1) // 2 pixels before, k // 2 after.
        biases: (C,) or None for each level; on a GPU they are left to the reference.
        normalize: divide by L + 1 (the authors' `normalize_modulator`).
        backend: a name as in `use_backend`, for this call alone. None: the one in force.

    Returns:
        ctx_all: (B, C, *spatial), dtype of `ctx` (the autocast dtype under autocast). Kernels keep the memory order of
        `ctx`; the reference leaves it to PyTorch.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    return _of_levels(ctx, gates, as_levels("weights", weights, biases), normalize, backend)


def _of_levels(ctx: Tensor, gates: Tensor, levels: Sequence[Tensor], normalize: bool, backend: str | None) -> Tensor:
    call, (ctx, gates, *levels) = prepare_levels(ctx, gates, levels)
    return ops.focal_context(call, ctx, gates, levels, bool(normalize), backend)


def modulate(
    q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Modulate the query: q * (weight @ ctx_all + bias), the product taken over channels.

    Args:
        q: (B, C, *spatial), any strides.
        ctx_all: (B, C, *spatial), any strides; the result of `focal_context`.
        weight: (C, C), or a 1x1 convolution's (C, C, 1, ...): the paper's h.
        bias: (C,) or None.
        backend: see `focal_context`.

    Returns:
        (B, C, *spatial), dtype and, from kernels, memory order of `q`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    call, (q, ctx_all, weight, bias) = prepare_modulate(q, ctx_all, weight, bias)
    return ops.modulate(call, q, ctx_all, weight, bias, backend)


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
    focal_biases: Sequence[Tensor | None] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-5,
    normalize: bool = False,
    return_gates: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The whole focal modulation layer: y = proj(LN?(q * h(focal_context(ctx, gates)))), q, ctx, gates = f(x).

    Args:
        x: (B, *spatial, C), channels last, any strides (a permuted NCHW view as well).
        f_weight, f_bias: (2C+L+1, C) and (2C+L+1,) or None. Rows: q, ctx, gates.
        focal_weights, focal_biases: see `focal_context`.
        h_weight, h_bias: (C, C) and (C,) or None.
        proj_weight, proj_bias: (C, C) and (C,) or None.
        ln_weight, ln_bias: (C,) each, for the LayerNorm of `use_postln_in_modulation`; None without it. Both may be
            float32 beside 16 bits, which is left to the reference.
        ln_eps: its epsilon.
        normalize: divide ctx_all by L + 1.
        return_gates: also return what the authors' visualisation reads; the layer then runs part by part.
        backend: see `focal_context`.

    Returns:
        y: (B, *spatial, C), from kernels with the memory order of `x`. With `return_gates` (y, gates, modulator):
        shapes (B, *spatial, C), (B, L+1, *spatial), (B, C, *spatial).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    call, (x, *parameters) = prepare_focal_modulation(
        x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias,
        focal_biases=focal_biases, ln_weight=ln_weight, ln_bias=ln_bias,
    )  # fmt: skip
    if not return_gates:
        return ops.focal_modulation(call, x, LayerParameters(parameters), bool(normalize), float(ln_eps), backend)
    p, C = LayerParameters(parameters).as_matrices(), call.channels
    q, ctx, gates = F.linear(x, p.f_weight, p.f_bias).movedim(-1, 1).split((C, C, len(p.focal_weights) + 1), 1)
    ctx_all = _of_levels(ctx, gates, p.focal_weights, normalize, backend)
    modulator = F.linear(ctx_all.movedim(1, -1), p.h_weight, p.h_bias).movedim(-1, 1)
    return _after_modulation(q * modulator, p, ln_eps), gates, modulator


def focal_branch(
    x: Tensor,
    f_weight: Tensor,
    f_bias: Tensor | None,
    focal_weights: Sequence[Tensor],
    h_weight: Tensor,
    h_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    focal_biases: Sequence[Tensor | None] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-5,
    normalize: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    post_norm: bool = False,
    gamma: Tensor | None = None,
    drop_path: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The first branch of a block (paper, figure 2): y = x + drop_path * gamma * post_norm?(layer(pre_norm?(x))).

    Args:
        x: (B, *spatial, C), any strides.
        f_weight ... normalize: the layer's, see `focal_modulation`.
        norm_weight ... backend: see `mlp_branch`.

    The layer may have 16 bits where all else is float32; autocast casts it alone. Where no kernel has the whole branch,
    the layer still runs on the kernels that take it.

    Returns:
        (B, *spatial, C), dtype of `x`, from kernels with its memory order.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    call, x, parameters, options = _of_focal_branch(
        x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, focal_biases=focal_biases,
        ln_weight=ln_weight, ln_bias=ln_bias, norm_weight=norm_weight, norm_bias=norm_bias, gamma=gamma,
        drop_path=drop_path, ln_eps=ln_eps, normalize=normalize, norm_eps=norm_eps, post_norm=post_norm,
    )  # fmt: skip
    return ops.focal_branch(call, x, parameters, *options, backend)


def _of_focal_branch(
    x: Tensor, *layer: Any, ln_eps: float = 1e-5, normalize: bool = False, norm_eps: float = 1e-5,
    post_norm: bool = False, **tensors: Any,
) -> tuple[Call, Tensor, FocalBranchParameters, tuple[bool, float, float, bool]]:  # fmt: skip
    call, (x, *parameters) = prepare_focal_branch(x, *layer, **tensors)
    options = bool(normalize), float(ln_eps), float(norm_eps), bool(post_norm)
    return call, x, FocalBranchParameters(parameters), options


def mlp_branch(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    post_norm: bool = False,
    gamma: Tensor | None = None,
    drop_path: Tensor | None = None,
    keep_hidden: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The second branch of a block (paper, figure 2): y = x + drop_path * gamma * post_norm?(mlp(pre_norm?(x))).

    The MLP is fc2(GELU(fc1(z))) with the exact (erf) GELU.

    Args:
        x: (B, *spatial, C), one to three spatial axes, any strides.
        fc1_weight, fc1_bias: (M, C), or a 1x1 convolution's, and (M,) or None.
        fc2_weight, fc2_bias: (C, M), or a 1x1 convolution's, and (C,) or None.
        norm_weight, norm_bias: (C,) each, of a LayerNorm; None without it. Both may be float32 beside 16 bits.
        norm_eps: its epsilon.
        post_norm: the norm follows the MLP.
        gamma: (C,), the layer scale; None without it.
        drop_path: (B,), a factor per sample: 0 where the branch is dropped, otherwise 1 / (1 - rate); None without it.
            No gradient is made of it.
        keep_hidden: keep fc1's result, M values per token, for a faster backward; otherwise it is made again from x,
            which is all that is kept.
        backend: see `focal_context`.

    The linear layers may have 16 bits where all else is float32; autocast casts them alone.

    Returns:
        (B, *spatial, C), dtype of `x`, from kernels with its memory order.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    call, x, parameters, options = _of_mlp_branch(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight=norm_weight, norm_bias=norm_bias, gamma=gamma,
        drop_path=drop_path, norm_eps=norm_eps, post_norm=post_norm, keep_hidden=keep_hidden,
    )  # fmt: skip
    return ops.mlp_branch(call, x, parameters, *options, backend)


def _of_mlp_branch(
    x: Tensor, *mlp: Any, norm_eps: float = 1e-5, post_norm: bool = False, keep_hidden: bool = False,
    **tensors: Tensor | None,
) -> tuple[Call, Tensor, MlpBranchParameters, tuple[float, bool, bool]]:  # fmt: skip
    call, (x, *parameters) = prepare_mlp_branch(x, *mlp, **tensors)
    return call, x, MlpBranchParameters(parameters), (float(norm_eps), bool(post_norm), bool(keep_hidden))


def focal_block(
    x: Tensor, focal: tuple[tuple, dict[str, Any]], mlp: tuple[tuple, dict[str, Any]], *, backend: str | None = None
) -> Tensor:
    """A block (paper, figure 2): `mlp_branch` of `focal_branch` of x, in inference on a GPU with one launch less.

    Args:
        x: (B, *spatial, C), any strides.
        focal: the positional and the named arguments of `focal_branch` after x, without `backend`.
        mlp: the same of `mlp_branch`.
        backend: see `focal_context`.

    Returns, raises:
        What the two do.
    """
    call, x, parameters, options = _of_focal_branch(x, *focal[0], **focal[1])
    mlp_call, _, mlp_parameters, mlp_options = _of_mlp_branch(x, *mlp[0], **mlp[1])
    return ops.focal_block((call, mlp_call), x, parameters, mlp_parameters, options, mlp_options, backend)


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Cut an image, or a stage's map, into patches (paper, section 3.3): norm?(conv(x)), channels last.

    "cpu" has a kernel for it; "triton" and "cuda" have none. Where gradients will be asked for it is PyTorch's
    convolution on every backend.

    Args:
        x: (B, C, *spatial), one to three spatial axes, any strides.
        weight, bias: (N, C, *k), a convolution's, and (N,) or None.
        stride, padding: the convolution's, one number or one per axis; zeros are padded on both sides.
        norm_weight, norm_bias: (N,) each, of a LayerNorm over the channels of each patch; None without it.
        norm_eps: its epsilon.
        backend: see `focal_context`.

    Returns:
        (B, *grid, N), contiguous, with grid = (spatial + 2 padding - k) // stride + 1; dtype of `x` (autocast's under
        autocast).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a map that holds no patch; the
            message names it.
    """
    call, (*tensors, steps, zeros) = prepare_patch_embed(
        x, weight, bias, stride=stride, padding=padding, norm_weight=norm_weight, norm_bias=norm_bias
    )
    return ops.patch_embed(call, tuple(tensors), (steps, zeros, float(norm_eps)), backend)


def cross_focal_modulation(
    x: Tensor,
    target: Tensor,
    f_weight: Tensor,
    f_bias: Tensor | None,
    focal_weights: Sequence[Tensor],
    h_weight: Tensor,
    h_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    focal_biases: Sequence[Tensor | None] | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-5,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Focal modulation of one map by the context of another: q = f_q(x), and ctx, gates = f_ctx(target).

    y = proj(LN?(q * h(resample(focal_context(ctx, gates))))). With target = x it is `focal_modulation`.

    Levels and gates stay at the target's size; only their sum ctx_all is brought to the query's, by (bi-, tri-)linear
    interpolation with align_corners=False. Before it, a kernel would cover another part of the scene and a gate weigh
    another pixel than the one it was computed from; after h nothing would change, as h acts on each pixel alone and
    the weights of an interpolation sum to 1. Reduction does not smooth first: at more than a factor of 2 pixels of
    the target fall between the samples, though each sample still sees its receptive field.

    Args:
        x: (B, *spatial, C), the query; any strides.
        target: (B, *target_spatial, C), as many spatial axes, at least one pixel; any strides.
        f_weight, f_bias: (2C+L+1, C) and (2C+L+1,) or None. Rows: q (of x), ctx, gates (of the target).
        focal_weights ... backend: see `focal_modulation`.

    Returns:
        (B, *spatial, C), dtype of `x` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    x, target, p = prepare_cross_focal_modulation(
        x, target, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias,
        focal_biases=focal_biases, ln_weight=ln_weight, ln_bias=ln_bias,
    )  # fmt: skip
    C, spatial = x.shape[-1], x.shape[1:-1]
    q = F.linear(x, p.f_weight[:C], None if p.f_bias is None else p.f_bias[:C]).movedim(-1, 1)
    ctx_all = _of_levels(*context_of(target, p), p.focal_weights, normalize, backend)
    y = modulate(q, resample(ctx_all, spatial), p.h_weight, p.h_bias, backend=backend)
    return _after_modulation(y, p, ln_eps)


def _after_modulation(y: Tensor, p: LayerParameters, ln_eps: float) -> Tensor:
    """proj(LN?(y)) of q * modulator (B, C, *spatial), channels last."""
    y = y.movedim(1, -1)
    if p.ln_weight is not None:
        y = F.layer_norm(y, (y.shape[-1],), p.ln_weight, p.ln_bias, ln_eps)
    return F.linear(y, p.proj_weight, p.proj_bias)


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resample(ctx_all: Tensor, spatial: Sequence[int]) -> Tensor:
    """(B, C, *target_spatial) -> (B, C, *spatial), as `cross_focal_modulation` brings the target's to the query's."""
    if ctx_all.shape[2:] == tuple(spatial):
        return ctx_all
    return F.interpolate(ctx_all, size=tuple(spatial), mode=_LINEAR[len(spatial)], align_corners=False)


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `op` for these tensors, and for each other backend the reason why not.

    Args:
        op: `focal_context`, `modulate`, `focal_modulation`, `cross_focal_modulation`, `focal_branch`, `mlp_branch`
            or `patch_embed` (the function or its name), or a module such as `FocalModulation`. Of the cross form the
            answer is for its `focal_context`. A module that must call an inner module, one with hooks, say, names it
            and runs part by part.
        *args, **kwargs: what it would be called with.

    Returns:
        An `Explanation`: `.backend`, `.reasons` by backend; printing it shows both.

    Raises:
        TypeError: `op` is none of these, or cannot be called so; and what the call itself would raise.
    """
    if isinstance(op, torch.nn.Module) and hasattr(op, "functional_arguments"):
        layer: Any = op
        args, kwargs = _bound(layer.forward, type(layer).__name__, args, kwargs).args, {}
        args = args[: len(inspect.signature(layer.functional_arguments).parameters)]  # the inputs, without options
        reason = layer.why_by_parts()
        if reason is not None:
            kernels = dict.fromkeys(("cpu", "triton", "cuda"), f"the layer runs part by part: {reason}")
            return Explanation(layer.functional.__name__, "reference", kernels)
        args, kwargs = layer.functional_arguments(*args)
        op = layer.functional
    name = getattr(op, "__name__", op)
    if name not in PREPARE:
        raise TypeError(f"explain(op): expected {', '.join(PREPARE)} or a focal modulation module, got {op!r}")
    _bound(globals()[name], name, args, kwargs)
    backend = kwargs.pop("backend", None)
    for option in ("normalize", "ln_eps", "return_gates", "norm_eps", "post_norm"):
        kwargs.pop(option, None)
    call, tensors = PREPARE[name](*args, **kwargs)
    return explain_call(call, needs_grad([t for t in tensors if isinstance(t, Tensor)]), backend)


def _bound(function: Callable, name: str, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """The arguments of a call; a TypeError of explain's where `function` does not take them."""
    signature = inspect.signature(function)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        inputs = ", ".join(signature.parameters)
        raise TypeError(f"explain(op, ...): expected what {name}({inputs}) is called with: {error}") from None
