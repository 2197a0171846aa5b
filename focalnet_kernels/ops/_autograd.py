"""Gradients by running an op's reference again: for ops without a backward kernel, and for double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gradients_by_reference(
    reference: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """The gradients of `reference(*inputs)` for the inputs that are `needed`, None for the others.

    Called inside a backward. Under create_graph (then grad mode is on) the result is itself differentiable, which
    is what gives every backend its double backward.
    """
    differentiable = torch.is_grad_enabled()
    if not differentiable:
        inputs = [
            t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)
        ]
    with torch.enable_grad():
        output = reference(*inputs)
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=differentiable))
    return [next(found) if n else None for n in needed]
