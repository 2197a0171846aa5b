"""How far a training's losses are from those of the same training in float64.

Rounding alone makes the losses of two right trainings differ, and training amplifies the difference. So no fixed
tolerance says whether a backend learns what eager PyTorch does. Eager PyTorch itself does, in the same precision: a
backend's losses may be as far from float64's as FACTOR times those of eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

FILE = "learning.csv"
FACTOR = 3
ROUNDING = 2**-23  # of a loss in float32, relative: what a drift is not told from
# steps, counted from 0 and to before the last: what rounding does at once, and what training makes of it
WINDOWS = ((0, 10), (10, 50), (50, 150), (150, None))


def distance(losses: Sequence[float], exact: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return sqrt(sum((a - b) ** 2 for a, b in zip(losses, exact, strict=True)) / len(exact))


def drift(losses: Sequence[float], exact: Sequence[float]) -> list[float]:
    """The distance from `exact` in each of `WINDOWS`, as far as `losses` go."""
    found = []
    for first, last in WINDOWS:
        last = last or len(exact)
        if len(losses) < last or first >= last:
            break
        found.append(distance(losses[first:last], exact[first:last]))
    return found


def allowed(eager: Sequence[float], exact: Sequence[float]) -> float:
    """How far from `exact` a backend may be on the same steps on which eager PyTorch found `eager`."""
    return FACTOR * distance(eager, exact) + ROUNDING * max(exact)


@dataclass
class Run:
    """One training of `FILE`; `about` is its last row, which says how it was made."""

    backend: str
    precision: str
    processes: str
    batch: str
    losses: list[float]
    about: dict[str, str]


def runs(rows: Iterable[dict[str, str]]) -> list[Run]:
    """The trainings of a file, in its order."""
    found: dict[tuple[str, ...], Run] = {}
    for row in rows:
        key = tuple(row[name] for name in ("backend", "precision", "processes", "batch"))
        run = found.setdefault(key, Run(*key, [], row))
        run.losses.append(float(row["loss"]))
        run.about = row
    return list(found.values())


def baseline(found: Iterable[Run], run: Run, precision: str) -> Run:
    """Eager PyTorch's run, in one process, on the same batches as `run`."""
    return next(
        r for r in found if (r.backend, r.precision, r.processes, r.batch) == ("reference", precision, "1", run.batch)
    )
