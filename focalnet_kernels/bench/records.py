"""Rows and the machine they were found on, as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MEASURED = (
    "level", "case", "shape", "dtype", "mode", "provider", "p20_ms", "p50_ms", "p80_ms", "images_per_s",
    "peak_bytes", "saved_bytes", "least_bytes", "flops", "gbyte_per_s", "gflop_per_s", "bound_ms", "share_of_bound",
    "skipped",
)  # fmt: skip


def write(path: Path, rows: Iterable[Mapping], machine: Mapping, configuration: Mapping) -> None:
    """`path` (.csv) with machine and configuration in every row; beside it .json, where they stand once.

    Args:
        rows: with keys of `MEASURED`, any of them absent.
        machine: as `machine.machine` has it.
        configuration: the command's options.
    """
    rows = [{key: row.get(key) for key in MEASURED} for row in rows]
    about = {**machine, **{key: _flat(value) for key, value in configuration.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*MEASURED, *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    whole = {"machine": dict(machine), "configuration": dict(configuration), "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    """`path` (.csv) with the columns of the first row: figures that are no measurements of providers."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_writable(path: Path) -> None:
    """Find out before the measuring whether `write` will be able to: an OSError where not. Nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_suffix(".json")):
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; what is absent is ""."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _flat(value):
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
