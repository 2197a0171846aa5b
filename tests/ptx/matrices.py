"""Matrices of 8 x 8 elements of 16 bits, which a warp holds together: loads, stores, products."""

from __future__ import annotations

import numpy as np

from .kinds import bf16_decode, f16_decode
from .memory import Fault
from .opcodes import Step, registers_of, together
from .program import Instruction


def _matrices(bits: np.ndarray) -> np.ndarray:
    """(lanes,) registers -> (warps, 8, 8) elements of 16 bits."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 8, 8)


def _registers(matrices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrices).reshape(-1, 2).view(np.uint32)[:, 0]


@together("ldmatrix")
def _load_matrix(instruction: Instruction) -> Step:
    to, address = instruction.operands
    names = registers_of(to)
    transposed = "trans" in instruction.opcode

    def step(warp, mask):
        whole = warp.lanes_of(mask)
        lanes = whole & (np.arange(warp.lanes) % 32 < 8 * len(names))  # the others' addresses are not used
        rows = warp.load(address, "shared", 16, lanes, instruction)[lanes]
        found = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, len(names), 8, 8)
        for i, name in enumerate(names):
            value = np.zeros(warp.lanes, np.uint32)
            value[whole] = _registers(found[:, i].transpose(0, 2, 1) if transposed else found[:, i])
            warp.write(name, value, mask)

    return step


@together("stmatrix")
def _store_matrix(instruction: Instruction) -> Step:
    address, source = instruction.operands
    names = registers_of(source)
    transposed = "trans" in instruction.opcode

    def step(warp, mask):
        whole = warp.lanes_of(mask)
        lanes = whole & (np.arange(warp.lanes) % 32 < 8 * len(names))
        found = np.stack([_matrices(warp.read(name, 32)[whole]) for name in names], 1)
        rows = np.ascontiguousarray(found.transpose(0, 1, 3, 2) if transposed else found).reshape(-1, 8)
        value = np.zeros((warp.lanes, 16), np.uint8)
        value[lanes] = rows.view(np.uint8)
        warp.store(address, "shared", value, lanes, instruction)

    return step


@together("movmatrix")
def _transpose_matrix(instruction: Instruction) -> Step:
    to, source = instruction.operands
    return lambda warp, mask: warp.write(to, _registers(_matrices(warp.read(source, 32)).transpose(0, 2, 1)), mask)


def left_operand(warp, names, decode) -> np.ndarray:
    """(warps, 16, depth): the left factor of a product, as its registers have it."""
    row, pair = np.arange(32) // 4, np.arange(32) % 4 * 2
    found = np.zeros((warp.lanes // 32, 16, 4 * len(names)), np.float32)
    for i, name in enumerate(names):
        value = _pairs(warp, name, decode)
        for j in range(2):
            found[:, row + 8 * (i % 2), pair + j + 8 * (i // 2)] = value[:, :, j]
    return found


def _right_operand(warp, names, decode) -> np.ndarray:
    """(warps, depth, 8)"""
    row, pair = np.arange(32) // 4, np.arange(32) % 4 * 2
    found = np.zeros((warp.lanes // 32, 8 * len(names), 8), np.float32)
    for i, name in enumerate(names):
        value = _pairs(warp, name, decode)
        for j in range(2):
            found[:, pair + j + 8 * i, row] = value[:, :, j]
    return found


def _pairs(warp, name, decode) -> np.ndarray:
    """(warps, 32, 2)"""
    return decode(np.ascontiguousarray(warp.read(name, 32)).view(np.uint16)).reshape(-1, 32, 2)


@together("mma")
def _multiply_matrices(instruction: Instruction) -> Step:
    """m16n8k16 and m16n8k8 of 16-bit operands; sums in float64, rounded once."""
    if instruction.opcode[3] not in ("m16n8k16", "m16n8k8") or instruction.opcode[-1] != "f32":
        raise Fault(f"product unknown to this machine: {instruction}")
    decode = bf16_decode if "bf16" in instruction.opcode else f16_decode
    to, left, right, add = [operand.items for operand in instruction.operands]
    row, pair = np.arange(32) // 4, np.arange(32) % 4 * 2

    def step(warp, mask):
        a, b = left_operand(warp, left, decode), _right_operand(warp, right, decode)
        product = a.astype(np.float64) @ b.astype(np.float64)
        for i, (name, term) in enumerate(zip(to, add, strict=True)):
            found = product[:, row + 8 * (i // 2), pair + i % 2].reshape(-1)
            warp.write(name, (found + warp.read(term, 32).view(np.float32)).astype(np.float32).view(np.uint32), mask)

    return step
