"""Tile sizes of the chain kernels, and the scratch memory that goes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._calls import Call
from ..triton.geometry import padded_size
from ..triton.launch import cdiv, multiprocessors, next_power_of_2

Kernel = tuple[int, int, int]  # a level's taps along (T, M, W)


@dataclass(frozen=True)
class Plan:
    """How one direction of focal_context is cut into programs. See triton_chain.py for the names."""

    kernels: tuple[Kernel, ...]
    window: int
    channels: int  # NB
    segments: int  # SEG
    rows: int  # ROWS
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
    warps: int
    registers: int

    def arguments(self) -> tuple[int, ...]:
        """The kernels' run-time arguments."""
        return self.tasks, self.strips, self.strip_rows, self.top, self.plane_size, self.images

    def constants(self) -> dict:
        """The kernels' compile-time arguments."""
        return {
            "KERNELS": self.kernels, "LEFT_PAD": self.left_pad, "RIGHT_PAD": self.right_pad, "WINDOW": self.window,
            "NB": self.channels, "SEG": self.segments, "ROWS": self.rows, "RM": self.mid_pad, "PIXELS": self.pixels,
            "num_warps": self.warps, "num_stages": 1, "maxnreg": self.registers,
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


# Tiles of the tensor-core form: channels, segments, rows, warps, and the registers of a thread at most. The first line
# that fits counts. None spills registers under Triton 3.6 or 3.9 on sm_80, sm_90 or sm_100 (`check --compile`); without
# a limit the compiler spills for the sake of one more program on a multiprocessor.
# (backward, dtype or None for both, widest kernel at most, levels at most) -> tile. What depends on channels and map is
# computed below; nothing measured yet tells compute capabilities apart.
_TENSOR_CORES = {
    (False, torch.float16, 7, 3): (4, 16, 4, 4, 192),  # erf wants more than bfloat16's GELU
    (False, None, 7, 3): (4, 16, 4, 4, 168),
    (False, None, 13, 99): (4, 16, 2, 4, 168),
    (True, None, 7, 3): (4, 16, 2, 4, 255),  # 4 rows spill up to 24 bytes under Triton 3.6
    (True, None, 13, 99): (4, 16, 1, 4, 255),
}
_TAPS = {False: (4, 32, 1, 4, 128), True: (4, 16, 1, 4, 255)}
_SLOTS_PER_MULTIPROCESSOR = {False: 3, True: 2}  # forward, backward: as many programs as registers let run at once
_LARGEST_SCRATCH = 2**27  # elements
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)  # float32 would lose digits there


def make_plan(
    B: int, C: int, size: tuple[int, int, int], kernels: tuple[Kernel, ...], dtype: torch.dtype,
    device: torch.device, backward: bool = False, whole: bool = False,
) -> Plan:  # fmt: skip
    """The plan for ctx (B, C, *size) on that device. `whole`: no strips, however few the tasks."""
    T, M, W = size
    widest = max((k[2] for k in kernels), default=1)
    band = dtype in TENSOR_CORE_DTYPES and M == 1 and widest <= 13 and all(k[1] == 1 for k in kernels)
    if band:
        window = 16 if widest <= 9 else 32
        channels, segments, rows, warps, registers = next(
            tile
            for (direction, only, taps, levels), tile in _TENSOR_CORES.items()
            if direction == backward and only in (None, dtype) and widest <= taps and len(kernels) <= levels
        )
        rows = min(rows, next_power_of_2(T))
        if backward:  # rows of a tile below its strip meet gradients of zero, and must be finite: part of the halo
            rows = min(rows, next_power_of_2(sum(k[0] // 2 for k in kernels) + 2) // 2)
    else:
        window, (channels, segments, rows, warps, registers) = 0, _TAPS[backward]
    # windows start WINDOW / 4 columns before their segment: put that on a boundary of 8
    left_pad = cdiv(widest // 2, 8) * 8 + 8 if not band else 8 + window // 4
    right_pad = left_pad if not band else window - left_pad + 8
    reach = [k[0] // 2 for k in kernels]
    mid_pad = max((k[1] // 2 for k in kernels), default=0)
    columns = cdiv(W, 8) * 8 + left_pad + right_pad

    blocks, processors = cdiv(C, channels), multiprocessors(device)
    per_image = cdiv(T, rows) * M * cdiv(W, 8)
    images = min(next_power_of_2(max(1, segments // max(1, per_image))), next_power_of_2(max(1, B)))
    strips, halo = 1, sum(reach) * (2 if backward else 1)
    tasks = cdiv(B, images) * blocks
    if (
        images == 1 and 0 < tasks < 2 * processors and not whole
    ):  # a strip costs `halo` rows on both sides: none shorter than that
        strips = max(1, min(cdiv(2 * processors, tasks), T // max(rows, halo)))
    strip_rows = cdiv(cdiv(max(1, T), strips), rows) * rows if strips > 1 else max(1, T)
    strips = cdiv(max(1, T), strip_rows)
    top = halo if strips > 1 else max(reach, default=0)
    # a row of slack above the first and below the last tile, for windows that start before or end after their row
    plane_size = (strip_rows + 2 * top + rows + 1) * (M + 2 * mid_pad) * columns
    plane_size = cdiv(plane_size, 16) * 16
    slots = processors * _SLOTS_PER_MULTIPROCESSOR[backward]
    groups = cdiv(B, images) * strips
    # every task of the backward writes its share of the gates' gradients: few tasks, but enough for all slots
    blocks_per_task = max(1, min(blocks, groups * blocks // (2 * slots))) if backward else 1
    tasks = groups * cdiv(blocks, blocks_per_task)
    slots = min(tasks, slots)
    planes = max(1, 2 * len(kernels)) if backward else len(kernels) + 1
    slot_size = planes * images * channels * plane_size
    slots = max(min(1, tasks), min(slots, _LARGEST_SCRATCH // slot_size))
    return Plan(
        kernels=kernels, window=window, channels=channels, segments=segments, rows=rows, images=images, strips=strips,
        strip_rows=strip_rows, top=top, mid_pad=mid_pad, left_pad=left_pad, right_pad=right_pad,
        plane_size=plane_size, tasks=tasks, slots=slots, slot_size=slot_size,
        blocks_per_task=blocks_per_task, pixels=128 if backward else 256, warps=warps, registers=registers,
    )  # fmt: skip
