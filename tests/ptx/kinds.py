"""The types in opcodes: from the bits in registers to numbers and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


class Kind(NamedTuple):
    """`decode`: (lanes,) bits -> numbers; `encode`: the way back, rounding to nearest even."""

    name: str
    bits: int
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]


def bf16_decode(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_encode(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def f16_decode(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def f16_encode(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float16).view(np.uint16)


def _view(name: str, dtype: str) -> Kind:
    number = np.dtype(dtype)
    unsigned = UNSIGNED[8 * number.itemsize]
    return Kind(
        name, 8 * number.itemsize, lambda bits: bits.view(number), lambda x: np.asarray(x).astype(number).view(unsigned)
    )


def _pair(name: str, decode: Callable, encode: Callable) -> Kind:
    """Two 16-bit numbers in 32 bits: (lanes, 2)."""
    return Kind(
        name,
        32,
        lambda bits: decode(np.ascontiguousarray(bits).view(np.uint16)).reshape(-1, 2),
        lambda x: np.ascontiguousarray(encode(x)).view(np.uint32)[:, 0],
    )


KINDS = {
    kind.name: kind
    for kind in (
        *[_view(f"{letter}{bits}", f"{form}{bits // 8}") for letter, form in (("u", "u"), ("b", "u"), ("s", "i"))
          for bits in (8, 16, 32, 64)],
        _view("f32", "f4"),
        _view("f64", "f8"),
        Kind("pred", 1, lambda bits: bits, lambda x: np.asarray(x, bool)),
        Kind("bf16", 16, bf16_decode, bf16_encode),
        Kind("f16", 16, f16_decode, f16_encode),
        _pair("bf16x2", bf16_decode, bf16_encode),
        _pair("f16x2", f16_decode, f16_encode),
    )
}  # fmt: skip


def kinds_in(opcode: tuple[str, ...]) -> list[Kind]:
    """The types that an opcode names, in order."""
    return [KINDS[part] for part in opcode[1:] if part in KINDS]
