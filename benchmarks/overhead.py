"""The way from a module to its kernel: what calls of a layer cost that has next to nothing to compute.

    python benchmarks/overhead.py           writes results/<machine>/overhead.csv
    python benchmarks/overhead.py --print   only shows the rows

timm's layer of 8 channels on a map of 4x4, three levels: eager, accelerated, its counterpart of ours, the function
below, and the raw op at the bottom, forward alone without gradients and a training step. Microseconds a call, means of
`CALLS` calls, which take turns; quantiles of these means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import timm.models.focalnet
import torch

import focalnet_kernels as fk
from focalnet_kernels.bench.machine import machine
from focalnet_kernels.bench.records import write_rows
from focalnet_kernels.bench.timing import interleaved

RESULTS = Path(__file__).parent / "results"
CALLS, ROUNDS = 100, 31
C, SIDE, WINDOW, LEVELS = 8, 4, 3, 3


def many(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def calls(training: bool) -> dict[str, Callable[[], object]]:
    """By name, the outermost first."""
    torch.manual_seed(0)
    eager = timm.models.focalnet.FocalModulation(C, focal_window=WINDOW, focal_level=LEVELS)
    accelerated = timm.models.focalnet.FocalModulation(C, focal_window=WINDOW, focal_level=LEVELS)
    fk.accelerate(accelerated)
    ours = fk.FocalModulation(C, WINDOW, LEVELS)
    x = torch.randn(1, C, SIDE, SIDE)
    x_last = x.permute(0, 2, 3, 1).contiguous()
    arguments, options = ours.functional_arguments(x_last)
    _, f, f_bias, levels, *others = arguments
    parameters = [f, f_bias, *levels, *others, None, None]
    raw = torch.ops.focalnet_kernels.focal_modulation_fwd

    forwards = {
        "timm": lambda: eager(x),
        "timm accelerated": lambda: accelerated(x),
        "ours": lambda: ours(x_last),
        "focal_modulation": lambda: fk.focal_modulation(*arguments, **options),
    }
    if not training:
        forwards["raw op"] = lambda: raw(x_last, parameters, False, 1e-5, False)[0]
        return {name: many(torch.no_grad()(forward)) for name, forward in forwards.items()}
    return {name: many(lambda forward=forward: forward().sum().backward()) for name, forward in forwards.items()}


def rows() -> list[dict[str, object]]:
    found = []
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for mode in ("forward", "forward+backward"):
            times = interleaved(calls(training=mode != "forward"), ROUNDS)
            for name, quantiles in times.items():
                microseconds = {
                    key.replace("ms", "us"): round(1e3 * value / CALLS, 1) for key, value in quantiles.items()
                }
                found.append({"direction": mode, "threads_used": threads, "call": name, **microseconds})
    return found


@click.command(help=__doc__)
@click.option("--print", "show", is_flag=True, help="Write nothing.")
def main(show: bool) -> None:
    about = machine("cpu")  # before the number of threads is changed
    lines = [row | about for row in rows()]
    for row in lines:
        click.echo(f"{row['direction']:18}{row['threads_used']} threads  {row['call']:20}{row['p50_us']:8.1f} us")
    if show:
        return
    path = RESULTS / str(about["machine"]) / "overhead.csv"
    write_rows(path, lines)
    click.echo(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
