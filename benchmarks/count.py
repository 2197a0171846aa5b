"""What the GPU kernels issue, counted without a GPU: their PTX runs on a CPU (tests/ptx).

    python -m focalnet_kernels check --count sm_90       writes results/counted/sm_90.csv
    python benchmarks/count.py sm_90 --op mlp_branch     only an op's rows, which take the place of those there;
                                                         so --backend cuda
    python benchmarks/count.py sm_90 --print             only shows the rows

FocalNet-T's stages (k = 3, 5, 7), bfloat16, per op, direction and backend. Few images run, and twice as many, as a
device of one multiprocessor cuts them, which is how a large one cuts 128; what 128 take lies on the line through both.
CUDA's kernels of the chain and of the layer take each channel alike: 96 run at every stage, laid out as the layer has
them, of as many images as fill the chain's blocks and let the gates' sums go by the kernel that sums 128's.
Counts are per 128 outputs; times in microseconds are what 128 images take at least on an H100 SXM of issuing, of the
special functions, of shared memory and of the tensor cores, and the bytes that the op cannot avoid. The largest binds,
but for latency: on a GPU kernels took up to three times as long (ops/focal_context/README.md).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from ptx import cuda_kernels, triton_kernels  # noqa: E402
from ptx.machine import Result  # noqa: E402
from ptx.meter import Cost, cost_of  # noqa: E402

import focalnet_kernels as fk  # noqa: E402
from focalnet_kernels.bench.records import read, write_rows  # noqa: E402
from focalnet_kernels.testing import make_context_inputs, make_layer_inputs, make_mlp_branch_inputs  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "counted"
BATCH, KERNELS, BFLOAT16 = 128, (3, 5, 7), {"dtype": torch.bfloat16}
STAGES = {1: (96, 56, 1), 2: (192, 28, 1), 3: (384, 14, 2), 4: (768, 7, 8)}  # channels, pixels a side, images that run
CUDA_CHANNELS, CUDA_IMAGES = 96, {1: 2, 2: 6, 3: 40, 4: 96}  # but of mlp_branch, which has no blocks of images
OPS = {  # and the inputs, of (channels, pixels a side, images)
    "focal_context": (fk.focal_context, lambda C, N, B: make_context_inputs((B, C, N, N), KERNELS, **BFLOAT16)),
    "mlp_branch": (
        fk.mlp_branch,
        lambda C, N, B: make_mlp_branch_inputs((B, N, N, C), 4 * C, norm=True, **BFLOAT16),
    ),
    "focal_modulation": (fk.focal_modulation, lambda C, N, B: make_layer_inputs((B, N, N, C), KERNELS, **BFLOAT16)),
}
BACKENDS = ("triton", "cuda")
KINDS = ("integer", "float", "special", "tensor", "shared", "shuffle", "barrier", "branch")


class H100:
    """SXM5: multiprocessors, schedulers of each, Hz; measured copy bandwidth (results/nvidia-h100-80gb-hbm3); and of a
    multiprocessor threads, registers, bytes of shared memory."""

    processors, schedulers, clock = 132, 4, 1.98e9
    memory = 2.886e12  # bytes a second
    threads, registers, shared = 2048, 65536, 233472
    product = 4096 * 132 * 1.98e9  # FLOP/s of 16 bits


@dataclass
class Counted:
    """Of a kernel's launches."""

    launches: int
    cost: Cost
    flops: float  # of mma and wgmma
    registers: int
    shared_bytes: int
    warps: int  # that a multiprocessor has room for


def sizes(op: str, stage: int, backend: str) -> tuple[int, int]:
    """Channels and images that run."""
    C, _, images = STAGES[stage]
    return (CUDA_CHANNELS, CUDA_IMAGES[stage]) if backend == "cuda" and op != "mlp_branch" else (C, images)


def measure(op: str, stage: int, backend: str, target: str, times: int) -> dict[str, dict[str, Counted]]:
    """Of each direction, the kernels, for so many times the images."""
    function, make = OPS[op]
    C, images = sizes(op, stage, backend)
    capability = int(target.removeprefix("sm_"))
    with cuda_kernels.recorded_memory():
        inputs = make(C, STAGES[stage][1], times * images)
        if (op, backend) == ("focal_context", "cuda"):
            inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("ctx", "gates")}
        for tensor in inputs.values():
            for t in tensor if isinstance(tensor, list) else [tensor]:
                if isinstance(t, torch.Tensor):
                    t.requires_grad_()
        machine = triton_kernels.emulated(capability, metered=True, multiprocessors=1)
        if backend == "cuda":
            machine = cuda_kernels.emulated(capability, metered=True)
        with machine as launches:
            y = function(**inputs, backend=backend)
            forward = len(launches.results)
            y.backward(torch.randn_like(y))
    parts = {"forward": launches.results[:forward], "backward": launches.results[forward:]}
    return {direction: by_kernel(results) for direction, results in parts.items()}


def by_kernel(results: list[Result]) -> dict[str, Counted]:
    found: dict[str, Counted] = {}
    for result in results:
        registers, warps = used(result)
        one = Counted(0, Cost(), 0.0, registers, result.shared_bytes, warps)
        kernel = found.setdefault(result.program.name, one)
        kernel.launches += 1
        kernel.cost += cost_of(result.program, result.issued, result.traffic)
        kernel.flops += tensor_flops(result)
    return found


def of_a_batch(few: dict[str, Counted], twice: dict[str, Counted], images: int) -> dict[str, Counted]:
    """What grows with the images, and what does not."""
    more, found = BATCH / images - 1, {}
    for name, kernel in twice.items():
        before = few.get(name)
        if before is None:  # it has taken over all of some work, which grows with the images
            found[name] = scaled(kernel, kernel, 0, BATCH / images / 2)
        elif kernel.cost.instructions < before.cost.instructions:  # another kernel has taken some of it over
            found[name] = kernel
        else:
            found[name] = scaled(kernel, before, 1 - more, more)
    return found


def scaled(kernel: Counted, other: Counted, of_other: float, of_kernel: float) -> Counted:
    cost = kernel.cost * of_kernel + other.cost * of_other
    return replace(kernel, cost=cost, flops=kernel.flops * of_kernel + other.flops * of_other)


def used(result: Result) -> tuple[int, int]:
    """Registers of a thread, and how many warps a multiprocessor has room for."""
    registers, warps = _registers(result.program.text, result.program.entry), result.threads // 32
    by_registers = H100.registers // (-(-registers // 8) * 8 * 32) // warps
    blocks = min(by_registers, H100.shared // (result.shared_bytes + 1024), H100.threads // result.threads, 32)
    return registers, blocks * warps


@functools.cache
def _registers(ptx: str, entry: str) -> int:
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [cuda_kernels.tool("ptxas"), "-v", f"-arch={target}", "-e", entry, "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(rf"entry function '{entry}'.*?Used (\d+) registers", said, re.S)[1])


def bounds(cost: Cost, flops: float) -> dict[str, float]:
    """The least microseconds that each part of the device takes."""
    slots = H100.processors * H100.schedulers * H100.clock
    seconds = {
        "issue": cost.instructions / slots,
        "special": 8 * cost.kinds["special"] / slots,  # 4 lanes a scheduler
        "shared": cost.traffic.wavefronts / (H100.processors * H100.clock),
        "tensor": flops / H100.product,
    }
    return {name: 1e6 * value for name, value in seconds.items()}


def tensor_flops(result: Result) -> float:
    """Of mma and wgmma, all warps'."""
    flops = 0.0
    for count, at in zip(result.issued, result.program.instructions, strict=True):
        name, shape = at.opcode[0], re.search(r"m(\d+)n(\d+)k(\d+)", ".".join(at.opcode))
        if count and name in ("mma", "wgmma") and shape:
            m, n, k = map(int, shape.groups())
            flops += int(count) * 2 * m * n * k / (4 if name == "wgmma" else 1)  # issued by each of four warps
    return flops


def least_bytes(op: str, direction: str, C: int, N: int) -> int:
    """That an image's op must move, weights left out: what comes in and what goes out, once."""
    gates = len(KERNELS) + 1
    elements = {
        ("focal_context", "forward"): 2 * C + gates,
        ("focal_context", "backward"): 3 * C + 2 * gates,
        ("focal_modulation", "forward"): 2 * C,
        ("focal_modulation", "backward"): 3 * C,
        ("mlp_branch", "forward"): 2 * C,
        ("mlp_branch", "backward"): 3 * C,
    }
    return 2 * N * N * elements[op, direction]


def rows(target: str, ops: Sequence[str], backends: Sequence[str]) -> Iterator[dict[str, object]]:
    jobs = [(op, stage, backend) for op in ops for stage in STAGES for backend in backends]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        sent = [pool.submit(measure, *job, target, times) for job in jobs for times in (1, 2)]
        for (op, stage, backend), few, twice in zip(jobs, sent[::2], sent[1::2], strict=True):
            for direction in ("forward", "backward"):
                channels, images = sizes(op, stage, backend)
                found = of_a_batch(few.result()[direction], twice.result()[direction], images)
                found = {name: scaled(k, k, 0, STAGES[stage][0] / channels) for name, k in found.items()}
                about = {"target": target, "op": op, "stage": stage, "direction": direction, "backend": backend}
                whole = Counted(sum(k.launches for k in found.values()), Cost(), 0.0, 0, 0, 0)
                for kernel in found.values():
                    whole.cost += kernel.cost
                    whole.flops += kernel.flops
                for name, kernel in {"all": whole, **found}.items():
                    yield row(about, name, kernel)


def row(about: dict, name: str, kernel: Counted) -> dict[str, object]:
    C, N, _ = STAGES[about["stage"]]
    cost, per, all_of_them = kernel.cost, 1 / (BATCH * N * N * C / 128), name == "all"
    least = bounds(cost, kernel.flops)
    floor = 1e6 * BATCH * least_bytes(about["op"], about["direction"], C, N) / H100.memory
    extra = cost.traffic.wavefronts - cost.traffic.ideal_wavefronts
    binds = max(least | ({"bytes": floor} if all_of_them else {}), key=lambda part: least.get(part, floor))
    return (
        about
        | {"kernel": name, "launches": kernel.launches, "instructions": round(per * cost.instructions, 1)}
        | {kind: round(per * cost.kinds[kind], 1) for kind in KINDS}
        | {f"global_{n}": round(per * cost.kinds[f"global {n} bytes"], 2) for n in (1, 2, 4, 8, 16)}
        | {"loaded_bytes": round(per * 32 * cost.traffic.loaded_sectors, 1)}
        | {"stored_bytes": round(per * 32 * cost.traffic.stored_sectors, 1)}
        | {"conflicts": round(per * extra, 1)}
        | {name: "" if all_of_them else getattr(kernel, name) for name in ("registers", "shared_bytes", "warps")}
        | {f"{part}_us": round(value, 1) for part, value in least.items()}
        | {"bytes_us": round(floor, 1) if all_of_them else "", "binds": binds}
    )


def place_of(line: dict) -> tuple:
    """In the file."""
    return list(OPS).index(line["op"]), int(line["stage"]), line["direction"] == "backward", line["backend"] == "cuda"


def show(line: dict[str, object]) -> None:
    about = f"{line['op']:17}{line['stage']} {line['direction']:9}{line['backend']:7}{str(line['kernel'])[:52]:53}"
    parts = " ".join(f"{kind} {line[kind]}" for kind in KINDS if line[kind])
    click.echo(f"{about}{line['instructions']:8}  {line['issue_us']:8} us issue, binds: {line['binds']}  ({parts})")


@click.command(help=__doc__)
@click.argument("target", type=click.Choice(["sm_80", "sm_90"]))
@click.option("--op", "ops", multiple=True, type=click.Choice(list(OPS)), help="Default: all.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Default: both.")
@click.option("--print", "shown", is_flag=True, help="Write nothing.")
def main(target: str, ops: tuple[str, ...], backends: tuple[str, ...], shown: bool) -> None:
    if reason := cuda_kernels.missing():
        raise click.ClickException(reason)
    cuda_kernels.programs(int(target.removeprefix("sm_")))  # compiled once, before several processes want them
    os.environ |= {"FOCALNET_SHIM_PROCESSORS": "1", "FOCALNET_SHIM_SHARED": str(H100.shared - 1024)}
    lines = []
    for line in rows(target, ops or tuple(OPS), backends or BACKENDS):
        lines.append(line)
        show(line)
    if not shown:
        file = RESULTS / f"{target}.csv"
        file.parent.mkdir(exist_ok=True)
        old = read(file) if file.exists() else []
        kept = [r for r in old if (ops and r["op"] not in ops) or (backends and r["backend"] not in backends)]
        write_rows(file, sorted([*kept, *lines], key=place_of))


if __name__ == "__main__":
    main()
