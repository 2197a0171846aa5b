"""Calls of the ops as what decides over them: shapes, dtypes and devices, judged once and looked up from then on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Sizes = tuple[int, ...]
Kind = Any  # of an argument: a tensor's (shape, dtype, device), None for None, a `NoTensor` for anything else


@dataclass(eq=False)
class Call:
    """An op's arguments, checked, as dispatch sees them.

    Args:
        op: its name.
        device, dtype: of all tensors.
        channels: C.
        kernels: each level's, a size per axis; none for an op without levels; of patches, their size and stride.
        shape: (B, *spatial).
        norm_dtype: of the layer's LayerNorm; None without one.
        residual_dtype: of x and what scales a residual branch, where its body is in `dtype`; None elsewhere.
        biased: whether a level has a bias.
        channels_adjacent: whether C is the innermost axis of the maps in memory.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    channels: int
    kernels: tuple[Sizes, ...]
    shape: Sizes
    norm_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    biased: bool = False
    channels_adjacent: bool = False
    chosen: dict = field(default_factory=dict, repr=False)  # dispatch's: by backend asked for and direction

    def sizes_are_known(self) -> bool:
        """Whether none is a symbol: a graph for every size must not be bound to the first by asking for it."""
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import has_static_value

            return all([has_static_value(size) for size in self.shape])
        return all([type(size) is int for size in self.shape])


@dataclass(frozen=True)
class NoTensor:
    """The kind of what should have been a tensor."""

    name: str  # of its class


def kinds_of(tensors: Sequence[Any]) -> tuple[Kind, ...]:
    """The kind of each: what checks of arguments look at."""
    return tuple(
        [
            (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else None if t is None else NoTensor(type(t).__name__)
            for t in tensors
        ]
    )


Check = TypeVar("Check", bound=Callable)
_tables: list = []


def looked_up(check: Check) -> Check:
    """Make a function of kinds remember its last answers: to be right once is enough. What raises is not kept."""
    table = functools.lru_cache(maxsize=1024)(check)  # a server of images may see ever new shapes
    _tables.append(table)

    @functools.wraps(check)
    def look_up(*key):
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return check(*key)  # sizes are symbols or tensors there
        try:
            return table(*key)
        except TypeError:  # a symbol cannot be hashed; or it is the check's own, and comes again
            pass
        return check(*key)

    return look_up  # type: ignore[return-value]


def forget() -> None:
    """Drop all answers: for who changes what they rest on, such as tests."""
    for table in _tables:
        table.cache_clear()
