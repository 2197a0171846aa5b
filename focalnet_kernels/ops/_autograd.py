"""What the ops' autograd.Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._calls import Call

# a batch under vmap: PyTorch's two kinds of it
_BATCHED = tuple(torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched"))


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of these tensors."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def needs_reference_backward(grad_output: Tensor) -> bool:
    """Inside a backward: whether PyTorch must see into it.

    So it must where the result is itself differentiable (create_graph=True), as grad mode says, and where
    `grad_output` is a batch under vmap (is_grads_batched=True, jacobian(vectorize=True)). torch.compile traces
    backwards for one plain use only.
    """
    if torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_keys(grad_output)
    return torch.is_grad_enabled() or any(keys.has(key) for key in _BATCHED)


def gradients_by_reference(
    reference: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """The gradients of `reference(*inputs)`, None where not needed: every backend's double and batched backward.

    Differentiable themselves where grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        output = reference(*inputs)
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return [next(found) if n else None for n in needed]


def bit_mask(needed: Sequence[bool]) -> int:
    """`needs_input_grad` as the raw ops take it: bit i for input i."""
    return sum(1 << i for i, n in enumerate(needed) if n)


def needed_only(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The raw ops return an empty tensor where no gradient was asked for; autograd wants None."""
    return [g if n else None for g, n in zip(gradients, needed, strict=True)]


class OpFunction(torch.autograd.Function):
    """The autograd of an op of `x` and a flat tuple of parameters. What a forward saves is for its own backward."""

    @staticmethod
    def forward(fctx, op: str, backend: str, options: tuple, x, *parameters):
        y, saved = dispatch.implementation(op, backend).forward(x, parameters, *options, True)
        fctx.op, fctx.backend, fctx.options, fctx.n_saved = op, backend, options, len(saved)
        fctx.save_for_backward(*saved, x, *parameters)
        return y

    @staticmethod
    def backward(fctx, grad_y):
        n, tensors = fctx.n_saved, fctx.saved_tensors
        saved, x, parameters = tensors[:n], tensors[n], tensors[n + 1 :]
        needed = fctx.needs_input_grad[3:]
        if needs_reference_backward(grad_y):
            reference = dispatch.implementation(fctx.op, "reference").forward

            def function(x, *parameters):
                return reference(x, parameters, *fctx.options)

            gradients = gradients_by_reference(function, (x, *parameters), needed, grad_y)
        else:
            backward: Any = dispatch.implementation(fctx.op, fctx.backend).backward
            gradients = backward(grad_y, x, parameters, saved, *fctx.options, bit_mask(needed))
            gradients = needed_only(gradients, needed)
        return None, None, None, *gradients


def run(call: Call, x: Tensor, parameters: Any, options: tuple, backend: str | None) -> Tensor:
    """An op of `x` and a flat tuple of parameters by the implementation that dispatch chooses.

    Args:
        parameters: of a class with `as_matrices`.
        options: the op's further arguments.
    """
    training = needs_grad((x, *parameters))
    implementation = dispatch.select(call, training, backend)
    if implementation.backend == "reference":
        return implementation.forward(x, parameters, *options)
    if implementation.backend != "cpu":  # whose kernels take a 1x1 convolution's weight as it is
        parameters = parameters.as_matrices()
    if training:
        return OpFunction.apply(call.op, implementation.backend, options, x, *parameters)
    return implementation.forward(x, parameters, *options, False)[0]
