"""The CPU's part of a layer on a GPU: what Python takes until the launches are with the driver. No GPU is needed.

    python benchmarks/host.py           writes results/<machine>/host.csv
    python benchmarks/host.py --print   only shows the rows

The raw op's implementation by Triton, on CPU tensors of few pixels; a driver of an H100 that is not there takes the
launches (tests/absent_gpu.py). Its matrix products, PyTorch's, run and count: of 32 channels and 32 pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from absent_gpu import Handed, absent_gpu  # noqa: E402

from focalnet_kernels.bench.machine import machine  # noqa: E402
from focalnet_kernels.bench.records import write_rows  # noqa: E402
from focalnet_kernels.bench.timing import interleaved  # noqa: E402
from focalnet_kernels.ops.focal_context import triton_launch as context  # noqa: E402
from focalnet_kernels.ops.focal_modulation import triton_launch as layer  # noqa: E402
from focalnet_kernels.testing import layer_tensors, make_context_inputs, make_layer_inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CALLS, ROUNDS = 100, 31
C, MAP, KERNELS = 32, (4, 8), (3, 5, 7)


def calls() -> dict[tuple[str, str], Callable[[], object]]:
    """By op and direction."""
    options = {"dtype": torch.bfloat16, "seed": 0}
    ctx, gates, weights = make_context_inputs((1, C, *MAP), KERNELS, **options).values()
    x, parameters = layer_tensors(make_layer_inputs((1, *MAP, C), KERNELS, **options))
    all_inputs = (1 << 1 + len(parameters)) - 1
    _, saved = layer.focal_modulation_fwd_impl(x, parameters, False, 1e-5, True)
    return {
        ("focal_context", "forward"): lambda: context.focal_context_fwd_impl(ctx, gates, weights, False),
        ("focal_modulation", "forward"): lambda: layer.focal_modulation_fwd_impl(x, parameters, False, 1e-5, False),
        ("focal_modulation", "backward"): lambda: layer.focal_modulation_bwd_impl(
            x, x, parameters, *saved, False, 1e-5, all_inputs
        ),
    }


def rows() -> list[dict[str, object]]:
    launched: list[Handed] = []
    with absent_gpu(launched):
        work = calls()
        launches = {}
        for name, call in work.items():
            launched.clear()
            call()
            launches[name] = len(launched)

        def many(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(CALLS):
                    call()
                launched.clear()

            return run

        times = interleaved({name: many(call) for name, call in work.items()}, ROUNDS)
    return [
        {"op": op, "direction": direction, "launches": launches[op, direction]}
        | {key.replace("ms", "us"): round(1e3 * value / CALLS, 1) for key, value in times[op, direction].items()}
        for op, direction in work
    ]


@click.command(help=__doc__)
@click.option("--print", "show", is_flag=True, help="Write nothing.")
def main(show: bool) -> None:
    about = machine("cpu")
    torch.set_num_threads(1)
    lines = [row | about for row in rows()]
    for row in lines:
        click.echo(f"{row['op']:20}{row['direction']:10}{row['launches']} launches{row['p50_us']:8.1f} us")
    if not show:
        path = RESULTS / str(about["machine"]) / "host.csv"
        write_rows(path, lines)
        click.echo(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
