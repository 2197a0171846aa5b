"""focal_modulation: the whole layer as one op, so that an image can stay in cache from f to proj."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from .._autograd import gradients_by_reference, needs_grad
from .._library import define
from . import native
from .parameters import LayerParameters
from .reference import focal_modulation_reference

# x: (B, *spatial, C), any strides -> y: (B, *spatial, C) with x's memory order
# For backward: projected (N, 2C+L+1) = f(x) and modulator (N, C) over the N = B * prod(spatial) tokens,
# mean (B, C) float32 of the last level. Empty where `save` is false.


@define(
    "focal_modulation_fwd(Tensor x, Tensor f_weight, Tensor? f_bias, Tensor h_weight, Tensor? h_bias,"
    " Tensor proj_weight, Tensor? proj_bias, Tensor? ln_weight, Tensor? ln_bias, Tensor[] focal_weights,"
    " bool normalize, float ln_eps, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)
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


class FocalModulationFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, normalize, ln_eps, x, *flat):
        implementation = dispatch.implementation("focal_modulation", backend)
        y = implementation.forward(x, LayerParameters.from_flat(flat), normalize, ln_eps)
        fctx.normalize, fctx.ln_eps = normalize, ln_eps
        fctx.save_for_backward(x, *flat)
        return y

    @staticmethod
    def backward(fctx, grad_y):
        def reference(x, *flat):
            parameters = LayerParameters.from_flat(flat)
            return focal_modulation_reference(x, parameters, fctx.normalize, fctx.ln_eps)[0]

        needed = fctx.needs_input_grad[3:]
        return None, None, None, *gradients_by_reference(reference, fctx.saved_tensors, needed, grad_y)


def focal_modulation(x: Tensor, parameters: LayerParameters, normalize: bool, ln_eps: float) -> Tensor:
    """The checked op: see `focalnet_kernels.focal_modulation`."""
    implementation = dispatch.select("focal_modulation", x, parameters, normalize, ln_eps)
    if implementation.backend != "reference" and needs_grad([x, *parameters.flat()]):
        return FocalModulationFunction.apply(implementation.backend, normalize, ln_eps, x, *parameters.flat())
    return implementation.forward(x, parameters, normalize, ln_eps)


def _reference_output(x, parameters, normalize, ln_eps):
    return focal_modulation_reference(x, parameters, normalize, ln_eps)[0]


dispatch.register(
    "focal_modulation",
    dispatch.Implementation("cpu", native.why_not, native.focal_modulation_fwd),
    dispatch.Implementation("reference", lambda *args: None, _reference_output),
)
