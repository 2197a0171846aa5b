"""The figures of README and docs/, a report for each machine and its plots, all from the committed CSV files.

    python benchmarks/report.py           writes them
    python benchmarks/report.py --check   exits 1 where a text says something else than its files

In README, docs/*.md and ops' READMEs, what stands between `<!-- KIND ARGUMENTS -->` and `<!-- end -->` is made here.
FILE is below benchmarks/results/, losing rows are never left out, and providers that a machine lacks are named in its
report:

    table FILE MODE COLUMN DIGITS [WORD]   one row per shape and dtype, one column per provider; of cases with that word
    slower FILE ...                 where somebody is faster than the fastest of ours
    behind FILE ...                 where one of the chart's bars is shorter than accelerate()'s
    machine FILE                    what the figures were found on
    plot FILE                       an image
    chart FILE                      README's, no wider on a screen than a column of text
    peers FILE ...                  one row per model, its images per second eager and compiled
    learning FILE                   one row per training, with its distance from float64
    shares FILE                     where the time of an accelerated network goes
    counted FILE OP                 what its GPU kernels issue, and the time that this takes at least
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from math import prod
from pathlib import Path

import drift
import plots

from focalnet_kernels.bench.records import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(
    r"<!-- (table|slower|behind|machine|plot|chart|peers|learning|shares|counted) (.+?) -->\n.*?<!-- end -->", re.S
)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CHART_WIDTH = 450  # pixels: half of the image's
NOWHERE = "Nowhere in these files."
COLUMNS = {
    "p50_ms": ("milliseconds, medians", 1),
    "images_per_s": ("images per second, medians", 1),
    "share_of_bound": ("of what the machine's copy and matrix product allow, percent", 0),
    "peak_bytes": ("memory needed at most beyond what was there, in bytes of x", 1),
    "saved_bytes": ("memory kept for backward, in bytes of x", 1),
}


def is_ours(provider: str) -> bool:
    ours = (" accelerated", " keep_hidden", " packed")
    return provider.startswith(("ours", "FocalNet")) or any(word in provider for word in ours)


def what(row: dict[str, str]) -> str:
    """The left column: everything but shape and dtype only where it says more than they do."""
    case = row.get("case", "")
    name = "" if not case or "stage" in case else case.removeprefix("peers ").removeprefix("model ") + " "
    return f"{row['dtype']} {name}{row['shape']}"


def value(row: dict[str, str], column: str) -> float | None:
    """In the unit of `COLUMNS`; None where there is no figure."""
    if not row.get(column):
        return None
    number = float(row[column])
    if column.endswith("_bytes"):
        return number / (prod(map(int, row["shape"].split("x"))) * ITEMSIZE[row["dtype"]])
    return 100 * number if column == "share_of_bound" else number


def table(rows: list[dict[str, str]], mode: str, column: str, digits: int) -> str:
    """The Markdown table of one mode; nothing for providers without a single figure."""
    rows = [row for row in rows if row.get("mode") == mode and value(row, column) is not None]
    if not rows:
        return f"No figures of {mode}."
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(what(row), {})[row["provider"]] = f"{value(row, column):.{digits}f}"
    lines = [[mode, *providers], *([name, *(found.get(p, "") for p in providers)] for name, found in cells.items())]
    return _markdown(lines)


def peers(rows: Iterable[dict[str, str]]) -> str:
    """The Markdown table of models beside one another, as the paper's of throughputs: medians, images per second."""
    columns = [(mode, compiled) for mode in ("forward", "forward+backward") for compiled in (False, True)]
    found: dict[tuple[str, str], dict[tuple[str, bool], str]] = {}
    for row in rows:
        if row.get("images_per_s"):
            model, compiled, how = row["provider"].partition(" compiled")
            place = row["mode"], bool(compiled)
            model += how  # a mode of compiling that is not the default has a row of its own
            found.setdefault((model, f"{row['dtype']} {row['shape']}"), {})[place] = f"{float(row['images_per_s']):.1f}"
    lines = [["images/s", "", *(f"{mode}{', compiled' * compiled}" for mode, compiled in columns)]]
    lines += [[*name, *(cells.get(column, "") for column in columns)] for name, cells in found.items()]
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], f"|{'---|' * len(lines[0])}", *text[1:]])


def slower(rows: Iterable[dict[str, str]]) -> str:
    """A line for each case and mode in which the fastest of ours is not the fastest. `rows` of one machine alone."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in rows:
        if row.get("mode") and (time := value(row, "p50_ms")) is not None:
            case = f"{row['case']} " if "stage" in row["case"] else ""  # which is all that `what` leaves out
            groups.setdefault((row["mode"], case + what(row)), []).append((time, row["provider"]))
    lines = []
    for (mode, name), times in groups.items():
        ours = min((t for t in times if is_ours(t[1])), default=None)
        best = min(times)
        if ours is not None and ours[0] > best[0]:
            lines.append(f"- {mode}, {name}: {ours[1]} takes {ours[0] / best[0]:.2f} times as long as {best[1]}")
    return "\n".join(lines) or NOWHERE


def slower_by_file(files: dict[str, list[dict[str, str]]]) -> str:
    """As `slower`, each file by itself: figures of two files were not taken side by side, nor on one machine always."""
    found = {name: slower(rows) for name, rows in files.items()}
    return "\n".join(f"In {name}:\n\n{lines}\n" for name, lines in found.items() if lines != NOWHERE).strip() or NOWHERE


def behind(rows: list[dict[str, str]]) -> str:
    """A line for each workload in which something of the chart is faster than `accelerate`, in the chart's words."""
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["mode"] and row["provider"] in plots.CHART_BARS and (time := value(row, "p50_ms")) is not None:
            key = (row["mode"], row["shape"].split("x")[0], row["threads"], row["dtype"])
            groups.setdefault(key, {})[row["provider"]] = time
    lines = []
    for (mode, batch, threads, dtype), times in groups.items():
        ours = times.pop("timm accelerated cpu", None)
        faster = sorted((time, plots.CHART_BARS[name]) for name, time in times.items() if ours and time < ours)
        if faster:
            what = "inference" if mode == "forward" else "a training step"
            counts = [f"{n} {word}{'s' * (n != '1')}" for n, word in ((batch, "image"), (threads, "thread"))]
            ratios = ", ".join(f"{ours / time:.2f} times that of {name}" for time, name in faster)
            lines.append(f"- {what}, {', '.join(counts)}, {dtype}: the time of `accelerate` is {ratios}")
    return "\n".join(lines)


def machine(row: dict[str, str]) -> str:
    """One sentence about what a file's figures were found on."""
    device = row.get("device") or row.get("cpu", "")
    count = "" if row.get("machine", "cpu").startswith("nvidia") else f"{row['threads']} threads of "
    versions = [f"{name} {row[name]}" for name in ("torch", "triton", "timm", "transformers") if row.get(name)]
    made = "".join(f", {word}{row[name]}" for word, name in (("commit ", "commit"), ("", "date")) if row.get(name))
    return f"{count}{device}; {', '.join(versions)}{made}."


def learning(rows: list[dict[str, str]]) -> str:
    """The Markdown table of all trainings: accuracy, and the losses' distance from float64 beside eager PyTorch's."""
    order = ("fp64", "fp32", "bf16")
    found = sorted(drift.runs(rows), key=lambda run: (-int(run.batch), order.index(run.precision), run.processes))
    windows = [f"{first + 1}-{last or ''}" for first, last in drift.WINDOWS]
    lines = [["backend", "precision", "processes", "batch", "steps", "test accuracy", *windows]]
    for run in found:
        exact, eager = (drift.baseline(found, run, precision) for precision in ("fp64", run.precision))
        cells = []
        if run is not exact:
            both = zip(*(drift.drift(r.losses, exact.losses) for r in (run, eager)), strict=False)
            cells = [f"{own:.0e}" if run is eager else f"{own:.0e} ({own / other:.1f})" for own, other in both]
        on = "" if run.about["runs_on"] in ("cpu", "cuda") else f", {run.about['runs_on']}"
        accuracy = run.about["accuracy"]
        shown = f"{100 * float(accuracy):.1f}%" if accuracy else ""
        line = [run.backend + on, run.precision, run.processes, run.batch, str(len(run.losses)), shown, *cells]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    return _markdown(lines)


def overhead(rows: list[dict[str, str]]) -> str:
    """One row per call, a column per direction and number of threads."""
    columns = list(dict.fromkeys((row["direction"], row["threads_used"]) for row in rows))
    times = {(row["call"], row["direction"], row["threads_used"]): row["p50_us"] for row in rows}
    lines = [["call", *(f"{direction}, threads: {threads}" for direction, threads in columns)]]
    for call in dict.fromkeys(row["call"] for row in rows):
        lines.append([call, *(times.get((call, *column), "") for column in columns)])
    return _markdown(lines)


def shares(rows: list[dict[str, str]]) -> str:
    """One row per part of the network; milliseconds, share of the call, and GFLOP/s where it multiplies."""
    columns = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    cells, product = {}, {}
    for row in rows:
        rate = f", {row['gflop_per_s']} GFLOP/s" if row["gflop_per_s"] else ""
        place = row["dtype"], row["direction"]
        cells[row["part"], place] = f"{float(row['p50_ms']):.0f} ({100 * float(row['share']):.0f}%{rate})"
        product[place] = f"{row['product_gflop_per_s']} GFLOP/s"
    lines = [["milliseconds", *(" ".join(column) for column in columns)]]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines.append([part, *(cells.get((part, column), "") for column in columns)])
    lines.append(["a product alone, 2048^3", *(product[column] for column in columns)])
    work = {column: 0.0 for column in columns}  # GFLOP
    for row in rows:
        work[row["dtype"], row["direction"]] += float(row["gflop_per_s"] or 0) * float(row["p50_ms"]) / 1e3
    floors = [f"{1e3 * work[column] / float(product[column].split()[0]):.0f}" for column in columns]
    lines.append(["all of them at that rate", *floors])
    return _markdown(lines)


def counted(rows: list[dict[str, str]], op: str) -> str:
    """One row per stage and direction; per backend the instructions, and the part that binds with its time."""
    chosen = [row for row in rows if row["op"] == op and row["kernel"] == "all"]
    if not chosen:
        return "Not counted yet."
    backends = list(dict.fromkeys(row["backend"] for row in chosen))
    cells = {}
    for row in chosen:
        least = f"{float(row['issue_us']):.0f}, {float(row[row['binds'] + '_us']):.0f} ({row['binds']})"
        cells[row["stage"], row["direction"], row["backend"]] = f"{float(row['instructions']):.0f}: {least}"
    floors = {(row["stage"], row["direction"]): f"{float(row['bytes_us']):.0f}" for row in chosen}
    head = [f"{backend}: instructions, us to issue them, us of what binds" for backend in backends]
    lines = [["stage", "us of the least bytes", *head]]
    for place, floor in floors.items():
        lines.append([" ".join(place), floor, *(cells.get((*place, backend), "") for backend in backends)])
    return _markdown(lines)


def rendered(text: str, root: str = "") -> str:
    """`text` with every block as its files have it. `root`: the way from where the text lies to the project's root."""

    def fresh(match):
        kind, arguments = match.groups()
        return f"<!-- {kind} {arguments} -->\n{_block(kind, arguments.split(), root)}\n<!-- end -->"

    return BLOCK.sub(fresh, text)


def _block(kind: str, arguments: list[str], root: str = "") -> str:
    names = arguments if kind in ("slower", "behind", "peers") else arguments[:1]
    missing = [name for name in names if not (RESULTS / name).exists()]
    if missing:
        return f"Not measured yet: {', '.join(missing)}."
    if kind == "plot":
        return f"![{Path(names[0]).stem}]({root}benchmarks/results/{names[0]})"
    if kind == "chart":
        return f'<img src="{root}benchmarks/results/{names[0]}" width="{CHART_WIDTH}" alt="{plots.CHART_SAYS}">'
    if kind == "slower":
        return slower_by_file({name: read(RESULTS / name) for name in names})
    if kind == "behind":
        return "\n".join(filter(None, (behind(read(RESULTS / name)) for name in names))) or NOWHERE
    rows = [row for name in names for row in read(RESULTS / name)]
    if kind == "peers":
        return peers(rows)
    if kind == "machine":
        return machine(rows[0])
    if kind == "learning":
        return learning(rows)
    if kind == "shares":
        return shares(rows)
    if kind == "counted":
        return counted(rows, arguments[1])
    mode, column, digits, *words = arguments[1:]
    return table([row for row in rows if all(word in row["case"] for word in words)], mode, column, int(digits))


def report(folder: Path) -> str:
    """Everything that a machine's files say, as Markdown."""
    lines = [f"# {folder.name}", "", "Made by `python benchmarks/report.py` from the CSV files beside it.", ""]
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        if path.name == drift.FILE:
            about = "Learning digits; columns of steps: distance of the losses from float64's (over eager PyTorch's)."
            lines += [f"## {path.name}", "", machine(rows[-1]), about, "", learning(rows), ""]
        if path.name == "overhead.csv":
            about = "Microseconds of a call that has next to nothing to compute, medians: benchmarks/overhead.py."
            lines += [f"## {path.name}", "", machine(rows[0]), about, "", overhead(rows), ""]
        if path.name == "host.csv":
            about = "Microseconds of a CPU until a GPU's launches are with the driver, medians: benchmarks/host.py."
            cells = [[f"{r['op']} {r['direction']}", r["backend"], r["launches"], r["p50_us"]] for r in rows]
            lines += [f"## {path.name}", "", machine(rows[0]), about, ""]
            lines += [_markdown([["", "backend", "launches", "us"], *cells]), ""]
        if path.name == "shares.csv":
            about = "FocalNet-T of timm, accelerated, 8 images: benchmarks/shares.py."
            lines += [f"## {path.name}", "", machine(rows[0]), about, "", shares(rows), ""]
        for op in dict.fromkeys(row["op"] for row in rows if "instructions" in row):
            about = (
                "Per 128 outputs; times for 128 images on an H100 at least: python -m focalnet_kernels check --count."
            )
            lines += [f"## {path.name}: {op}", "", about, "", counted(rows, op), ""]
        if "mode" not in rows[0]:
            continue
        lines += [f"## {path.name}", "", machine(rows[0]), ""]
        for row in rows:
            if row.get("level") == "ceiling":
                rate, unit = (row[k] for k in ("gbyte_per_s", "gflop_per_s")), ("GB/s", "GFLOP/s")
                found = next(f"{r} {u}" for r, u in zip(rate, unit, strict=True) if r)
                lines.append(f"- {row['case']} {row['dtype']} by {row['provider']}: {found}")
        modes = list(dict.fromkeys(row["mode"] for row in rows if row["mode"]))
        for column, (unit, digits) in COLUMNS.items():
            tables = [table(rows, mode, column, digits) for mode in modes]
            found = [t for t in tables if t.startswith("|")]
            lines += ["", f"### {path.stem}: {unit}", "", "\n\n".join(found)] if found else []
        lines += ["", f"### {path.stem}: where we are slower", "", slower(rows), ""]
        reasons = dict.fromkeys(f"- {row['provider']}: {row['skipped']}" for row in rows if row.get("skipped"))
        lines += ["No figure for:", "", *reasons, ""] if reasons else []
    for image in plots.names(folder):
        lines += [f"![{image.removesuffix('.png')}]({image})", ""]
    return "\n".join(lines)


def texts() -> dict[Path, str]:
    """Every text that is made here, as it has to be."""
    found = {folder / "README.md": report(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()}
    found[ROOT / "README.md"] = rendered((ROOT / "README.md").read_text())
    pages = sorted((ROOT / "docs").glob("*.md"))
    of_ops = sorted((ROOT / "focalnet_kernels/ops").glob("*/README.md"))
    found |= {page: rendered(page.read_text(), "../../../") for page in of_ops}
    return found | {page: rendered(page.read_text(), "../") for page in pages}


def main() -> None:
    if "--check" in sys.argv:
        stale = [path for path, text in texts().items() if not path.exists() or path.read_text() != text]
        sys.exit(
            f"stale: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run benchmarks/report.py" if stale else 0
        )
    for folder in sorted(RESULTS.iterdir()):
        if folder.is_dir():
            plots.draw(folder)
    for path, text in texts().items():  # after the plots, which they show where they are
        path.write_text(text)


if __name__ == "__main__":
    main()
