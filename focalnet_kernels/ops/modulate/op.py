"""modulate: q times the modulator, with the modulator's matrix product inside."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from ..._calls import Call
from .._autograd import needs_grad
from .._flops import linear
from .._library import define
from ..triton.launch import why_not_triton
from . import native, triton_launch
from .reference import modulate_reference

# q, ctx_all: (B, C, *spatial); weight: (C, C); bias: (C,) or None; any strides
# -> (B, C, *spatial) with q's memory order


def _flops(q, ctx_all, weight, bias, **results) -> int:
    return linear(prod(q) // q[1], *weight)


@define(
    "modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, Tensor? bias) -> Tensor",
    backends=("", "_triton", "_cuda"),
    flops=_flops,
)
def _(q, ctx_all, weight, bias):
    return torch.empty_like(q)


class ModulateFunction(torch.autograd.Function):
    @staticmethod
    def forward(fctx, backend, q, ctx_all, weight, bias):
        fctx.save_for_backward(q, ctx_all, weight, bias)
        return dispatch.implementation("modulate", backend).forward(q, ctx_all, weight, bias)

    @staticmethod
    def backward(fctx, grad_output):
        # four matrix products and a multiplication: torch does them well, and can differentiate them again
        q, ctx_all, weight, bias = fctx.saved_tensors
        needs_q, needs_ctx_all, needs_weight, needs_bias = fctx.needs_input_grad[1:]
        tokens = ctx_all.movedim(1, -1)
        grad_q = grad_ctx_all = grad_weight = grad_bias = None
        if needs_q:
            grad_q = grad_output * F.linear(tokens, weight, bias).movedim(-1, 1)
        grad_modulator = (grad_output * q).movedim(1, -1)
        if needs_ctx_all:
            grad_ctx_all = (grad_modulator @ weight).movedim(-1, 1)
        if needs_weight:
            grad_weight = grad_modulator.flatten(0, -2).mT @ tokens.flatten(0, -2)
        if needs_bias:
            grad_bias = grad_modulator.flatten(0, -2).sum(0)
        return None, grad_q, grad_ctx_all, grad_weight, grad_bias


def modulate(
    call: Call, q: Tensor, ctx_all: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None
) -> Tensor:
    """The checked op: see `focalnet_kernels.modulate`."""
    training = needs_grad((q, ctx_all, weight, bias))
    implementation = dispatch.select(call, training, backend)
    if training and implementation.backend != "reference":
        return ModulateFunction.apply(implementation.backend, q, ctx_all, weight, bias)
    return implementation.forward(q, ctx_all, weight, bias)


dispatch.register(
    "modulate",
    dispatch.Implementation("triton", why_not_triton, triton_launch.modulate_fwd),
    native.implementation("cpu"),
    native.implementation("cuda"),
    dispatch.Implementation("reference", lambda call: None, modulate_reference),
)
