"""README's tables from the committed CSV files.

    python benchmarks/report.py           writes them
    python benchmarks/report.py --check   exits 1 where README says something else

A table stands between `<!-- table FILE MODE DIGITS -->` and `<!-- end -->`: the medians of MODE in FILE, in
milliseconds with DIGITS decimals, one row per dtype and shape, one column per provider, none left out.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"<!-- table (\S+) (\S+) (\d) -->\n.*?<!-- end -->", re.S)


def table(path: Path, mode: str, digits: int) -> str:
    """The Markdown table of one mode of one file."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == mode]
    if not rows:
        raise ValueError(f"{path.name} has no rows of mode {mode!r}")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(f"{row['dtype']} {row['shape']}", {})[row["provider"]] = f"{float(row['p50_ms']):.{digits}f}"
    lines = [" | ".join([mode, *providers]), "|".join(["---"] * (1 + len(providers)))]
    lines += [" | ".join([what, *(times[p] for p in providers)]) for what, times in cells.items()]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def rendered(text: str) -> str:
    """`text` with every table as its file has it."""

    def fresh(match):
        name, mode, digits = match.groups()
        body = table(ROOT / "benchmarks/results" / name, mode, int(digits))
        return f"<!-- table {name} {mode} {digits} -->\n{body}\n<!-- end -->"

    return TABLE.sub(fresh, text)


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rendered(before)
    if "--check" in sys.argv:
        sys.exit(before != after and "README.md: a table differs from its file; run benchmarks/report.py")
    readme.write_text(after)


if __name__ == "__main__":
    main()
