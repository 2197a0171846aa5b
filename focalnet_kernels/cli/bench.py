"""`bench`: how fast the layer is, by itself and within models, beside what people use today."""

from __future__ import annotations

import datetime
import fnmatch
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bench import records
from ..bench.cases import LEVELS, TARGETS, Case, cases
from ..bench.machine import machine
from ..bench.memory import HostMemory
from ..bench.providers import COMPILE_MODES, Provider, providers
from ..bench.roofline import ceilings
from ..bench.runner import WARM, run_case
from ..bench.steps import MODES
from . import options

DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.option("--level", "levels", multiple=True, default=("layer",), show_default=True, type=click.Choice(LEVELS))
@click.option(
    "--target", "targets", multiple=True, default=("focalnet_tiny_lrf",), show_default=True,
    help="A variant, detection, video, a pattern such as '*_srf', or 'all'.",
)  # fmt: skip
@click.option("--mode", "modes", multiple=True, default=MODES, show_default=True, type=click.Choice(MODES))
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES[:2], show_default=True, type=click.Choice(DTYPES))
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--size", default="224", show_default=True, type=options.ImageSize(),
    help="Pixels a side, or HEIGHTxWIDTH; 0: as published.",
)  # fmt: skip
@click.option("--stage", "stages", multiple=True, type=int, help="Of layers and blocks, from 1. Default: all.")
@click.option("--provider", "patterns", multiple=True, default=("*",), help="Patterns of provider names. Default: all.")
@click.option("--compile", "compile_modes", multiple=True, type=click.Choice(COMPILE_MODES), help="Also compiled, so.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=3))
@options.device
@click.option("--memory/--no-memory", default=True, show_default=True, help="Peak memory, in processes of their own.")
@click.option(
    "--roofline/--no-roofline", default=True, show_default=True, help="Measure ceilings, show shares of them."
)
@click.option("--output", default="bench.csv", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="List what would be timed, and what not and why.")
def bench(
    levels, targets, modes, dtypes, batch, size, stages, patterns, compile_modes, rounds, device, memory, roofline,
    output, dry_run,
) -> None:  # fmt: skip
    """Time ops, layers, blocks and models: forward, backward, and both.

    Every provider is first held to the error rule, forward and backward: who fails gets no figure. Then they run
    in turns in one process, so that drift hits all alike. Figures are p20, p50 and p80 of the rounds, images/s, peak
    memory, the bytes kept for backward, and the share of what the machine's copy and matrix product would allow.
    """
    console = Console()
    wanted = {
        "dtypes": [getattr(torch, name) for name in dtypes],
        "batch": batch,
        "size": size,
        "device": device,
    }
    try:
        found_cases = list(cases(levels, _targets(targets), **wanted))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--size") from error
    todo = [
        (case, [p for p in providers(case, compile_modes) if any(fnmatch.fnmatchcase(p.name, t) for t in patterns)])
        for case in found_cases
        if not (stages and case.stage and case.stage not in stages)
    ]
    if not any(found for _, found in todo):
        raise click.UsageError("there is no such case or provider; --dry-run without further options lists some")
    if dry_run:
        _list(console, todo)
        return
    _check_output(output)
    about = machine(device) | {"date": datetime.date.today().isoformat()}
    configuration = {
        "levels": levels, "targets": targets, "batch": batch, "size": size, "rounds": rounds, "compile": compile_modes,
    }  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict] = []
    try:
        with (
            Progress(*columns, console=console, transient=True) as progress,
            HostMemory(memory and device == "cpu") as host,
        ):
            turns = len(modes) * (rounds + WARM)
            bar = progress.add_task("ceilings", total=turns * sum(len(found) for _, found in todo))
            reached = None
            if roofline:
                reached, rows = ceilings(wanted["dtypes"], device, rounds)
            done = 0
            for case, found in todo:
                labels = case.labels()
                now = f"{labels['case']} {labels['shape']} {labels['dtype']}"
                progress.update(bar, description=now, completed=done)
                done += turns * len(found)
                rows.extend(  # one by one: those before an interruption stay
                    run_case(
                        case, found, modes=modes, rounds=rounds, ceilings=reached, host_memory=host,
                        tick=lambda: progress.advance(bar),
                    )
                )  # fmt: skip
                records.write(output, rows, about, configuration)
    finally:  # an interrupted run keeps what it found
        if rows:
            records.write(output, rows, about, configuration)
            _show(console, rows)
            console.print(f"wrote {output} and {output.with_suffix('.json')}", highlight=False, soft_wrap=True)


def _targets(patterns) -> list[str]:
    found = [t for t in TARGETS if any(p == "all" or fnmatch.fnmatchcase(t, p) for p in patterns)]
    if not found:
        raise click.BadParameter(f"expected 'all' or some of {', '.join(TARGETS)}", param_hint="--target")
    return found


def _check_output(output: Path) -> None:
    """Whether the figures can be written is known before they are measured."""
    if output.suffix == ".json":
        raise click.BadParameter(
            f"{output}: expected the CSV file's name; .json stands beside it", param_hint="--output"
        )
    try:
        records.check_writable(output)
    except OSError as error:
        raise click.BadParameter(f"{output}: cannot be written: {error}", param_hint="--output") from error


def _list(console: Console, todo: list[tuple[Case, list[Provider]]]) -> None:
    for case, found in todo:
        labels = case.labels()
        console.print(f"{labels['level']}: {labels['case']} {labels['shape']} {labels['dtype']}", soft_wrap=True)
        for provider in found:
            reason = provider.why_not(case)
            text = f"    {provider.name}" + (f"    skipped: {reason}" if reason else "")
            console.print(text, highlight=False, soft_wrap=True, markup=False)


def _show(console: Console, rows: list[dict]) -> None:
    """A table for each case: milliseconds, and how many times as long as the fastest of ours."""
    timed = [row for row in rows if row["level"] != "ceiling"]
    for name in dict.fromkeys((row["case"], row["shape"], row["dtype"]) for row in timed):
        of_case = [row for row in timed if (row["case"], row["shape"], row["dtype"]) == name]
        modes = list(dict.fromkeys(row["mode"] for row in of_case))
        table = Table("", *modes, "peak MB", "kept MB", title=f"{' '.join(name)}: milliseconds (share of the bound)")
        for provider in dict.fromkeys(row["provider"] for row in of_case):
            own = {row["mode"]: row for row in of_case if row["provider"] == provider}
            if reason := next(iter(own.values())).get("skipped"):
                table.add_row(provider, f"[dim]{reason}")
                continue
            memory = [
                max((row.get(key) or 0 for row in own.values()), default=0) for key in ("peak_bytes", "saved_bytes")
            ]
            table.add_row(
                provider, *(_cell(own[mode]) for mode in modes), *(f"{m / 1e6:.1f}" if m else "" for m in memory)
            )
        console.print(table)


def _cell(row: dict) -> str:
    share = row.get("share_of_bound")
    return f"{row['p50_ms']:.2f}" + (f" ({share:.0%})" if share else "")
