"""Products of Hopper's warpgroups, which read shared memory by themselves and end when they are waited for.

A warp makes the 16 rows of the product that are its own. What a product reads is read when it is issued and once more
when it is waited for, so that who writes there meanwhile is found; results reach registers at the wait alone.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from .kinds import bf16_decode, f16_decode
from .matrices import left_operand
from .memory import Fault
from .opcodes import together
from .program import Immediate, Instruction, Vector


@together("wgmma")
def _warpgroup(instruction: Instruction):
    what = instruction.opcode[1]
    if what == "fence":
        return lambda warp, mask: None
    if what == "commit_group":
        return lambda warp, mask: warp.commit_products()
    if what == "wait_group":
        return lambda warp, mask: warp.wait_for_products(instruction.operands[0].value)
    return _product(instruction)


def _product(instruction: Instruction):
    shape = re.fullmatch(r"m64n(\d+)k16", instruction.opcode[4])
    if shape is None or instruction.opcode[5] != "f32":
        raise Fault(f"product unknown to this machine: {instruction}")
    N = int(shape[1])
    decode = bf16_decode if instruction.opcode[6] == "bf16" else f16_decode
    to, a, b, add, _, _, *transposed = instruction.operands
    b_transposed = transposed[-1] == Immediate(1)

    def step(warp, mask):
        blocks = warp.lanes_of(mask).reshape(-1, 32)[:, 0]
        add_too = warp.read(add, 1).reshape(-1, 32)[blocks, 0]
        if isinstance(a, Vector):
            left = partial(lambda value: value, left_operand(warp, a.items, decode)[blocks])
        else:
            rows = 16 * (warp.index % 4) + np.arange(16)
            left = partial(_from_memory, warp, a, rows, transposed[0] == Immediate(1), blocks, decode, instruction)
            left()
        right = partial(_from_memory, warp, b, np.arange(N), b_transposed, blocks, decode, instruction)
        right()
        warp.products.append(partial(_finish, warp, to.items, blocks, add_too, left, right, N))

    return step


def _finish(warp, names, blocks, add_too, left, right, N) -> None:
    product = left().astype(np.float64) @ right().astype(np.float64).transpose(0, 2, 1)
    lane = np.arange(32)
    whole = np.repeat(blocks, 32)
    for i, name in enumerate(names):
        row, column = lane // 4 + 8 * (i // 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)
        before = warp.read(name, 32).view(np.float32).reshape(-1, 32)[blocks]
        value = product[:, row, column] + np.where(add_too[:, None], before, 0)
        bits = np.zeros(warp.lanes, np.uint32)
        bits[whole] = value.astype(np.float32).view(np.uint32).reshape(-1)
        warp.write(name, bits, None if blocks.all() else whole)


def _from_memory(warp, descriptor, rows, transposed: bool, blocks, decode, instruction) -> np.ndarray:
    """(blocks, rows, 16) of a matrix in shared memory, where and how its descriptor says (PTX ISA, wgmma)."""
    bits = warp.read(descriptor, 64).reshape(-1, 32)[blocks, 0].astype(np.int64)
    start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    modes = np.unique(bits >> 62 & 3)
    if len(modes) != 1 or modes[0] == 0:
        raise Fault(f"matrix layout unknown to this machine: {instruction}")
    span = {1: 128, 2: 64, 3: 32}[int(modes[0])]  # bytes that are swizzled with one another
    r, k = rows[None, :, None], np.arange(16)[None, None, :]
    start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
    if transposed:
        of_span = span // 2
        at = start + r // of_span * leading + r % of_span * 2 + k // 8 * stride + k % 8 * span
    else:
        at = start + r // 8 * stride + r % 8 * span + 2 * k
    at = at ^ (at >> 3 & span - 16)
    if (at >= warp.launch.shared_bytes).any():
        raise Fault(f"a matrix reaches beyond shared memory: {instruction}")
    base = np.arange(warp.launch.blocks)[blocks][:, None, None] * warp.launch.shared_stride
    who = np.broadcast_to(warp.tags.reshape(-1, 32)[blocks, 0][:, None, None], at.shape)
    found = warp.launch.shared_memory.load((at + base).reshape(-1), 2, who.reshape(-1), instruction)
    return decode(np.ascontiguousarray(found).view(np.uint16)[:, 0]).reshape(at.shape)
