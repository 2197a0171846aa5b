"""Faults to plant in a kernel, an instruction at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .program import Immediate, Instruction, Program, Register, Vector


def _wrong_index(at: Instruction) -> Instruction | None:
    """Elements of twice the size."""
    wide = at.opcode[:2] in (("mul", "wide"), ("mad", "wide")) and at.operands[2] == Immediate(2)
    shifted = at.opcode[0] == "shl" and at.operands[2] == Immediate(1)
    if not wide and not shifted:
        return None
    to, index, size, *rest = at.operands
    return at._replace(operands=(to, index, Immediate(2 * size.value), *rest))


_ONE_MORE = {("setp", "lt", "s32"): ("setp", "le", "s32"), ("setp", "ge", "s32"): ("setp", "gt", "s32")}


def _mask_off_by_one(at: Instruction) -> Instruction | None:
    """A bound, or what leaves out a loop that begins beyond it."""
    if at.opcode not in _ONE_MORE or not all(isinstance(operand, Register) for operand in at.operands):
        return None
    return at._replace(opcode=_ONE_MORE[at.opcode])


def _swapped_operands(at: Instruction) -> Instruction | None:
    if at.opcode[0] != "sub" or not all(isinstance(operand, Register) for operand in at.operands):
        return None
    to, a, b = at.operands
    return at._replace(operands=(to, b, a))


def _product_of_another_order(at: Instruction) -> Instruction | None:
    """The left factor's rows 0 to 7 in the place of rows 8 to 15."""
    if at.opcode[0] != "mma":
        return None
    to, left, *rest = at.operands
    first, second, *others = left.items
    return at._replace(operands=(to, Vector((second, first, *others)), *rest))


# and the least share of places at which each must be noticed: one element more harms nothing where a bound is met
# exactly, or padding follows
PLANTED: dict[str, tuple[Callable[[Instruction], Instruction | None], float]] = {
    "a wrong index": (_wrong_index, 0.75),
    "a mask off by one": (_mask_off_by_one, 0.2),
    "swapped operands": (_swapped_operands, 0.75),
    "a product's operands in another order": (_product_of_another_order, 0.8),
}


def planted(program: Program, plant: Callable, issued: np.ndarray, most: int) -> Iterator[tuple[Instruction, Program]]:
    """(what was replaced, the program with the fault) at some of the places that ran, from the first to the last."""
    places = [(i, plant(at)) for i, at in enumerate(program.instructions) if issued[i] and plant(at) is not None]
    for at in np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)):
        i, faulty = places[at]
        yield program.instructions[i], program.with_instruction(i, faulty)


def barriers(program: Program, issued: np.ndarray) -> list[int]:
    """Of the block, that ran."""
    return [i for i, at in enumerate(program.instructions) if at.opcode[:2] == ("bar", "sync") and issued[i]]
