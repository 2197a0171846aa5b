"""What one call of a provider is: an inference, a backward, or both passes of a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .providers import Subject
from .timing import Prepared

MODES = ("forward", "backward", "forward+backward")


def calls(subject: Subject, mode: str) -> Callable[[], object] | Prepared:
    """What there is to time.

    "forward" is inference. The others fill the gradients of all leaves anew, as a training step does, from the same
    gradient of the output for every provider; the optimizer's step and the loss are nobody's and are left out.
    """
    training = mode != "forward"
    if subject.module is not None:
        subject.module.train(training)
    for leaf in subject.leaves().values():
        leaf.requires_grad_(training)
    if not training:

        def forward():
            with torch.inference_mode():
                subject()

        return forward
    grad_output = None

    def start() -> Tensor:
        subject.forget_gradients()
        return subject()

    def finish(y: Tensor) -> None:
        nonlocal grad_output
        if grad_output is None:  # while warming up: the shape is known only now
            grad_output = _grad_output(subject, y)
        y.backward(grad_output)

    return Prepared(start, finish) if mode == "backward" else lambda: finish(start())


def results(subject: Subject) -> dict[str, Tensor]:
    """The output and every gradient of a training step, by the authors' name, in the case's axes."""
    if subject.infers_alone:
        with torch.inference_mode():
            return {"output": subject.canonical(subject()).clone()}
    step = calls(subject, "backward")
    y = step.prepare()
    found = {"output": subject.canonical(y.detach()).clone()}
    step.call(y)
    for name, leaf in subject.leaves().items():
        if name in subject.inputs:
            found[f"grad {name}"] = subject.canonical(leaf.grad).clone()
        else:
            found[f"grad {subject.authors_name(name)}"] = leaf.grad.clone()
    subject.forget_gradients()
    return found


def _grad_output(subject: Subject, y: Tensor) -> Tensor:
    """Of y's shape and strides."""
    drawn = torch.randn(subject.canonical(y).shape, generator=torch.Generator().manual_seed(2)).to(y)
    return torch.empty_like(y).copy_(drawn.movedim(-1, 1) if subject.channels_first else drawn)
