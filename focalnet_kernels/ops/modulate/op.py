"""modulate: q times the modulator, with the modulator's matrix product inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from .._autograd import gradients_by_reference, needs_grad
from .._library import define
from . import native
from .reference import modulate_reference

# q, ctx_all: (B, C, *spatial); weight: (C, C); bias: (C,) or None; any strides
# -> (B, C, *spatial) with q's memory order


@define("modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, Tensor? bias) -> Tensor")
def _(q, ctx_all, weight, bias):
    return torch.empty_like(q)


class ModulateFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, q, ctx_all, weight, bias):
        fctx.save_for_backward(q, ctx_all, weight, bias)
        return dispatch.implementation("modulate", backend).forward(q, ctx_all, weight, bias)

    @staticmethod
    def backward(fctx, grad_output):
        needed = fctx.needs_input_grad[1:]
        return None, *gradients_by_reference(modulate_reference, fctx.saved_tensors, needed, grad_output)


def modulate(q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The checked op: see `focalnet_kernels.modulate`."""
    implementation = dispatch.select("modulate", q, ctx_all, weight, bias)
    if implementation.backend != "reference" and needs_grad([q, ctx_all, weight, bias]):
        return ModulateFunction.apply(implementation.backend, q, ctx_all, weight, bias)
    return implementation.forward(q, ctx_all, weight, bias)


dispatch.register(
    "modulate",
    dispatch.Implementation("cpu", native.why_not, native.modulate_fwd),
    dispatch.Implementation("reference", lambda *args: None, modulate_reference),
)
