"""focal_branch through the C++ kernels (csrc/cpu, focal_modulation*)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...dispatch import Implementation
from .._native import raw_op, why_not_native


def focal_branch_fwd(backend, x, parameters, normalize, ln_eps, norm_eps, post, save) -> tuple[Tensor, list[Tensor]]:
    return raw_op("focal_branch_fwd", backend)(x, list(parameters), normalize, ln_eps, norm_eps, post, save)


def focal_branch_bwd(backend, grad_y, x, parameters, saved, normalize, ln_eps, norm_eps, post, needed) -> list[Tensor]:
    raw = raw_op("focal_branch_bwd", backend)
    return raw(grad_y, x, list(parameters), list(saved), normalize, ln_eps, norm_eps, post, needed)


def implementation(backend: str) -> Implementation:
    """ "cpu"'s."""
    return Implementation(
        backend,
        partial(why_not_native, backend),
        partial(focal_branch_fwd, backend),
        partial(focal_branch_bwd, backend),
    )
