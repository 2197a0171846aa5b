"""What the ops' autograd.Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable_backward() -> bool:
    """Inside a backward: whether its result must itself be differentiable (create_graph=True).

    Grad mode says so. torch.compile traces backwards for one use only.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_by_reference(
    reference: Callable, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """The differentiable gradients of `reference(*inputs)`, None where not needed: every backend's double backward."""
    with torch.enable_grad():
        output = reference(*inputs)
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(found) if n else None for n in needed]


def bit_mask(needed: Sequence[bool]) -> int:
    """`needs_input_grad` as the raw ops take it: bit i for input i."""
    return sum(1 << i for i, n in enumerate(needed) if n)


def needed_only(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The raw ops return an empty tensor where no gradient was asked for; autograd wants None."""
    return [g if n else None for g, n in zip(gradients, needed, strict=True)]
