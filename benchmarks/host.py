"""The CPU's part of an op on a GPU: what it takes until the launches are with the driver. No GPU is needed.

    python benchmarks/host.py           writes results/<machine>/host.csv
    python benchmarks/host.py --print   only shows the rows

The raw op's implementation on CPU tensors of few pixels, whose launches nobody runs. By Triton a driver of an H100 that
is not there takes them (tests/absent_gpu.py); of CUDA C++ a build for CPUs (tests/cuda_shim) has a launch do nothing.
Launches that a later call replays (ops/triton/replay.py) are timed as the implementation does them too.
By CUDA C++ the layer's matrix products are PyTorch's, which run and count, of 32 channels and 32 pixels: a row has a
forward's alone.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import cuda_shim  # noqa: E402
from absent_gpu import absent_gpu  # noqa: E402

from focalnet_kernels.bench.machine import machine  # noqa: E402
from focalnet_kernels.bench.records import write_rows  # noqa: E402
from focalnet_kernels.bench.timing import interleaved  # noqa: E402
from focalnet_kernels.ops._native import raw_op  # noqa: E402
from focalnet_kernels.ops.focal_context import triton_launch as context  # noqa: E402
from focalnet_kernels.ops.focal_modulation import triton_launch as layer  # noqa: E402
from focalnet_kernels.ops.focal_modulation.parameters import LayerParameters  # noqa: E402
from focalnet_kernels.testing import layer_tensors, make_context_inputs, make_layer_inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CALLS, ROUNDS = 100, 31
C, MAP, KERNELS = 32, (4, 8), (3, 5, 7)


def calls(backend: str) -> dict[tuple[str, str], Callable[[], object]]:
    """By op and direction."""
    options = {"dtype": torch.bfloat16, "seed": 0}
    ctx, gates, weights = make_context_inputs((1, C, *MAP), KERNELS, **options).values()
    x, parameters = layer_tensors(make_layer_inputs((1, *MAP, C), KERNELS, **options))
    all_inputs = sum(1 << i for i, t in enumerate((x, *parameters)) if t is not None)
    if backend == "triton":
        context_fwd, layer_fwd, layer_bwd = (
            context.focal_context_fwd_impl, layer.focal_modulation_fwd_impl, layer.focal_modulation_bwd_impl,
        )  # fmt: skip
    else:
        ops = ("focal_context_fwd", "focal_modulation_fwd", "focal_modulation_bwd")
        context_fwd, layer_fwd, layer_bwd = (raw_op(op, backend) for op in ops)
    _, saved = layer_fwd(x, parameters, False, 1e-5, True)
    p, tokens = LayerParameters(parameters), x.reshape(-1, C)

    def products():
        return p.f_weight @ tokens.t(), p.h_weight @ tokens.t(), F.linear(tokens, p.proj_weight, p.proj_bias)

    found = {
        ("three products", "forward"): products,
        ("focal_context", "forward"): lambda: context_fwd(ctx, gates, weights, False),
        ("focal_modulation", "forward"): lambda: layer_fwd(x, parameters, False, 1e-5, False),
        ("focal_modulation", "backward"): lambda: layer_bwd(x, x, parameters, *saved, False, 1e-5, all_inputs),
    }
    if backend == "triton":
        context_anew, layer_anew = inspect.unwrap(context_fwd), inspect.unwrap(layer_fwd)
        found |= {
            ("focal_context, not replayed", "forward"): lambda: context_anew(ctx, gates, weights, False),
            ("focal_modulation, not replayed", "forward"): lambda: layer_anew(x, parameters, False, 1e-5, False),
        }
    return found


@contextlib.contextmanager
def nowhere(backend: str) -> Iterator[Callable[[Callable[[], object]], int]]:
    """Launches go there. Gives what counts those of a call."""
    if backend == "triton":
        launched: collections.deque = collections.deque(maxlen=99)  # or all that they were handed would stay

        def count(call):
            launched.clear()
            call()
            return len(launched)

        with absent_gpu(launched):
            yield count
        return
    _, library = cuda_shim.load_kernels()
    numbers: list = []
    counting = cuda_shim.RUNNER(lambda *launch: numbers.append(launch) or 0)
    nothing = ctypes.CDLL(None).sched_yield  # returns 0, as a launch that went well does

    def count(call):
        numbers.clear()
        library.focalnet_shim_set_runner(counting)
        call()
        library.focalnet_shim_set_runner(nothing)
        return len(numbers)

    library.focalnet_shim_set_runner(nothing)
    try:
        with cuda_shim.emulated_ops():
            yield count
    finally:
        library.focalnet_shim_set_runner(None)


def rows(backend: str) -> list[dict[str, object]]:
    def many(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    with nowhere(backend) as count:
        work = calls(backend)
        launches = {name: count(call) for name, call in work.items()}
        times = interleaved({name: many(call) for name, call in work.items()}, ROUNDS)
    return [
        {"op": op, "direction": direction, "backend": backend, "launches": launches[op, direction]}
        | {key.replace("ms", "us"): round(1e3 * value / CALLS, 1) for key, value in times[op, direction].items()}
        for op, direction in work
    ]


@click.command(help=__doc__)
@click.option("--print", "show", is_flag=True, help="Write nothing.")
def main(show: bool) -> None:
    about = machine("cpu")
    torch.set_num_threads(1)
    lines = [row | about for backend in ("triton", "cuda") for row in rows(backend)]
    for row in lines:
        click.echo(
            f"{row['op']:32}{row['direction']:10}{row['backend']:8}{row['launches']:3} launches{row['p50_us']:8.1f} us"
        )
    if not show:
        path = RESULTS / str(about["machine"]) / "host.csv"
        path.parent.mkdir(exist_ok=True)
        write_rows(path, lines)
        click.echo(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
