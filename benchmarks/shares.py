"""Where the time of an accelerated network goes: FocalNet-T of timm, 8 images, inference and a training step.

    python benchmarks/shares.py           writes results/<machine>/shares.csv
    python benchmarks/shares.py --print   only shows the rows

By torch's profiler, medians of `ROUNDS` calls: the raw ops of ours, PyTorch's convolutions (patch embeddings in
training), and the rest of the call. GFLOP/s are a part's matrix products and convolutions, without those that are made
again in backward, over its time; what a matrix product alone reaches on the machine stands beside it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import click
import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import focalnet_kernels as fk
from focalnet_kernels.bench.machine import machine
from focalnet_kernels.bench.records import write_rows
from focalnet_kernels.bench.roofline import ceilings

RESULTS = Path(__file__).parent / "results"
BATCH, ROUNDS = 8, 9
OURS = "focalnet_kernels::"
CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


def step(model: torch.nn.Module, x: torch.Tensor, training: bool) -> None:
    if not training:
        with torch.no_grad():
            model(x)
        return
    model(x).float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def parts(model: torch.nn.Module, x: torch.Tensor, training: bool) -> tuple[float, dict[str, float]]:
    """Milliseconds of a whole call, and of its parts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        step(model, x, training)
        whole = 1e3 * (time.perf_counter() - started)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.name.startswith(OURS):
            found[event.name.removeprefix(OURS)] += event.cpu_time_total / 1e3
        elif event.name in CONVOLUTIONS:
            found["convolutions"] += event.cpu_time_total / 1e3
    found["rest"] = whole - sum(found.values())
    return whole, found


class Counted(TorchDispatchMode):
    """FLOPs by part, by torch's formulas. Its own counter hooks modules, which has blocks run as their classes do."""

    def __init__(self):
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        part = "convolutions" if name in CONVOLUTIONS else name.removeprefix(OURS) if name.startswith(OURS) else "rest"
        if formula := flop_registry.get(function.overloadpacket):
            self.flops[part] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(model: torch.nn.Module, x: torch.Tensor, training: bool) -> dict[str, int]:
    with Counted() as counter:
        step(model, x, training)
    # twice the forward's: torch counts a depthwise convolution's backward as if it had no groups
    backward = {f"{name[:-4]}_bwd": 2 * count for name, count in counter.flops.items() if name.endswith("_fwd")}
    return counter.flops | backward if training else counter.flops


def rows() -> list[dict[str, object]]:
    reached, _ = ceilings([torch.float32, torch.bfloat16], "cpu", ROUNDS)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            torch.manual_seed(0)
            model = timm.create_model("focalnet_tiny_lrf").to(dtype).train(training)
            fk.accelerate(model)
            x = torch.randn(BATCH, 3, 224, 224, dtype=dtype)
            step(model, x, training)
            counts = flops(model, x, training)
            measured = [parts(model, x, training) for _ in range(ROUNDS)]
            whole = statistics.median(total for total, _ in measured)
            for name in measured[0][1]:
                ms = statistics.median(found[name] for _, found in measured)
                lines.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "direction": "forward+backward" if training else "forward",
                        "part": name,
                        "p50_ms": round(ms, 2),
                        "share": round(ms / whole, 3),
                        "gflop_per_s": round(counts[name] / ms / 1e6) if counts[name] else "",
                        "product_gflop_per_s": round(reached.product[dtype] / 1e9),
                    }
                )
    return lines


@click.command(help=__doc__)
@click.option("--print", "show", is_flag=True, help="Write nothing.")
def main(show: bool) -> None:
    about = machine("cpu")
    lines = [row | about for row in rows()]
    for row in lines:
        figures = f"{row['p50_ms']:8.1f} ms{100 * row['share']:6.0f}%  {row['gflop_per_s']:>6} GFLOP/s"
        click.echo(f"{row['dtype']:9}{row['direction']:18}{row['part']:18}{figures} of {row['product_gflop_per_s']}")
    if show:
        return
    path = RESULTS / str(about["machine"]) / "shares.csv"
    write_rows(path, lines)
    click.echo(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
