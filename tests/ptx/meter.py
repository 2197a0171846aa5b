"""What a launch costs: instructions by kind, and what they ask of global and shared memory.

PTX is not what a GPU issues: an addition of 64 bits is two instructions there, a division some twenty, a move mostly
none. `COSTS` has how many; what comes out is within 15% of SASS for the kernels of test_meter.py, not exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, field

import numpy as np

from .program import Instruction, Program, Vector

INTEGER, FLOAT, SPECIAL, TENSOR, SHUFFLE, BARRIER, BRANCH = (
    "integer", "float", "special", "tensor", "shuffle", "barrier", "branch",
)  # fmt: skip
NOTHING = "nothing"
_FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2"}
_FOLDED = {"mov", "cvta", "neg", "abs"}  # into registers' places, or what reads them
# machine instructions of an opcode on 32 and on 64 bits
COSTS = {
    "div.s": (20, 90), "div.u": (16, 80), "rem.s": (22, 90), "rem.u": (18, 80), "mul.lo": (1, 4), "mad.lo": (1, 4),
    "add": (1, 2), "sub": (1, 2), "shl": (1, 2), "shr": (1, 2), "and": (1, 2), "or": (1, 2), "xor": (1, 2),
    "setp": (1, 2), "selp": (1, 2), "min": (1, 4), "max": (1, 4),
    "div.rn": (10, 20), "div.full": (3, 3), "rcp.rn": (8, 8), "sqrt.rn": (8, 8),
}  # fmt: skip
SCALED = {("ex2", "approx", "f32"), ("rsqrt", "approx", "f32")}  # for subnormal results: two multiplications more


def kind_and_cost(at: Instruction) -> tuple[str, float]:
    """Of what kind the machine instructions are, and how many. (Without what `SCALED` adds.)"""
    name, *parts = at.opcode
    if name in ("ld", "ldu", "st"):
        return _access(at)
    if name == "cp":
        return ("global 16 bytes", 1) if len(at.operands) >= 2 else (NOTHING, 0)
    if name in ("ldmatrix", "stmatrix"):
        return "shared", 1
    if name in ("mma", "wgmma", "movmatrix"):
        return (TENSOR if name != "movmatrix" else SHUFFLE), 1
    if name in ("shfl", "vote", "redux", "match", "activemask"):
        return SHUFFLE, 1
    if name in ("bar", "barrier", "membar", "fence"):
        return BARRIER, 1
    if name in ("bra", "ret", "exit"):
        return BRANCH, 1
    if name == "mov" and isinstance(at.operands[1], Vector):
        return INTEGER, 1  # two halves become a register
    if name in _FOLDED or "pred" in parts:
        return NOTHING, 0
    if name == "cvt":
        return _conversion(parts)
    kind = FLOAT if _FLOATS & set(parts) else INTEGER
    if name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos") and "approx" in parts:
        kind = SPECIAL
    if name == "copysign" or (name == "selp" and kind == FLOAT):
        kind = INTEGER
    return kind, _cost(at.opcode)


def _cost(opcode: tuple[str, ...]) -> float:
    name, kind = opcode[0], opcode[-1]
    wide = kind.endswith("64")
    for key in (f"{name}.{kind[0]}", ".".join(opcode[:2]), name):
        if key in COSTS:
            return COSTS[key][wide]
    return 1


def _conversion(parts: list[str]) -> tuple[str, float]:
    to, origin = [p for p in parts if p in _FLOATS or p[0] in "subf" and p[1:].isdigit()][-2:]
    if to in _FLOATS and origin in _FLOATS:
        return FLOAT, 1
    if to in _FLOATS or origin in _FLOATS:
        return SPECIAL, 1
    return (INTEGER, 1) if to == "s64" else (NOTHING, 0)


def _access(at: Instruction) -> tuple[str, float]:
    space = at.opcode[1]
    if space == "param":
        return NOTHING, 0  # an operand of who reads it
    if space.startswith("shared"):
        return "shared", 1
    width = int("".join(c for c in at.opcode[-1] if c.isdigit())) // 8
    many = next((int(p[1:]) for p in at.opcode if p in ("v2", "v4", "v8")), 1)
    return f"global {width * many} bytes", 1


@dataclass
class Traffic:
    """`sectors`: of 32 bytes, that warps' accesses to global memory touch; `wavefronts`: cycles of shared memory's 32
    banks, and how few the same bytes could have taken."""

    loaded_sectors: float = 0
    stored_sectors: float = 0
    wavefronts: float = 0
    ideal_wavefronts: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*[mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)])

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(*[factor * mine for mine in astuple(self)])

    def global_access(self, what: str, address: np.ndarray, size: int, who: np.ndarray, where: Instruction) -> None:
        _, warp = np.unique(who, return_inverse=True)
        sectors = len(np.unique(warp.astype(np.int64) << 44 | address >> 5))
        if what == "load":
            self.loaded_sectors += sectors
        else:
            self.stored_sectors += sectors

    def shared_access(self, what: str, address: np.ndarray, size: int, who: np.ndarray, where: Instruction) -> None:
        if where.opcode[0] == "wgmma":
            return  # reads by itself
        together = max(1, 128 // max(size, 4))  # lanes that are served at once
        _, warp, count = np.unique(who, return_inverse=True, return_counts=True)
        first = np.concatenate([[0], np.cumsum(count)[:-1]])
        order = np.argsort(warp, kind="stable")
        in_warp = np.empty(len(who), np.int64)
        in_warp[order] = np.arange(len(who)) - first[warp[order]]
        group = warp * 32 + in_warp // together
        words = address[:, None] // 4 + np.arange(max(1, size // 4))
        pairs = np.unique((group[:, None] << 40 | words).reshape(-1))  # the same word is served to all that want it
        banks, hits = np.unique((pairs >> 40) << 5 | pairs & 31, return_counts=True)
        groups, at = np.unique(banks >> 5, return_index=True)
        self.wavefronts += int(np.maximum.reduceat(hits, at).sum())
        self.ideal_wavefronts += len(groups)


@dataclass
class Cost:
    """`kinds`: machine instructions of all warps, by kind."""

    kinds: Counter = field(default_factory=Counter)
    traffic: Traffic = field(default_factory=Traffic)

    def __add__(self, other: Cost) -> Cost:
        kinds = {kind: self.kinds[kind] + other.kinds[kind] for kind in self.kinds | other.kinds}
        return Cost(Counter(kinds), self.traffic + other.traffic)

    def __mul__(self, factor: float) -> Cost:
        return Cost(Counter({kind: factor * count for kind, count in self.kinds.items()}), self.traffic * factor)

    @property
    def instructions(self) -> float:
        return sum(self.kinds.values())


def cost_of(program: Program, issued: np.ndarray, traffic: Traffic) -> Cost:
    cost = Cost(traffic=traffic)
    for i in np.flatnonzero(issued):
        kind, count = kind_and_cost(program.instructions[i])
        if kind != NOTHING:
            cost.kinds[kind] += count * int(issued[i])
        if program.instructions[i].opcode in SCALED:
            cost.kinds[FLOAT] += 2 * int(issued[i])
    return cost
