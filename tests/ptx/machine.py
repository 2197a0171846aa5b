"""Runs a kernel's PTX on a CPU, and finds what a GPU would not show: races, accesses out of bounds, barriers that not
all threads reach.

A `Warp` here is the same warp of all blocks, side by side, so that one NumPy call does the work of many. Warps run one
after another, each until a barrier, in an order drawn anew each time; lanes that part follow the lowest instruction,
and so meet again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from . import matrices as matrices  # enter their opcodes
from . import wgmma as wgmma
from .kinds import UNSIGNED
from .memory import SHARED_WINDOW, Fault, Memory, tags
from .meter import Traffic
from .opcodes import TOGETHER, make_step
from .program import Address, Immediate, Instruction, Program, Register, Special, Symbol

POISON = 0xCBCBCBCBCBCBCBCB  # of registers and shared memory that nobody wrote
_LOST = np.iinfo(np.int64).max


class Result(NamedTuple):
    """`races`: by instruction; `issued`: how many warps issued each instruction of the program; `traffic`: what they
    asked of memory, if that was wanted."""

    program: Program
    blocks: int
    threads: int
    shared_bytes: int
    races: dict[str, str]
    issued: np.ndarray
    traffic: Traffic


class Launch:
    """A kernel with its arguments, and the memory that its blocks see.

    Args:
        threads: of a block; None: as the kernel demands.
        shared_bytes: of a block, beyond its static variables.
        metered: whether accesses to memory are counted.
    """

    def __init__(
        self, program: Program, arguments: bytes, memory: Memory, blocks: int, threads: int | None, shared_bytes: int,
        metered: bool,
    ):  # fmt: skip
        self.program, self.arguments, self.blocks = program, arguments, blocks
        self.threads = threads or program.threads
        self.global_memory = memory
        variables = program.variables
        # each block's after the last one's, with a gap for who runs over the end; from bank 0 on
        size = max([shared_bytes, 16, *[at + shared_bytes for at in variables.values()]])
        self.shared_bytes, self.shared_stride = size, (size + 1024) // 128 * 128
        self.traffic = Traffic()
        self.shared_memory = Memory(memory.races, self.traffic.shared_access if metered else None)
        memory.meter = self.traffic.global_access if metered else None
        fresh = np.full(self.shared_stride * blocks, POISON & 0xFF, np.uint8)
        self.shared_memory.add("shared memory", 0, fresh)
        self.steps = [_step(program, instruction) for instruction in program.instructions]
        self.issued = np.zeros(len(self.steps), np.int64)

    def run(self, generator: np.random.Generator) -> Result:
        warps = [Warp(self, i) for i in range(self.threads // 32)]
        epoch = 1
        while True:
            for i in generator.permutation(len(warps)):
                warps[i].run(epoch)
            waiting = np.stack([warp.waiting.reshape(self.blocks, 32) for warp in warps], 1).reshape(self.blocks, -1)
            ended = np.stack([warp.ended.reshape(self.blocks, 32) for warp in warps], 1).reshape(self.blocks, -1)
            if (waiting.any(1) & ended.any(1)).any():
                raise Fault(f"{self.program.name}: some threads of a block wait at a barrier, others have ended")
            if ended.all():
                size = self.blocks, self.threads, self.shared_bytes
                return Result(self.program, *size, self.global_memory.races, self.issued, self.traffic)
            for warp in warps:
                warp.waiting[:] = False
            epoch += 1


def _step(program: Program, instruction: Instruction):
    """(what kind of step, what it needs)."""
    name = instruction.opcode[0]
    if name == "bra":
        return "branch", program.labels[instruction.operands[0].name]
    if name in ("ret", "exit"):
        return "end", None
    if name in ("bar", "barrier") and instruction.opcode[1] in ("sync", "cta"):
        if len(instruction.operands) != 1 or instruction.operands[0] != Immediate(0):
            raise Fault(f"barrier unknown to this machine: {instruction}")
        return "barrier", None
    if name == "bar" and instruction.opcode[1] == "warp":
        return "together", lambda warp, mask: None
    return ("together" if name in TOGETHER else "op"), make_step(instruction)


class Warp:
    """Warp `index` of every block; its lanes are those of block 0, of block 1, ...

    `waiting`: lanes that are at a barrier. `alone`: that are where all lanes of the warp must come (shuffles and the
    like), before the others.
    """

    def __init__(self, launch: Launch, index: int):
        self.launch, self.index, self.program = launch, index, launch.program
        self.lanes = 32 * launch.blocks
        self.block = np.repeat(np.arange(launch.blocks), 32)
        self.registers: dict[str, np.ndarray] = {}
        self.constants: dict[tuple, np.ndarray] = {}
        self.pc = np.zeros(self.lanes, np.int64)
        self.waiting, self.ended, self.alone = (np.zeros(self.lanes, bool) for _ in range(3))
        self.tags = tags(self.block, 1, index)
        # what runs by itself, in groups that are waited for: copies into shared memory, products of warpgroups
        self.copies: list[tuple] = []
        self.groups_of_copies: list[list[tuple]] = []
        self.products: list[Callable[[], None]] = []
        self.groups_of_products: list[list[Callable[[], None]]] = []

    def run(self, epoch: int) -> None:
        """Until every lane waits at a barrier, or has ended."""
        self.tags = tags(self.block, epoch, self.index)
        while (running := ~(self.waiting | self.ended)).any():
            ready = running & ~self.alone
            if not ready.any():
                instruction = self.program.instructions[int(self.pc[self.alone][0])]
                raise Fault(f"not all lanes of a warp come to {instruction}")
            pc = int(self.pc[ready].min())
            active = ready & (self.pc == pc)
            self._run_together(pc, active, int(np.where(ready & ~active, self.pc, _LOST).min()))
            self._meet()

    def _run_together(self, pc: int, active: np.ndarray, others: int) -> None:
        """Lanes that are at one instruction, until they part, stop, or come to where `others` are."""
        mask = None if active.all() else active
        warps = self.launch.blocks if mask is None else int(active.reshape(-1, 32).any(1).sum())
        while pc < others:
            instruction, (kind, what) = self.program.instructions[pc], self.launch.steps[pc]
            if kind in ("together", "barrier") and mask is not None:
                by_warp = active.reshape(-1, 32)
                if (by_warp.any(1) & ~by_warp.all(1)).any():
                    self.alone |= active & ~np.repeat(by_warp.all(1), 32)
                    break
            self.launch.issued[pc] += warps
            chosen = self._guarded(instruction, mask)
            if kind in ("op", "together"):
                if chosen is None or chosen.any():
                    what(self, chosen)
                pc += 1
                continue
            lanes = active if chosen is None else chosen & active
            if kind != "branch":
                return self._stop(kind, lanes, active, pc, instruction)
            if lanes.any() and (lanes != active).any():
                self.pc[active] = np.where(lanes, what, pc + 1)[active]
                return
            pc = what if lanes.any() else pc + 1
        self.pc[active] = pc

    def _meet(self) -> None:
        """Lanes that waited for the others of their warp go on where all have come."""
        if self.alone.any():
            at = self.pc.reshape(-1, 32)
            stopped = (self.waiting | self.ended).reshape(-1, 32).any(1)
            self.alone &= ~np.repeat((at == at[:, :1]).all(1) & ~stopped, 32)

    def _guarded(self, instruction: Instruction, mask: np.ndarray | None) -> np.ndarray | None:
        if instruction.guard is None:
            return mask
        register, negated = instruction.guard
        guard = self.read(register, 1)
        guard = ~guard if negated else guard
        return guard if mask is None else guard & mask

    def _stop(self, kind: str, lanes: np.ndarray, active: np.ndarray, pc: int, instruction: Instruction) -> None:
        self.pc[active] = pc + 1
        if kind == "barrier":
            self.check_converged(lanes, instruction)
            self.waiting |= lanes
        else:
            self.ended |= lanes

    # ---- what steps need

    def width(self, register: Register) -> int:
        return self.program.width(register)

    def read(self, operand, bits: int) -> np.ndarray:
        """(lanes,) of the unsigned type of so many bits."""
        dtype = UNSIGNED[bits]
        if type(operand) is Register:
            value = self.registers.get(operand.name)
            if value is not None:
                return value if value.dtype == dtype else value.astype(dtype)
        constant = self.constants.get((operand, bits))
        if constant is None:
            constant = self.constants[operand, bits] = self._constant(operand, bits).astype(dtype)
        return constant

    def _constant(self, operand, bits: int) -> np.ndarray:
        """Of what no instruction changes; and what a register holds that nobody wrote."""
        if isinstance(operand, Special):
            return self._special(operand.name)
        if isinstance(operand, Symbol):  # a variable in shared memory, or an argument in theirs
            argument = self.program.parameters.get(operand.name)
            return np.full(self.lanes, argument.offset if argument else self.program.variables[operand.name])
        value = operand.value if isinstance(operand, Immediate) else POISON
        return np.full(self.lanes, value & (1 << bits) - 1, np.uint64)

    def write(self, register: Register, value: np.ndarray, mask: np.ndarray | None) -> None:
        if isinstance(register, Symbol):  # `_`: nobody's
            return
        dtype = UNSIGNED[self.width(register)]
        value = value if value.dtype == dtype else value.astype(dtype)
        if mask is not None:
            value = np.where(mask, value, self.read(register, self.width(register)))
        self.registers[register.name] = value

    def lanes_of(self, mask: np.ndarray | None) -> np.ndarray:
        return np.ones(self.lanes, bool) if mask is None else mask

    def check_converged(self, mask: np.ndarray | None, instruction: Instruction) -> None:
        if mask is not None:
            by_warp = mask.reshape(-1, 32)
            if (by_warp.any(1) & ~by_warp.all(1)).any():
                raise Fault(f"not all lanes of a warp take part in {instruction}")

    def load(self, address: Address, space: str, size: int, mask: np.ndarray | None, where: Instruction) -> np.ndarray:
        """(lanes, size) bytes; of lanes that take no part, zeros."""
        lanes = self.lanes_of(mask)
        found = np.zeros((self.lanes, size), np.uint8)
        if space == "param":
            at = self._addresses(address, lanes)
            if (at + size > len(self.launch.arguments)).any() or (at < 0).any():
                raise Fault(f"{self.program.name}: beyond the arguments: {where}")
            found[lanes] = np.frombuffer(self.launch.arguments, np.uint8)[at[:, None] + np.arange(size)]
            return found
        for memory, chosen, at in self._places(address, space, lanes):
            found[chosen] = memory.load(at, size, self.tags[chosen], where)
        return found

    def store(self, address: Address, space: str, value: np.ndarray, mask: np.ndarray | None, where: Instruction):
        """`value`: (lanes, size) bytes."""
        for memory, chosen, at in self._places(address, space, self.lanes_of(mask)):
            memory.store(at, value[chosen], self.tags[chosen], where)

    def shared_address(self, address: Address, lanes: np.ndarray) -> np.ndarray:
        """Of these lanes alone, in the shared memory of all blocks."""
        return self._in_shared_memory(self._addresses(address, lanes), lanes)

    def _places(self, address: Address, space: str, lanes: np.ndarray):
        """(memory, lanes, their addresses in it)"""
        at = self._addresses(address, lanes)
        if space.startswith("shared"):
            yield self.launch.shared_memory, lanes, self._in_shared_memory(at, lanes)
            return
        # an opcode without a space: the address says
        shared = at >= SHARED_WINDOW if space != "global" else np.zeros(len(at), bool)
        for memory, chosen in ((self.launch.shared_memory, shared), (self.launch.global_memory, ~shared)):
            if chosen.any():
                which = lanes.copy()
                which[lanes] = chosen
                found = at[chosen]
                if memory is self.launch.shared_memory:
                    found = self._in_shared_memory(found - SHARED_WINDOW, which)
                yield memory, which, found

    def _addresses(self, operand: Address, lanes: np.ndarray) -> np.ndarray:
        base = operand.base
        whole = self.read(base, self.width(base) if isinstance(base, Register) else 64)
        return whole[lanes].astype(np.int64) + operand.offset

    def _in_shared_memory(self, at: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        size = self.launch.shared_bytes
        outside = (at < 0) | (at >= size)
        if outside.any():
            raise Fault(f"{self.program.name}: byte {int(at[outside][0])} of {size} bytes of shared memory")
        return at + self.block[lanes] * self.launch.shared_stride

    def commit_copies(self) -> None:
        self.groups_of_copies.append(self.copies)
        self.copies = []

    def wait_for_copies(self, keep: int) -> None:
        """The bytes of all but the last `keep` groups arrive."""
        while len(self.groups_of_copies) > keep:
            for at, value, who, instruction in self.groups_of_copies.pop(0):
                self.launch.shared_memory.store(at, value, who, instruction)

    def commit_products(self) -> None:
        self.groups_of_products.append(self.products)
        self.products = []

    def wait_for_products(self, keep: int) -> None:
        """The results of all but the last `keep` groups reach their registers."""
        while len(self.groups_of_products) > keep:
            for finish in self.groups_of_products.pop(0):
                finish()

    def _special(self, name: str) -> np.ndarray:
        register, _, axis = name.partition(".")
        lane = np.arange(self.lanes) % 32
        if axis in ("y", "z"):
            return np.full(self.lanes, 1 if register[0] == "n" else 0)
        return {
            "tid": lane + 32 * self.index,
            "laneid": lane,
            "warpid": np.full(self.lanes, self.index),
            "ctaid": self.block,
            "ntid": np.full(self.lanes, self.launch.threads),
            "nctaid": np.full(self.lanes, self.launch.blocks),
        }[register]


def run(
    program: Program,
    arguments: bytes,
    regions: Sequence[tuple[str, int, np.ndarray]],
    blocks: int,
    threads: int | None = None,
    shared_bytes: int = 0,
    seed: int = 0,
    metered: bool = False,
    apart: bool = False,
) -> Result:
    """One launch. `regions`: the tensors' memory as (name, address, bytes), read and written in place; `apart`: see
    `Memory`."""
    memory = Memory({}, apart=apart)
    for region in regions:
        memory.add(*region)
    with np.errstate(all="ignore"):
        launch = Launch(program, arguments, memory, blocks, threads, shared_bytes, metered)
        return launch.run(np.random.default_rng(seed))
