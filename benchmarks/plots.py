"""The plots of one machine's CSV files."""

from __future__ import annotations

from pathlib import Path

import drift

from focalnet_kernels.bench.records import read

COLOURS = {
    "authors' form": "#9aa5b1", "timm": "#4c78a8", "timm channels_last": "#72a0d0", "transformers": "#b279a2",
    "swin": "#e0a458", "convnext": "#c96f5b", "focalnet": "#4c78a8",
}  # fmt: skip
OURS, COMPILED = "#2a9d5c", "//"
# by file: the image, what its bars show, and the modes of its panels
BARS = {
    "layers.csv": ("layers.png", "p50_ms", "ms, median", ("forward", "forward+backward")),
    "model.csv": ("model.png", "images_per_s", "images/s", ("forward", "forward+backward")),
    "peers.csv": ("peers.png", "images_per_s", "images/s", ("forward", "forward+backward")),
    "peers_larger.csv": ("peers_larger.png", "images_per_s", "images/s", ("forward", "forward+backward")),
}
# README's: rows of panels, from top to bottom, each with its file and mode; and the bars' names
CHART = "chart.png"
CHART_ROWS = (
    ("training.csv", "forward+backward", "Training step"),
    ("engines.csv", "forward", "Inference"),
    ("engines_one_image.csv", "forward", "Inference"),
)
CHART_BARS = {
    "timm": "PyTorch (timm)", "timm compiled": "torch.compile", "timm frozen": "compile + freezing",
    "ONNX Runtime": "ONNX Runtime", "OpenVINO": "OpenVINO", "timm accelerated cpu": "accelerate()",
}  # fmt: skip
CHART_SAYS = "FocalNet-T on a CPU: milliseconds of a training step and of inference, by provider"
ROOFLINE = ("roofline.png", ("ops.csv", "layers.csv"))
LEARNING = "learning.png"
BACKENDS = {"reference": "#4c78a8", "cpu": OURS, "cuda": "#c96f5b", "triton": "#b279a2"}


def names(folder: Path) -> list[str]:
    """The images that `draw` makes from the files that are there."""
    found = [image for file, (image, *_) in BARS.items() if (folder / file).exists()]
    found += [CHART] if _has_chart(folder) else []
    found += [LEARNING] if (folder / drift.FILE).exists() else []
    return found + ([ROOFLINE[0]] if _ceilings(folder) else [])


def draw(folder: Path) -> None:
    for file, (image, column, unit, modes) in BARS.items():
        if (folder / file).exists():
            _bars(read(folder / file), column, unit, modes).savefig(folder / image, dpi=130)
    if _has_chart(folder):
        _chart(folder).savefig(folder / CHART, dpi=200)
    if (folder / drift.FILE).exists():
        _learning(read(folder / drift.FILE)).savefig(folder / LEARNING, dpi=130)
    if _ceilings(folder):
        _roofline(folder).savefig(folder / ROOFLINE[0], dpi=130)


def _figure(*size):
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _style(provider: str) -> dict:
    ours = provider.startswith("ours") or " accelerated" in provider
    known = sorted((key for key in COLOURS if provider.startswith(key)), key=len)
    colour = OURS if ours else COLOURS[known[-1]] if known else "#777777"
    return {"color": colour, "hatch": COMPILED if "compiled" in provider else None, "edgecolor": "white"}


def _bars(rows, column, unit, modes):
    """A panel for each dtype and mode, a group for each shape, a bar for each provider; lines from p20 to p80."""
    rows = [row for row in rows if row.get("mode") in modes and row.get("p50_ms")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = _figure(6.5 * len(modes), 3.4 * len(dtypes))
    panels = figure.subplots(len(dtypes), len(modes), squeeze=False)
    for (dtype, mode), panel in zip(((d, m) for d in dtypes for m in modes), panels.flat, strict=True):
        shown = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        groups = list(dict.fromkeys((row.get("case", ""), row["shape"]) for row in shown))
        providers = list(dict.fromkeys(row["provider"] for row in shown))
        width = 0.85 / max(1, len(providers))
        for i, provider in enumerate(providers):
            own = {(row.get("case", ""), row["shape"]): row for row in shown if row["provider"] == provider}
            at = [j + (i - (len(providers) - 1) / 2) * width for j, group in enumerate(groups) if group in own]
            found = [own[group] for group in groups if group in own]
            heights = [_height(row, column, "p50_ms") for row in found]
            spread = [sorted(_height(row, column, p) for p in ("p20_ms", "p80_ms")) for row in found]
            errors = [[max(0, h - s[0]) for h, s in zip(heights, spread, strict=True)],
                      [max(0, s[1] - h) for h, s in zip(heights, spread, strict=True)]]  # fmt: skip
            panel.bar(at, heights, width, yerr=errors, label=provider, error_kw={"lw": 0.8}, **_style(provider))
        panel.set_xticks(range(len(groups)), [shape for _, shape in groups], fontsize=8)
        panel.set_title(f"{dtype}, {mode}", fontsize=9)
        panel.set_ylabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].legend(frameon=False, fontsize=7)
    if rows:
        figure.suptitle(f"{rows[0].get('device') or rows[0].get('cpu')}, {rows[0]['threads']} threads", fontsize=9)
    return figure


def _has_chart(folder: Path) -> bool:
    return all((folder / file).exists() for file, *_ in CHART_ROWS)


def _chart(folder: Path):
    """A row of panels for each of `CHART_ROWS`, a column for each dtype, a bar for each of `CHART_BARS`: medians.

    Narrow, in large letters and on white, for phones and dark pages. No bar is left out for being shorter than ours.
    """
    files = {file: read(folder / file) for file, *_ in CHART_ROWS}
    dtypes = list(dict.fromkeys(row["dtype"] for rows in files.values() for row in rows if row["mode"]))
    times = {
        (file, row["dtype"], row["provider"]): float(row["p50_ms"])
        for (file, mode, _) in CHART_ROWS
        for row in files[file]
        if row["mode"] == mode and row["p50_ms"]
    }
    bars = [[name for name in CHART_BARS if any((file, d, name) in times for d in dtypes)] for file, *_ in CHART_ROWS]
    figure = _figure(4.5, 0.9 + 0.21 * sum(map(len, bars)) + 0.42 * len(bars))
    panels = figure.subplots(
        len(bars), len(dtypes), squeeze=False, gridspec_kw={"height_ratios": [len(names) for names in bars]}
    )
    for (file, _, title), names, line in zip(CHART_ROWS, bars, panels, strict=True):
        batch = int(files[file][0]["shape"].split("x")[0])
        for dtype, panel in zip(dtypes, line, strict=True):
            found = [times.get((file, dtype, name)) for name in names]
            colours = [OURS if " accelerated" in name else "#9aa5b1" for name in names]
            longest = max(time for time in found if time is not None)
            for place, (time, colour) in enumerate(zip(found, colours, strict=True)):
                text = "no figure" if time is None else f"{time:.0f}"
                weight = "bold" if colour == OURS else "normal"
                panel.barh(place, time or 0, color=colour, height=0.78)
                panel.text((time or 0) + 0.03 * longest, place, text, va="center", fontsize=8.5, weight=weight)
            panel.set(xlim=(0, 1.28 * longest), ylim=(len(names) - 0.5, -0.5), xticks=[], yticks=[])
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.set_title(f"{title}, {batch} image{'s' * (batch > 1)}\n{dtype}, ms", fontsize=8.5, loc="left")
        line[0].set_yticks(range(len(names)), [CHART_BARS[name] for name in names], fontsize=9)
        line[0].tick_params(axis="y", length=0)
        line[0].get_yticklabels()[-1].set_weight("bold")
    row = files["engines.csv"][0]
    figure.suptitle(f"FocalNet-T LRF, {row['threads']} threads of {row['device']}. Shorter is faster.", fontsize=9)
    return figure


def _height(row, column: str, percentile: str) -> float:
    time = float(row[percentile])
    if column != "images_per_s":
        return time
    return 1e3 * int(row["shape"].split("x")[0]) / time


def _ceilings(folder: Path) -> dict:
    """The best rate of each ceiling in a folder's files: {("copy" or "product", dtype): GB/s or GFLOP/s}."""
    best: dict = {}
    for file in ROOFLINE[1]:
        if (folder / file).exists():
            for row in read(folder / file):
                if row.get("level") == "ceiling":
                    rate = float(row["gbyte_per_s"] or row["gflop_per_s"])
                    key = (row["case"], row["dtype"])
                    best[key] = max(rate, best.get(key, 0))
    return best


def _roofline(folder: Path):
    """FLOPs per byte against GFLOP/s: the roofs as measured, our forward passes and the authors' form's below them."""
    ceilings = _ceilings(folder)
    dtypes = [dtype for kind, dtype in ceilings if kind == "product"]
    rows = [row for file in ROOFLINE[1] if (folder / file).exists() for row in read(folder / file)]
    rows = [row for row in rows if row.get("mode") == "forward" and row.get("gflop_per_s")]
    figure = _figure(6 * len(dtypes), 4.2)
    copy = ceilings["copy", "float32"]
    for dtype, panel in zip(dtypes, figure.subplots(1, len(dtypes), squeeze=False).flat, strict=True):
        shown = [row for row in rows if row["dtype"] == dtype]
        x = [float(row["flops"]) / float(row["least_bytes"]) for row in shown]
        roof = [min(x, default=1) / 2, ceilings["product", dtype] / copy, max(x, default=1) * 2]
        roof.sort()
        panel.plot(roof, [min(i * copy, ceilings["product", dtype]) for i in roof], color="black", lw=1)
        for kind, marker in (("ours", "o"), ("authors' form", "x")):
            of_kind = [(i, row) for i, row in zip(x, shown, strict=True) if _plotted(row["provider"]) == kind]
            for op, colour in (("focal_context", "#c96f5b"), ("modulate", "#e0a458"), ("layer", OURS)):
                points = [(i, float(r["gflop_per_s"])) for i, r in of_kind if _op(r) == op]
                if points:
                    panel.scatter(*zip(*points, strict=True), marker=marker, color=colour, s=24, label=f"{op}, {kind}")
        panel.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
        panel.set_title(f"{dtype}, forward", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    return figure


def _learning(rows):
    """The losses of all trainings; and, for each precision, how far from float64's they are."""
    runs = drift.runs(rows)
    precisions = [p for p in dict.fromkeys(run.precision for run in runs) if p != "fp64"]
    figure = _figure(5.2 * (1 + len(precisions)), 4.2)
    whole, *panels = figure.subplots(1, 1 + len(precisions))
    for run in runs:
        about = run.about["runs_on"]
        complete = run.about["accuracy"]
        label = run.backend + (", 2 processes" if run.processes == "2" else "")
        label += "" if about in ("cpu", "cuda") else f", {about}"
        label += "" if complete else f", batch {run.batch}, {len(run.losses)} steps"
        style = {"color": BACKENDS[run.backend], "lw": 1.2, "ls": ":" if run.processes == "2" else "-"}
        steps = range(1, len(run.losses) + 1)
        if run.precision == "fp64":
            style |= {"color": "black", "ls": "-"}
        if complete:
            whole.plot(steps, run.losses, label=f"{label}, {run.precision}", **style)
        if run.precision in precisions:
            exact = drift.baseline(runs, run, "fp64").losses
            tens = [slice(max(0, i - 10), i) for i in steps]  # a single difference may be 0 by chance
            apart = [drift.distance(run.losses[ten], exact[ten]) for ten in tens]
            panels[precisions.index(run.precision)].plot(steps, apart, label=label, **style)
    whole.set(yscale="log", xlabel="step", ylabel="loss", title="trained to the end")
    for panel, precision in zip(panels, precisions, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="step", title=f"{precision}: distance of the loss from float64's")
    for panel in (whole, *panels):
        panel.title.set_fontsize(9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    return figure


def _plotted(provider: str) -> str:
    return "ours" if provider.startswith("ours") else provider


def _op(row) -> str:
    return row["case"].split()[0] if row["level"] == "op" else row["level"]
