"""PTX text as a list of instructions with parsed operands."""

from __future__ import annotations

import copy
import re
from typing import NamedTuple


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    """An integer, or the bits of a float32 (`0f3F800000`) or float64 (`0d...`)."""

    value: int


class Special(NamedTuple):
    """%tid.x and the like."""

    name: str


class Symbol(NamedTuple):
    """A label, a parameter or a variable."""

    name: str


class Vector(NamedTuple):
    items: tuple


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Instruction(NamedTuple):
    """`guard`: the predicate's register, and whether it must be false. `source`: file:line:column, if PTX says it."""

    opcode: tuple[str, ...]
    operands: tuple
    guard: tuple[Register, bool] | None
    source: str

    def __str__(self) -> str:
        return f"{'.'.join(self.opcode)} ({self.source or 'source unknown'})"


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid)$")


class Program:
    """One kernel. `name`: what reports call it.

    Args:
        text: a PTX file with one entry, or `entry`'s.
        entry: its name.
    """

    def __init__(self, text: str, entry: str | None = None):
        name = re.escape(entry) if entry else "[\\w$]+"
        found = re.search(rf"\.entry\s+({name})\s*\(", text)
        if found is None:
            raise ValueError(f"entry: expected a kernel of the file, got {entry!r}")
        self.name = self.entry = found[1]
        self.text = text
        head, body = _head_and_body(text[found.end() :])
        self.parameters = _parameters(head)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
        self.threads = int(threads[1]) if threads else None
        self.bits = {prefix: _bits(kind) for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-zA-Z]+)<\d+>", body)}
        for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+(%?\w+(?:\s*,\s*%?\w+)*);", body):
            self.bits |= {name.strip(): _bits(kind) for name in names.split(",")}
        self.variables = _shared_variables(text)
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._read(body)

    def width(self, register: Register) -> int:
        """Its bits; 1 for a predicate."""
        if register.name not in self.bits:
            self.bits[register.name] = self.bits[re.match(r"%[a-zA-Z]+", register.name)[0]]
        return self.bits[register.name]

    def with_instruction(self, index: int, instruction: Instruction) -> Program:
        """A copy with another instruction there."""
        twin = copy.copy(self)
        twin.instructions = list(self.instructions)
        twin.instructions[index] = instruction
        return twin

    def without(self, index: int) -> Program:
        """A copy in which a fence, which does nothing here, stands in an instruction's place."""
        fence = Instruction(("membar", "cta"), (), None, self.instructions[index].source)
        return self.with_instruction(index, fence)

    def _read(self, body: str) -> None:
        source = ""
        files = {
            number: name.rpartition("/")[2] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.text)
        }
        for line in body.splitlines():
            if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", line):
                source = f"{files.get(at[1], at[1])}:{at[2]}:{at[3]}"
                if into := re.search(r"inlined_at\s+(\d+)\s+(\d+)", line):
                    source += f" in {files.get(into[1], into[1])}:{into[2]}"
                continue
            line = line.split("//")[0].strip()
            if label := re.match(r"([\w$]+):\s*", line):
                self.labels[label[1]] = len(self.instructions)
                line = line[label.end() :]
            for statement in line.split(";"):
                statement = re.sub(r"^\{\s*(?=[a-z@.])", "", statement.strip())  # a scope of inline assembly
                if statement not in ("", "{", "}") and not statement.startswith("."):
                    self.instructions.append(_instruction(statement, source))


def _head_and_body(text: str) -> tuple[str, str]:
    start = text.index("{")
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[:start], text[start + 1 : i]
    raise ValueError("text: the kernel's body has no end")


def _parameters(head: str) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    at = 0
    for match in re.finditer(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^,)]*?\s(\w+)(?:\[(\d+)\])?\s*(?=[,)])", head):
        size = _SIZES[re.search(r"\d+", match[2])[0]]
        align, bytes_ = int(match[1] or size), size * int(match[4] or 1)
        at = (at + align - 1) // align * align
        found[match[3]] = Parameter(match[3], at, bytes_)
        at += bytes_
    return found


def _shared_variables(text: str) -> dict[str, int]:
    """The shared variables' offsets; what is `extern` begins after the others."""
    found, at, external = {}, 0, []
    for match in re.finditer(r"^\s*(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]", text, re.M):
        if match[1]:
            external.append(match[3])
            continue
        align = int(match[2])
        at = (at + align - 1) // align * align
        found[match[3]] = at
        at += int(match[4])
    return found | dict.fromkeys(external, (at + 15) // 16 * 16)


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def _instruction(text: str, source: str) -> Instruction:
    guard = None
    if guarded := re.match(r"@(!?)(%\w+)\s+", text):
        guard = Register(guarded[2]), bool(guarded[1])
        text = text[guarded.end() :]
    opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    return Instruction(tuple(opcode.strip().split(".")), tuple(map(_operand, _split(rest))), guard, source)


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    return [p.strip() for p in [*parts, part] if p.strip()]


def _operand(text: str):
    if text.startswith("{"):
        return Vector(tuple(map(_operand, _split(text.strip("{} ")))))
    if text.startswith("["):
        base, _, offset = re.sub(r"\s", "", text.strip("[] ")).partition("+")
        return Address(_operand(base), int(offset or "0", 0))
    if "|" in text:
        return Vector(tuple(map(_operand, text.split("|"))))
    if _SPECIAL.match(text):
        return Special(text[1:])
    if text.startswith("%"):
        return Register(text)
    if number := re.match(r"0[fd]([0-9A-Fa-f]+)$", text):
        return Immediate(int(number[1], 16))
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
