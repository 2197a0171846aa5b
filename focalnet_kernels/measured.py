"""What was measured: the order in which backends are to be asked, by device and workload.

measured.csv is made from the committed results by benchmarks/dispatch_table.py. A row says for one op, shape and
direction which backends were found faster than eager on a class of devices, the fastest first. A call takes the row of
the nearest shape; where there is none, dispatch keeps its own order. The file is read at the first call that wants it.
"""

from __future__ import annotations

import csv
import functools
import warnings
from math import log2, prod
from pathlib import Path

import torch

from ._machine import device_class

FILE = Path(__file__).with_name("measured.csv")
COLUMNS = ("device", "op", "dtype", "mode", "channels", "kernels", "batch", "map", "backends")
FARTHEST = 1.0  # octaves between a call and the row that it takes


def backends(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    channels: int,
    kernels: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
) -> tuple[str, ...] | None:
    """The backends to ask in turn, "reference" the last; None where nothing near was measured.

    Args:
        training: whether the call's backward will be asked for.
        others: as `Call` has them.

    Rows of the same device, op, dtype, direction, channels and kernels are compared. Their distance is how many
    octaves batch and pixels are away, in sum: the nearest row within `FARTHEST` counts, so within a factor of 2.
    """
    of_device = _rows().get(device_class(device), {}) if _rows() else {}
    size = (shape[0], prod(shape[1:]))
    if not of_device or 0 in size:
        return None
    mode = "forward+backward" if training else "forward"
    rows = of_device.get((op, str(dtype).removeprefix("torch."), mode, channels, kernels), {})
    distance, found = min(
        ((abs(log2(size[0] / b)) + abs(log2(size[1] / p)), order) for (b, p), order in rows.items()),
        default=(FARTHEST + 1, None),
    )
    return found if distance <= FARTHEST else None


# Under torch.compile it is called while tracing, and what it says is a constant: torch.compiler's decorator for this
# does no more, but imports the whole compiler
backends._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _rows() -> dict[str, dict[tuple, dict[tuple[int, int], tuple[str, ...]]]]:
    """By device, then by (op, dtype, mode, channels, kernels), then by (B, pixels)."""
    found: dict = {}
    try:
        with FILE.open(newline="") as file:
            for row in csv.DictReader(file):
                kernels = tuple(_sizes(level) for level in row["kernels"].split())
                key = (row["op"], row["dtype"], row["mode"], int(row["channels"]), kernels)
                order = tuple(row["backends"].split())
                if order[-1] != "reference":
                    raise ValueError(f"expected 'reference' as the last of the backends, got {row['backends']!r}")
                size = (int(row["batch"]), prod(_sizes(row["map"])))
                found.setdefault(row["device"], {}).setdefault(key, {})[size] = order
    except (OSError, ValueError, KeyError, AttributeError, IndexError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"focalnet_kernels chooses backends without {FILE.name}: {reason}", RuntimeWarning, stacklevel=2)
        return {}
    return found


def _sizes(text: str) -> tuple[int, ...]:
    """ "3x5" as (3, 5)."""
    return tuple(map(int, text.split("x")))
