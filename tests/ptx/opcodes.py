"""What each opcode does. An entry of `OPCODES` makes of an instruction a step: step(warp, mask), for `mask`'s lanes.

`warp` is a `machine.Warp`: the same warp of several blocks at once, so that one NumPy call serves them all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .kinds import KINDS, UNSIGNED, Kind, kinds_in
from .memory import SHARED_WINDOW, Fault
from .program import Instruction, Vector

Step = Callable
TOGETHER: set[str] = set()  # opcodes in which every lane of a warp must take part
OPCODES: dict[str, Callable[[Instruction], Step]] = {}


def opcode(*names: str):
    def enter(make):
        OPCODES.update(dict.fromkeys(names, make))
        return make

    return enter


def make_step(instruction: Instruction) -> Step:
    name = instruction.opcode[0]
    if name not in OPCODES:
        raise Fault(f"opcode unknown to this machine: {instruction}")
    return OPCODES[name](instruction)


# ------------------------------------------------------------ arithmetic: a function of numbers


def _quotient(a, b):
    """Rounded towards zero; whatever by zero."""
    b = np.where(b == 0, np.ones_like(b), b)
    q = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -q, q).astype(a.dtype) if a.dtype.kind == "i" else q


def _fused(a, b, c):
    """One rounding, but for cases of double rounding in float64."""
    return a.astype(np.float64) * b + c


FUNCTIONS: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _quotient(a, b),
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "fma": _fused,
    "mad": lambda a, b, c: a * b + c,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "popc": lambda a: np.bitwise_count(a),
    "tanh": np.tanh,
    "copysign": lambda a, b: np.copysign(b, a),
}


@opcode(*FUNCTIONS)
def _arithmetic(instruction: Instruction) -> Step:
    name, *modifiers = instruction.opcode
    kind = kinds_in(instruction.opcode)[-1]
    function = FUNCTIONS[name]
    if "wide" in modifiers or "hi" in modifiers:
        return _wide(instruction, kind, function, "hi" in modifiers)
    to, *sources = instruction.operands

    def step(warp, mask):
        warp.write(to, kind.encode(function(*[kind.decode(warp.read(s, kind.bits)) for s in sources])), mask)

    return step


def _wide(instruction: Instruction, kind: Kind, function: Callable, high: bool) -> Step:
    """A product of twice the bits, and what is added to it; or its upper half."""
    to, *sources = instruction.operands
    double = KINDS.get(f"{kind.name[0]}{2 * kind.bits}")

    def step(warp, mask):
        factors = [kind.decode(warp.read(s, kind.bits)) for s in sources[:2]]
        if double is None:  # 64 bits: in Python's integers
            product = [int(a) * int(b) >> kind.bits for a, b in zip(*factors, strict=True)]
            value = np.array([p & (1 << 64) - 1 for p in product], np.uint64)
        else:
            number = double.decode(np.zeros(1, UNSIGNED[double.bits])).dtype
            others = [double.decode(warp.read(s, double.bits)) for s in sources[2:]]
            value = double.encode(function(*[f.astype(number) for f in factors], *others))
            if high:
                value = (value >> UNSIGNED[double.bits].type(kind.bits)).astype(UNSIGNED[kind.bits])
        warp.write(to, value, mask)

    return step


@opcode("shl", "shr")
def _shift(instruction: Instruction) -> Step:
    kind = kinds_in(instruction.opcode)[-1]
    to, source, count = instruction.operands
    left, signed = instruction.opcode[0] == "shl", kind.name[0] == "s"

    def step(warp, mask):
        x, n = kind.decode(warp.read(source, kind.bits)), warp.read(count, 32)
        by = np.minimum(n, kind.bits - 1).astype(x.dtype)
        value = x << by if left else x >> by
        if left or not signed:  # a signed number keeps its sign's bit
            value = np.where(n >= kind.bits, np.zeros_like(x), value)
        warp.write(to, kind.encode(value), mask)

    return step


@opcode("shf")
def _funnel_shift(instruction: Instruction) -> Step:
    to, low, high, count = instruction.operands
    left, wrap = instruction.opcode[1] == "l", instruction.opcode[2] == "wrap"

    def step(warp, mask):
        both = warp.read(low, 32).astype(np.uint64) | warp.read(high, 32).astype(np.uint64) << np.uint64(32)
        n = warp.read(count, 32).astype(np.uint64)
        n = n & np.uint64(31) if wrap else np.minimum(n, np.uint64(32))
        value = both << n >> np.uint64(32) if left else both >> n
        warp.write(to, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)

    return step


@opcode("bfe")
def _field(instruction: Instruction) -> Step:
    kind = kinds_in(instruction.opcode)[-1]
    to, source, position, length = instruction.operands

    def step(warp, mask):
        x = warp.read(source, kind.bits).astype(np.int64)
        at, n = (warp.read(s, 32).astype(np.int64) for s in (position, length))
        value = x >> at & (1 << n) - 1
        if kind.name[0] == "s":
            sign = value >> np.maximum(n - 1, 0) & 1
            value = np.where((n > 0) & (sign == 1), value - (1 << n), value)
        warp.write(to, kind.encode(value), mask)

    return step


@opcode("bfi")
def _insert_field(instruction: Instruction) -> Step:
    kind = kinds_in(instruction.opcode)[-1]
    to, field, around, position, length = instruction.operands
    number = UNSIGNED[kind.bits].type

    def step(warp, mask):
        at, n = (warp.read(s, 32).astype(UNSIGNED[kind.bits]) for s in (position, length))
        if (at + n > kind.bits)[warp.lanes_of(mask)].any():
            raise Fault(f"a field beyond its register is unknown to this machine: {instruction}")
        ones = np.where(n == kind.bits, number((1 << kind.bits) - 1), (number(1) << n % number(kind.bits)) - number(1))
        at = at % number(kind.bits)
        value = warp.read(around, kind.bits) & ~(ones << at) | (warp.read(field, kind.bits) & ones) << at
        warp.write(to, value, mask)

    return step


@opcode("prmt")
def _bytes(instruction: Instruction) -> Step:
    to, *sources = instruction.operands

    def step(warp, mask):
        a, b, select = (warp.read(s, 32) for s in sources)
        pool = np.stack([a, b], 1).view(np.uint8)
        which = np.stack([select >> np.uint32(4 * i) & np.uint32(15) for i in range(4)], 1).astype(int)
        value = np.take_along_axis(pool, which & 7, 1)
        value = np.where(which & 8, np.where(value & 0x80, 0xFF, 0), value).astype(np.uint8)
        warp.write(to, np.ascontiguousarray(value).view(np.uint32)[:, 0], mask)

    return step


# ------------------------------------------------------------ comparing, choosing, moving, converting

COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_either_nan(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: (a == b) | _either_nan(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_either_nan(a, b),
    "nan": lambda a, b: _either_nan(a, b),
}


def _either_nan(a, b):
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)


@opcode("setp")
def _set_predicate(instruction: Instruction) -> Step:
    kind = kinds_in(instruction.opcode)[-1]
    compare = COMPARISONS[instruction.opcode[1]]
    combine = FUNCTIONS.get(instruction.opcode[2])
    to, a, b, *other = instruction.operands

    def step(warp, mask):
        value = compare(kind.decode(warp.read(a, kind.bits)), kind.decode(warp.read(b, kind.bits)))
        if other:
            value = combine(value, warp.read(other[0], 1))
        warp.write(to, value, mask)

    return step


@opcode("selp")
def _select(instruction: Instruction) -> Step:
    bits = kinds_in(instruction.opcode)[-1].bits
    to, a, b, which = instruction.operands

    def step(warp, mask):
        warp.write(to, np.where(warp.read(which, 1), warp.read(a, bits), warp.read(b, bits)), mask)

    return step


@opcode("cvta")
def _change_address(instruction: Instruction) -> Step:
    """Between an address of a space and one that says itself of which; global memory's are the same."""
    to, source = instruction.operands
    window = np.uint64(SHARED_WINDOW if any(part.startswith("shared") for part in instruction.opcode) else 0)
    if "to" in instruction.opcode:
        return lambda warp, mask: warp.write(to, warp.read(source, 64) - window, mask)
    return lambda warp, mask: warp.write(to, warp.read(source, 64) + window, mask)


@opcode("mov")
def _move(instruction: Instruction) -> Step:
    """Also of several registers into one, and back."""
    bits = kinds_in(instruction.opcode)[-1].bits
    to, source = instruction.operands
    parts = next((o.items for o in (to, source) if isinstance(o, Vector)), ())
    width = bits // max(1, len(parts))

    def split(warp, mask):
        value = warp.read(source, bits)
        for i, part in enumerate(parts):
            warp.write(part, (value >> value.dtype.type(i * width)).astype(UNSIGNED[width]), mask)

    def join(warp, mask):
        value = np.zeros(warp.lanes, UNSIGNED[bits])
        for i, part in enumerate(parts):
            value |= warp.read(part, width).astype(value.dtype) << value.dtype.type(i * width)
        warp.write(to, value, mask)

    def copy(warp, mask):
        warp.write(to, warp.read(source, bits), mask)

    return split if isinstance(to, Vector) else join if parts else copy


@opcode("cvt")
def _convert(instruction: Instruction) -> Step:
    kinds = kinds_in(instruction.opcode)
    to, *sources = instruction.operands
    target, origin = kinds[-2:]
    saturate = "sat" in instruction.opcode
    toward_zero = any(mode in instruction.opcode for mode in ("rzi", "rz"))
    if saturate or (origin.name[0] == "f" and target.name[0] in "su" and not toward_zero):
        raise Fault(f"conversion unknown to this machine: {instruction}")

    def step(warp, mask):
        values = [origin.decode(warp.read(s, origin.bits)) for s in sources]
        # of a pair the first operand is the upper half
        warp.write(to, target.encode(values[0] if len(values) == 1 else np.stack(values[::-1], 1)), mask)

    return step


# ------------------------------------------------------------ memory


def registers_of(operand) -> tuple:
    """Of a vector, or the one that it is."""
    return operand.items if isinstance(operand, Vector) else (operand,)


@opcode("ld", "ldu")
def _load(instruction: Instruction) -> Step:
    to, address = instruction.operands[:2]
    names, kind = registers_of(to), kinds_in(instruction.opcode)[-1]
    size = kind.bits // 8
    extend = KINDS[f"{'s' if kind.name[0] == 's' else 'u'}{kind.bits}"]

    def step(warp, mask):
        value = warp.load(address, instruction.opcode[1], size * len(names), mask, instruction)
        for i, name in enumerate(names):
            bits = np.ascontiguousarray(value[:, i * size : (i + 1) * size]).view(UNSIGNED[kind.bits])[:, 0]
            wide = KINDS[f"{extend.name[0]}{warp.width(name)}"]
            warp.write(name, wide.encode(extend.decode(bits)), mask)

    return step


@opcode("st")
def _store(instruction: Instruction) -> Step:
    address, source = instruction.operands
    names, kind = registers_of(source), kinds_in(instruction.opcode)[-1]

    def step(warp, mask):
        parts = [warp.read(name, kind.bits)[:, None].view(np.uint8) for name in names]
        warp.store(address, instruction.opcode[1], np.concatenate(parts, 1), mask, instruction)

    return step


@opcode("cp")
def _copy_asynchronously(instruction: Instruction) -> Step:
    """The bytes arrive when they are waited for, and not before."""
    kind = instruction.opcode[2]
    if kind == "commit_group":
        return lambda warp, mask: warp.commit_copies()
    if kind in ("wait_group", "wait_all"):
        keep = instruction.operands[0].value if kind == "wait_group" else 0
        return lambda warp, mask: warp.wait_for_copies(keep)
    to, source, size, *given = instruction.operands
    bytes_ = size.value

    def step(warp, mask):
        lanes = warp.lanes_of(mask)
        n = warp.read(given[0], 32) if given else np.full(warp.lanes, bytes_)
        if not np.isin(n[lanes], (0, bytes_)).all():
            raise Fault(f"a copy of a part of its bytes is unknown to this machine: {instruction}")
        value = np.zeros((warp.lanes, bytes_), np.uint8)
        full = lanes & (n == bytes_)
        if full.any():
            value[full] = warp.load(source, "global", bytes_, full, instruction)[full]
        if lanes.any():
            warp.copies.append((warp.shared_address(to, lanes), value[lanes], warp.tags[lanes], instruction))

    return step


@opcode("fence", "membar")
def _fence(instruction: Instruction) -> Step:
    return lambda warp, mask: None


# ------------------------------------------------------------ all lanes of a warp together


def together(*names: str):
    """Enters an opcode in which every lane of a warp must take part."""

    def enter(make):
        def checked(instruction: Instruction) -> Step:
            step = make(instruction)

            def check(warp, mask):
                warp.check_converged(mask, instruction)
                step(warp, mask)

            return check

        TOGETHER.update(names)
        return opcode(*names)(checked)

    return enter


@together("shfl")
def _shuffle(instruction: Instruction) -> Step:
    to, source, other, clamp = instruction.operands[:4]
    mode = instruction.opcode[2]
    to = to.items[0] if isinstance(to, Vector) else to

    def step(warp, mask):
        lane, x = np.arange(warp.lanes) % 32, warp.read(other, 32).astype(np.int64)
        c = warp.read(clamp, 32).astype(np.int64)
        segment, last = c >> 8 & 31, c & 31
        highest = lane & segment | last & ~segment
        lowest = lane & segment
        wanted = {
            "idx": lowest | x & ~segment & 31, "bfly": lane ^ x, "up": lane - x, "down": lane + x,
        }[mode]  # fmt: skip
        inside = wanted >= highest if mode == "up" else wanted <= highest
        found = np.arange(warp.lanes) - lane + np.where(inside, wanted, lane)
        warp.write(to, warp.read(source, 32)[found], mask)

    return step


@together("vote")
def _vote(instruction: Instruction) -> Step:
    to, source = instruction.operands[:2]
    mode = instruction.opcode[2]

    def step(warp, mask):
        said = warp.read(source, 1).reshape(-1, 32)
        if mode == "ballot":
            value = (said.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            value = {"any": said.any(1), "all": said.all(1)}[mode]
        warp.write(to, np.repeat(value, 32), mask)

    return step
