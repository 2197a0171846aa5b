"""Tile sizes of the chain kernels, and the scratch memory that goes with them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..._calls import Call
from ..triton.geometry import padded_size
from ..triton.launch import cdiv, multiprocessors, next_power_of_2

Kernel = tuple[int, int, int]  # a level's taps along (T, M, W)


class Tile(NamedTuple):
    """What a program works on at once: `segments` of 8 columns, each over `rows` rows, of `channels` channels; its
    warps, and the registers of a thread at most."""

    channels: int
    segments: int
    rows: int
    warps: int
    registers: int


class Match(NamedTuple):
    """The calls that a line of `_TENSOR_CORES` is for. `dtype`: None for both; the others: at most."""

    backward: bool
    dtype: torch.dtype | None
    widest: int
    levels: int


# The tensor-core form: the first line that fits counts. None spills registers under Triton 3.6 or 3.9 on sm_80, sm_90,
# or sm_100 (`check --compile`); without a limit the compiler spills for the sake of one more program on a
# multiprocessor. What depends on channels and map is computed below; nothing measured yet tells capabilities apart.
_TENSOR_CORES = {
    # erf wants more registers than bfloat16's GELU
    Match(False, torch.float16, 7, 3): Tile(channels=4, segments=16, rows=4, warps=4, registers=192),
    Match(False, None, 7, 3): Tile(channels=4, segments=16, rows=4, warps=4, registers=168),
    Match(False, None, 13, 99): Tile(channels=4, segments=16, rows=2, warps=4, registers=168),
    # 4 rows spill up to 24 bytes under Triton 3.6
    Match(True, None, 7, 3): Tile(channels=4, segments=16, rows=2, warps=4, registers=255),
    Match(True, None, 13, 99): Tile(channels=4, segments=16, rows=1, warps=4, registers=255),
}
_TAPS = {  # the form tap by tap, by `backward`
    False: Tile(channels=4, segments=32, rows=1, warps=4, registers=168),  # 128 spill under Triton 3.6 on sm_80
    True: Tile(channels=4, segments=16, rows=1, warps=4, registers=255),
}
_taps = dict(_TAPS)
_SLOTS_PER_MULTIPROCESSOR = {False: 3, True: 2}  # forward, backward: as many programs as registers let run at once
_LARGEST_SCRATCH = 2**27  # elements
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)  # float32 would lose digits there


@contextlib.contextmanager
def tap_tiles(channels: int | None = None, segments: int | None = None) -> Iterator[None]:
    """The form tap by tap in tiles of these sizes meanwhile; None: in its own. An interpreter takes its time for every
    tile, whatever its size."""
    before = dict(_taps)
    for backward, tile in _TAPS.items():
        _taps[backward] = tile._replace(channels=channels or tile.channels, segments=segments or tile.segments)
    try:
        yield
    finally:
        _taps.update(before)


@dataclass(frozen=True)
class Plan:
    """How one direction of focal_context is cut into programs. See triton_chain.py for the names."""

    kernels: tuple[Kernel, ...]
    window: int
    tile: Tile
    images: int  # G
    strips: int
    strip_rows: int
    top: int
    mid_pad: int  # RM
    left_pad: int
    right_pad: int
    plane_size: int
    tasks: int
    slots: int
    slot_size: int
    blocks_per_task: int
    pixels: int

    def arguments(self) -> tuple[int, ...]:
        """The kernels' run-time arguments."""
        return self.tasks, self.strips, self.strip_rows, self.top, self.plane_size, self.images

    @functools.cached_property
    def constants(self) -> dict:
        """The kernels' compile-time arguments."""
        return {
            "KERNELS": self.kernels, "PADDING": (self.left_pad, self.right_pad, self.mid_pad), "PIXELS": self.pixels,
            "TILE": (self.tile.channels, self.tile.segments, self.tile.rows, self.window),
            "num_warps": self.tile.warps, "num_stages": 1, "maxnreg": self.tile.registers,
        }  # fmt: skip


def why_too_large(call: Call) -> str | None:
    """Why 32-bit offsets within one image's planes, or counts of pixels, cannot hold; None where they can."""
    B, (T, M, W), kernels = call.shape[0], padded_size(call.shape[1:]), [padded_size(k) for k in call.kernels]
    images = max(1, 64 // max(1, cdiv(T, 4) * M * cdiv(W, 8)))  # in a program, at most
    rows = T + 8 + 2 * sum(k[0] for k in kernels)
    plane = rows * (M + max((k[1] for k in kernels), default=0)) * (W + 64 + max((k[2] for k in kernels), default=0))
    # a program's tokens may begin where the last one's end, and must not wrap around either
    if plane * 8 * max(1, len(kernels)) * images >= 2**31 or B * T * M * W >= 2**31 - 2**20:
        return f"maps of {T * M * W} pixels in a batch of {B} are too large for its 32-bit offsets"
    return None


def make_plan(
    B: int, C: int, size: tuple[int, int, int], kernels: tuple[Kernel, ...], dtype: torch.dtype,
    device: torch.device, backward: bool = False, whole: bool = False,
) -> Plan:  # fmt: skip
    """The plan for ctx (B, C, *size) on that device. `whole`: no strips, however few the tasks."""
    return _plan(B, C, size, kernels, dtype, multiprocessors(device), backward, whole, _taps[backward])


@functools.lru_cache(maxsize=1024)
def _plan(
    B: int, C: int, size: tuple[int, int, int], kernels: tuple[Kernel, ...], dtype: torch.dtype, processors: int,
    backward: bool, whole: bool, taps: Tile,
) -> Plan:  # fmt: skip
    window, tile = _choose_tile(size, kernels, dtype, backward, taps)
    left_pad, right_pad, mid_pad = _choose_padding(window, kernels)
    T, M, W = size
    per_image = cdiv(T, tile.rows) * M * cdiv(W, 8)  # segments of an image
    images = min(next_power_of_2(max(1, tile.segments // max(1, per_image))), next_power_of_2(max(1, B)))
    tasks = cdiv(B, images) * cdiv(C, tile.channels)
    halo = sum(k[0] // 2 for k in kernels) * (2 if backward else 1)
    cut = images == 1 and 0 < tasks < 2 * processors and not whole
    strips, strip_rows = _choose_strips(T, tile.rows, halo, cdiv(2 * processors, tasks)) if cut else (1, max(1, T))
    top = halo if strips > 1 else max((k[0] // 2 for k in kernels), default=0)
    # a row of slack above the first and below the last tile, for windows that start before or end after their row
    columns = cdiv(W, 8) * 8 + left_pad + right_pad
    plane_size = cdiv((strip_rows + 2 * top + tile.rows + 1) * (M + 2 * mid_pad) * columns, 16) * 16
    planes = max(1, 2 * len(kernels)) if backward else len(kernels) + 1
    slot_size = planes * images * tile.channels * plane_size
    work = _choose_slots(cdiv(B, images) * strips, cdiv(C, tile.channels), processors, slot_size, backward)
    return Plan(
        kernels=kernels, window=window, tile=tile, images=images, strips=strips, strip_rows=strip_rows, top=top,
        mid_pad=mid_pad, left_pad=left_pad, right_pad=right_pad, plane_size=plane_size, tasks=work.tasks,
        slots=work.slots, slot_size=slot_size, blocks_per_task=work.blocks_per_task, pixels=128 if backward else 256,
    )  # fmt: skip


def _choose_tile(
    size: tuple[int, int, int], kernels: Sequence[Kernel], dtype: torch.dtype, backward: bool, taps: Tile
) -> tuple[int, Tile]:
    """The window of inputs behind 8 outputs (0: tap by tap), and the tile. `taps`: of the form tap by tap."""
    T, M, _ = size
    widest = max((k[2] for k in kernels), default=1)
    if dtype not in TENSOR_CORE_DTYPES or M != 1 or widest > 13 or any(k[1] != 1 for k in kernels):
        return 0, taps
    tile = next(
        tile
        for match, tile in _TENSOR_CORES.items()
        if match.backward == backward
        and match.dtype in (None, dtype)
        and widest <= match.widest
        and len(kernels) <= match.levels
    )
    rows = min(tile.rows, next_power_of_2(T))
    if backward:  # rows of a tile below its strip meet gradients of zero, and must be finite: part of the halo
        rows = min(rows, next_power_of_2(sum(k[0] // 2 for k in kernels) + 2) // 2)
    return 16 if widest <= 9 else 32, tile._replace(rows=rows)


def _choose_padding(window: int, kernels: Sequence[Kernel]) -> tuple[int, int, int]:
    """Of planes: left, right, and along M."""
    mid = max((k[1] // 2 for k in kernels), default=0)
    if window:  # one starts WINDOW / 4 columns before its segment: put that on a boundary of 8
        left = 8 + window // 4
        return left, window - left + 8, mid
    side = cdiv(max((k[2] for k in kernels), default=1) // 2, 8) * 8 + 8
    return side, side, mid


def _choose_strips(T: int, rows: int, halo: int, enough: int) -> tuple[int, int]:
    """How many strips an image's T rows are cut into, about `enough`, and the rows of each. A strip costs `halo` rows
    on both sides: none shorter than that."""
    strips = max(1, min(enough, T // max(rows, halo)))
    strip_rows = cdiv(cdiv(max(1, T), strips), rows) * rows if strips > 1 else max(1, T)
    return cdiv(max(1, T), strip_rows), strip_rows


class Work(NamedTuple):
    """Tasks, the programs (slots of scratch memory) that take them in turn, and each task's blocks of channels."""

    tasks: int
    slots: int
    blocks_per_task: int


def _choose_slots(groups: int, blocks: int, processors: int, slot_size: int, backward: bool) -> Work:
    """For `groups` of images or strips times `blocks` of channels."""
    slots = processors * _SLOTS_PER_MULTIPROCESSOR[backward]
    # every task of the backward writes partial sums of the gates' gradients: few tasks, but enough for all slots
    blocks_per_task = max(1, min(blocks, groups * blocks // (2 * slots))) if backward else 1
    tasks = groups * cdiv(blocks, blocks_per_task)
    slots = min(tasks, slots)
    return Work(tasks, max(min(1, tasks), min(slots, _LARGEST_SCRATCH // slot_size)), blocks_per_task)
