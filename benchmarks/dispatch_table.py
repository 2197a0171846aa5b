"""The table that dispatch asks on "auto", from the committed CSV files: focalnet_kernels/measured.csv.

    python benchmarks/dispatch_table.py

Of every benchmarks/results/<machine>/*.csv, rows of ops and layers count, forward (inference) and forward+backward.
Kernels slower than 0.97 of eager PyTorch are left out; the others go by their medians, and keep dispatch's own order
where their p20 to p80 overlap. What is not measured counts as slower than eager. Where all shapes of an op, dtype,
direction, width and kernel sizes keep that order, there is no row.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from focalnet_kernels import measured
from focalnet_kernels.bench import records
from focalnet_kernels.bench.cases import OPS
from focalnet_kernels.bench.providers import AUTHORS, BACKENDS

RESULTS = Path(__file__).parent / "results"
LEAST_SPEED = 0.97  # of eager's
QUANTILES = ("p20_ms", "p50_ms", "p80_ms")
NEEDED = {"machine", "level", "case", "shape", "dtype", "mode", "provider", *QUANTILES}
PROVIDERS = {AUTHORS: "reference"} | {f"ours {backend}": backend for backend in BACKENDS}


@click.command()
@click.option("--results", default=RESULTS, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", default=measured.FILE, type=click.Path(dir_okay=False, path_type=Path))
def main(results, output) -> None:
    rows = table(results)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, measured.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{output}: {len(rows)} rows")


def table(results: Path) -> list[dict[str, str]]:
    """measured.csv's rows, from every folder of results."""
    times: dict[tuple, dict[str, list[dict]]] = {}
    for path in sorted(results.glob("*/*.csv")):
        rows = records.read(path)
        if rows and NEEDED <= rows[0].keys():
            for key, backend, row in _figures(rows):
                times.setdefault(key, {}).setdefault(backend, []).append(row)
    groups: dict[tuple, dict[tuple, tuple[list[str], list[str]]]] = {}
    for (*group, batch, map_), found in times.items():
        if "reference" in found and len(found) > 1:
            figures = {backend: _pooled(rows) for backend, rows in found.items()}
            by_default = [backend for backend in (*BACKENDS, "reference") if backend in figures]
            groups.setdefault(tuple(group), {})[batch, map_] = ranked(figures), by_default
    return [
        dict(zip(measured.COLUMNS, (*map(str, (*group, *size)), " ".join(order)), strict=True))
        for group, sizes in sorted(groups.items())
        if any(order != by_default for order, by_default in sizes.values())
        for size, (order, _) in sorted(sizes.items())
    ]


def ranked(figures: dict[str, dict[str, float]]) -> list[str]:
    """The backends not slower than eager, the fastest first, and "reference".

    Args:
        figures: the quantiles in milliseconds, by backend, eager's under "reference".
    """
    slowest = figures["reference"]["p50_ms"] / LEAST_SPEED
    left = [backend for backend in BACKENDS if backend in figures and figures[backend]["p50_ms"] <= slowest]
    order = []
    while left:
        best = min((figures[backend] for backend in left), key=lambda times: times["p50_ms"])
        order.append(next(backend for backend in left if figures[backend]["p20_ms"] <= best["p80_ms"]))
        left.remove(order[-1])
    return [*order, "reference"]


def _figures(rows: Iterable[dict[str, str]]) -> Iterator[tuple[tuple, str, dict[str, float]]]:
    """(key, backend, quantiles); a key has `measured.COLUMNS` but the last."""
    for row in rows:
        op = {"layer": "focal_modulation", "op": row["case"].partition(" ")[0]}.get(row["level"])
        backend = PROVIDERS.get(row["provider"])
        modes = ("forward", "forward+backward")
        if op not in (*OPS, "focal_modulation") or backend is None or row["mode"] not in modes or not row["p20_ms"]:
            continue
        sizes = row["shape"].split("x")
        batch, channels, map_ = sizes[0], *((sizes[1], sizes[2:]) if row["level"] == "op" else (sizes[-1], sizes[1:-1]))
        kernels = re.search(r"k=([\d,]+)", row["case"])
        levels = kernels[1].split(",") if kernels else ()
        kernels = " ".join("x".join([k] * len(map_)) for k in levels)
        key = (row["machine"], op, row["dtype"], row["mode"], int(channels), kernels, int(batch), "x".join(map_))
        yield key, backend, {name: float(row[name]) for name in QUANTILES}


def _pooled(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of a workload that several files or variants have."""
    return {name: statistics.median(row[name] for row in rows) for name in QUANTILES}


if __name__ == "__main__":
    main()
