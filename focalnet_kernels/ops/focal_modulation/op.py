"""focal_modulation: the whole layer as one op, so that an image can stay in cache from f to proj."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ... import dispatch
from ...measured import Workload
from .._autograd import gradients_by_reference, needed_only, needs_grad, needs_reference_backward
from .._flops import level_gradients, levels, linear
from .._library import define
from . import native, triton_launch
from .parameters import LayerParameters
from .reference import focal_modulation_reference

# x: (B, *spatial, C), any strides -> y: (B, *spatial, C) with x's memory order
# For backward: projected = f(x) and modulator over the N = B * prod(spatial) tokens, mean (B, C) float32 of the last
# level. Empty where `save` is false. The CPU kernels keep (N, 2C+L+1) and (N, C), the others their transposes.
_FORWARD = (
    "(Tensor x, Tensor f_weight, Tensor? f_bias, Tensor h_weight, Tensor? h_bias,"
    " Tensor proj_weight, Tensor? proj_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor[] focal_weights,"
    " bool normalize, float ln_eps, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_flops(x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, focal_weights,
                   *options, **results) -> int:  # fmt: skip
    tokens, matrices = prod(x[:-1]), (f_weight, h_weight, proj_weight)
    return sum(linear(tokens, *shape) for shape in matrices) + levels((x[0], x[-1], *x[1:-1]), focal_weights)


@define("focal_modulation_fwd" + _FORWARD, flops=_forward_flops)
def _(x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, focal_weights,
      normalize, ln_eps, save):  # fmt: skip
    B, C = x.shape[0], x.shape[-1]
    tokens = x.numel() // C if save else 0
    return (
        torch.empty_like(x),
        x.new_empty(tokens, f_weight.shape[0] if save else 0),
        x.new_empty(tokens, C if save else 0),
        x.new_empty(B if save else 0, C if save else 0, dtype=torch.float32),
    )


def _gpu_results(x, f_weight, save, new_matrix):
    """`new_matrix(x, rows, tokens)`: an empty matrix as the backend lays it out."""
    B, C = x.shape[0], x.shape[-1]
    tokens = x.numel() // C
    if not save:
        return torch.empty_like(x), x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0, 0, dtype=torch.float32)
    return (
        torch.empty_like(x),
        new_matrix(x, f_weight.shape[0], tokens),
        new_matrix(x, C, tokens),
        x.new_empty(B, C, dtype=torch.float32),
    )


@define("focal_modulation_fwd_triton" + _FORWARD, flops=_forward_flops)
def _(x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, focal_weights,
      normalize, ln_eps, save):  # fmt: skip
    return _gpu_results(x, f_weight, save, triton_launch.new_matrix)


@define("focal_modulation_fwd_cuda" + _FORWARD, flops=_forward_flops)
def _(x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, focal_weights,
      normalize, ln_eps, save):  # fmt: skip
    if native.by_tokens(x, focal_weights, ln_weight):
        return _gpu_results(x, f_weight, save, native.new_tokens)
    return _gpu_results(x, f_weight, save, torch.Tensor.new_empty)


# `needed`: bit i for input i of (x, *LayerParameters.flat()); an empty tensor for the others


def _backward_flops(grad_y, x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias,
                    focal_weights, projected, modulator, mean, normalize, eps, needed, **results) -> int:  # fmt: skip
    of = [bool(needed >> i & 1) for i in range(9)]  # x, f, f_bias, h, h_bias, proj, proj_bias, ln, ln_bias
    of_levels = needed >> 9
    to_projected = any(of[:3])
    to_ctx_all = to_projected or of_levels != 0
    to_output = to_ctx_all or any(of[3:5]) or any(of[7:])
    tokens = prod(x[:-1])
    return (
        (of[0] + of[1]) * linear(tokens, *f_weight)
        + (to_ctx_all + of[3]) * linear(tokens, *h_weight)
        + (to_output + of[5]) * linear(tokens, *proj_weight)
        + level_gradients((x[0], x[-1], *x[1:-1]), focal_weights, to_projected, of_levels)
    )


@define(
    "focal_modulation_bwd(Tensor grad_y, Tensor x, Tensor f_weight, Tensor? f_bias, Tensor h_weight, Tensor? h_bias,"
    " Tensor proj_weight, Tensor? proj_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor[] focal_weights,"
    " Tensor projected, Tensor modulator, Tensor mean, bool normalize, float ln_eps, int needed) -> Tensor[]",
    backends=("", "_triton", "_cuda"),
    flops=_backward_flops,
)
def _(grad_y, x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, focal_weights,
      projected, modulator, mean, normalize, ln_eps, needed):  # fmt: skip
    inputs = (x, f_weight, f_bias, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias, *focal_weights)
    return [torch.empty_like(t) if needed >> i & 1 else x.new_empty(0) for i, t in enumerate(inputs)]


class FocalModulationFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, normalize, ln_eps, x, *flat):
        forward = dispatch.implementation("focal_modulation", backend).forward
        y, *intermediate = forward(x, LayerParameters.from_flat(flat), normalize, ln_eps, True)
        fctx.backend, fctx.normalize, fctx.ln_eps = backend, normalize, ln_eps
        fctx.save_for_backward(*intermediate, x, *flat)
        return y

    @staticmethod
    def backward(fctx, grad_y):
        projected, modulator, mean, x, *flat = fctx.saved_tensors
        needed = fctx.needs_input_grad[3:]
        if needs_reference_backward(grad_y):

            def reference(x, *flat):
                return _reference_output(x, LayerParameters.from_flat(flat), fctx.normalize, fctx.ln_eps)

            gradients = gradients_by_reference(reference, (x, *flat), needed, grad_y)
        else:
            backward = dispatch.implementation("focal_modulation", fctx.backend).backward
            parameters = LayerParameters.from_flat(flat)
            intermediate = (projected, modulator, mean)
            gradients = backward(grad_y, x, parameters, intermediate, fctx.normalize, fctx.ln_eps, needed)
            gradients = needed_only(gradients, needed)
        return None, None, None, *gradients


def focal_modulation(
    x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float, backend: str | None = None
) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_modulation`."""
    implementation = dispatch.select("focal_modulation", x, parameters, normalize, ln_eps, backend=backend)
    if implementation.backend == "reference":
        return _reference_output(x, parameters, normalize, ln_eps)
    if needs_grad([x, *parameters.flat()]):
        return FocalModulationFunction.apply(implementation.backend, normalize, ln_eps, x, *parameters.flat())
    return implementation.forward(x, parameters, normalize, ln_eps, False)[0]


def _reference_output(x, parameters, normalize, ln_eps):
    return focal_modulation_reference(x, parameters, normalize, ln_eps)[0]


def _workload(x, parameters, normalize, ln_eps) -> Workload:
    kernels = tuple([tuple(w.shape[2:]) for w in parameters.focal_weights])
    return Workload(needs_grad([x, *parameters.flat()]), x.shape[-1], kernels, tuple(x.shape[:-1]))


dispatch.register(
    "focal_modulation",
    _workload,
    native.implementation("cpu"),
    native.implementation("cuda"),
    dispatch.Implementation(
        "triton",
        triton_launch.why_not,
        triton_launch.focal_modulation_fwd,
        triton_launch.focal_modulation_bwd,
        lambda *args: False,
    ),
    dispatch.Implementation("reference", lambda *args: None, _reference_output),
)
