"""Warnings that a process says once."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Say a thing once per process: a fallback must be heard, not repeated."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# torch.compile calls it while it traces, where it can say something, instead of giving up the graph
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch.compiler.assume_constant_result sets, without importing dynamo
