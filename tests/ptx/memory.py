"""Memory that knows who touched it: bounds, alignment, and accesses that no barrier keeps apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Fault(Exception):
    """What a GPU would stop at, or do something undefined."""


class Region(NamedTuple):
    """`last_write`, `last_read`: tags of each 2 bytes; `shared`: whether several warps have read since the barrier."""

    name: str
    base: int
    data: np.ndarray
    last_write: np.ndarray
    last_read: np.ndarray
    readers: np.ndarray


SHARED_WINDOW = 1 << 56  # added to an address in shared memory where it does not say itself of which memory it is
UNIT = 2  # bytes that have one tag
_CTA, _EPOCH = 40, 8  # a tag's bits: block, barriers that it has passed, warp


def tags(cta: np.ndarray, epoch: int, warp: int) -> np.ndarray:
    """Of the lanes of a warp in several blocks: 0 is nobody's."""
    return ((cta.astype(np.int64) + 1) << _CTA) | (epoch << _EPOCH) | warp


class Memory:
    """Regions of bytes at addresses. `races`: what was found, by instruction; `meter`: is told of every access;
    `apart`: regions may stand one behind the other, and no instruction means two of them."""

    def __init__(self, races: dict[str, str], meter: Callable | None = None, apart: bool = False):
        self.meter, self.apart = meter, apart
        self.regions: list[Region] = []  # by where they begin
        self.bases = np.zeros(0, np.int64)
        self.races = races

    def add(self, name: str, base: int, data: np.ndarray) -> None:
        """`data`: bytes, read and written in place."""
        shadows = [np.zeros(-(-data.size // UNIT), dtype) for dtype in (np.int64, np.int64, bool)]
        at = int(np.searchsorted(self.bases, base))
        self.regions.insert(at, Region(name, base, data, *shadows))
        self.bases = np.insert(self.bases, at, base)

    def load(self, address: np.ndarray, size: int, who: np.ndarray, where) -> np.ndarray:
        """(lanes,) addresses -> (lanes, size) bytes."""
        value = np.empty((len(address), size), np.uint8)
        if self.meter:
            self.meter("load", address, size, who, where)
        for region, lanes, at in self._find(address, size, "load", where):
            self._touch(region, at, size, who[lanes], where)
            value[lanes] = region.data[at[:, None] + np.arange(size)]
        return value

    def store(self, address: np.ndarray, value: np.ndarray, who: np.ndarray, where) -> None:
        size = value.shape[1]
        if self.meter:
            self.meter("store", address, size, who, where)
        for region, lanes, at in self._find(address, size, "store", where):
            mine, whose = value[lanes], who[lanes]
            self._check_lanes(region, at, mine, whose, where)
            places = at[:, None] + np.arange(size)
            self._touch(region, at, size, whose, where, (region.data[places] == mine).all(1))
            region.data[places] = mine

    def _check_lanes(self, region: Region, at: np.ndarray, value: np.ndarray, who: np.ndarray, where) -> None:
        """Lanes of several blocks that write different values to one place with one instruction. (Of a warp's lanes one
        wins; Triton has those that hold the same sum, added in another order, write it together.)"""
        order = np.argsort(at, kind="stable")
        at, value, who = at[order], value[order], who[order]
        bad = (at[1:] == at[:-1]) & (who[1:] != who[:-1]) & (value[1:] != value[:-1]).any(1)
        if bad.any():
            message = f"byte {int(at[1:][bad][0])} of {region.name} is written by two blocks at once"
            self.races.setdefault(str(where), message)

    def _find(self, address: np.ndarray, size: int, what: str, where) -> Iterator[tuple[Region, Any, np.ndarray]]:
        """(region, its lanes, where in it) of each region that is meant: by the nearest beginning below an address."""
        if (address % size).any():
            raise Fault(f"misaligned {what} of {size} bytes at {hex(int(address[address % size != 0][0]))}: {where}")
        which = np.searchsorted(self.bases, address, "right") - 1
        if which[0] == which[-1] and (which == which[0]).all():
            groups = [(int(which[0]), slice(None))]
        else:
            groups = [(int(i), which == i) for i in np.unique(which)]
        if self.apart and len(groups) > 1:
            names = [self.regions[i].name if i >= 0 else "no memory" for i, _ in groups]
            raise Fault(f"{what} of {' and '.join(names)} at once: {where}")
        for i, lanes in groups:
            if i < 0:
                raise Fault(f"{what} at {hex(int(address[lanes][0]))}, where there is no memory: {where}")
            region = self.regions[i]
            at = address[lanes] - region.base
            outside = at + size > region.data.size
            if outside.any():
                wrong = int(at[outside][0])
                raise Fault(f"{what} at byte {wrong} of {region.name}, which has {region.data.size}: {where}")
            yield region, lanes, at

    def _touch(self, region: Region, at: np.ndarray, size: int, who: np.ndarray, where, same: np.ndarray | None = None):
        """`same`: of a store, the lanes that change nothing, which may meet another's access: none can see them."""
        units = at[:, None] // UNIT + np.arange(max(1, size // UNIT))
        mine = np.broadcast_to(who[:, None], units.shape)
        written, read = region.last_write[units], region.last_read[units]
        before = _unordered(written, mine)
        if same is not None:
            before &= ~same[:, None]
        self._report(region, units, before, where, "written" if same is not None else "read", "a write")
        if same is None:
            together = _same_epoch(read, mine)
            region.readers[units] = together & ((read != mine) | region.readers[units])
            region.last_read[units] = mine
        else:
            many = region.readers[units] & _same_epoch(read, mine)
            before = _unordered(read, mine) | many
            self._report(region, units, before & ~same[:, None], where, "written", "a read")
            region.last_write[units[~same]] = mine[~same]

    def _report(self, region: Region, units: np.ndarray, bad: np.ndarray, where, what: str, after: str) -> None:
        if bad.any():
            message = f"byte {int(units[bad][0]) * UNIT} of {region.name} is {what} after {after} by another warp"
            self.races.setdefault(str(where), message)


def _same_epoch(tag: np.ndarray, mine: np.ndarray) -> np.ndarray:
    return (tag != 0) & (tag >> _EPOCH == mine >> _EPOCH)


def _unordered(tag: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Whether nothing orders an earlier access before mine: another warp's since the last barrier, another block's."""
    return (tag != 0) & (tag != mine) & ((tag >> _EPOCH == mine >> _EPOCH) | (tag >> _CTA != mine >> _CTA))
