"""Train a small FocalNet on scikit-learn's 8x8 digits, which are real scans, with any backend.

    python benchmarks/learning.py --backend cpu --precision bf16
    torchrun --nproc-per-node 2 benchmarks/learning.py --backend cpu      the same batches, shared out
    python benchmarks/learning.py --every                                 every run of the report, each its own process

A seed gives every run the same initial weights and the same batches, so that losses can be compared step by step: see
drift.py. They replace those of the same run in benchmarks/results/<machine>/learning.csv; the last row of a run says
how it was made. Needs scikit-learn.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import focalnet_kernels as fk
from focalnet_kernels._machine import device_class
from focalnet_kernels.bench import records
from focalnet_kernels.bench.machine import machine
from focalnet_kernels.ops.focal_context.triton_plan import tap_tiles
from focalnet_kernels.ops.triton.launch import INTERPRETED

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]  # digits, cuda_shim

import digits  # noqa: E402

PRECISIONS = ("fp64", "fp32", "bf16")
EPOCHS, BATCH = 10, 64
RUN = ("backend", "precision", "processes", "batch")
# processes and arguments of each; Triton's interpreter computes bfloat16 wrongly
EVERY_RUN = (
    (1, "--backend reference --precision fp64"),
    *(
        (processes, f"--backend {backend} --precision {precision}")
        for precision in ("fp32", "bf16")
        for backend in ("reference", "cpu")
        for processes in (1, 2)
    ),
    (1, "--backend cuda --precision fp32"),
    (1, "--backend cuda --precision bf16"),
    (1, "--backend triton --precision fp32"),
)


@dataclass
class Result:
    """The loss of every step, and the accuracy on the test images; None for a run that was cut short."""

    losses: list[float]
    accuracy: float | None


def build() -> fk.FocalNet:
    """One block over maps of 4x4, smaller than the last kernel: enough for digits, and for what emulates GPUs."""
    return fk.FocalNet(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depths=(1,),
        focal_levels=(2,),
        focal_windows=(3,),
        drop_path_rate=0.0,  # nothing that processes would draw differently
    )


def train(
    backend: str,
    precision: str = "fp32",
    epochs: int = EPOCHS,
    steps: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    device: str = "cpu",
    rank: int = 0,
    processes: int = 1,
    **options,
) -> Result:
    """A run, or its first `steps`: the schedule is that of the whole. `options` as `digits.optimize` takes them."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    (images, labels), test = ([x.to(device) for x in part] for part in digits.split_digits(seed))
    images, test[0] = images.to(dtype), test[0].to(dtype)
    torch.manual_seed(seed)
    network = build().to(device, dtype)
    batches = digits.draw_batches(len(labels), epochs, batch)
    trained = DistributedDataParallel(network) if processes > 1 else network

    def autocast():
        return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()

    def loss_of(chosen: Tensor) -> Tensor:
        own = chosen.chunk(processes)[rank].to(device)
        with autocast():
            logits = trained(images[own])
        return F.cross_entropy(logits.to(dtype), labels[own])

    losses = []
    with fk.use_backend(backend):
        for loss in islice(digits.optimize(trained, loss_of, batches, **options), steps):
            if processes > 1:
                dist.all_reduce(loss)
            losses.append(loss.item() / processes)
        if len(losses) < len(batches):
            return Result(losses, None)
        with autocast():
            return Result(losses, digits.accuracy(network, *test))


def write(path: Path, run: dict, result: Result, about: dict) -> None:
    """The file with this run's rows in the place of those that it had of the same."""
    before = records.read(path) if path.exists() else []
    rows = [row for row in before if any(row[key] != str(run[key]) for key in RUN)]
    new = [run | {"step": step, "loss": f"{loss:.10g}"} for step, loss in enumerate(result.losses, 1)]
    new[-1] |= {"accuracy": result.accuracy, **about}
    columns = [*RUN, "step", "loss", "accuracy", *about]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows + new)


def run_every(output: Path) -> None:
    for processes, arguments in EVERY_RUN:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, *arguments.split()]
        interpreted = {"TRITON_INTERPRET": "1"} if "triton" in arguments and not torch.cuda.is_available() else {}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | interpreted
        subprocess.run([*command, "--output", output], check=True, env=environment)


@click.command()
@click.option("--backend", type=click.Choice(fk.dispatch.BACKENDS), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--epochs", default=EPOCHS, show_default=True)
@click.option("--steps", type=int, help="End after so many of the whole run's steps.")
@click.option("--batch", default=BATCH, show_default=True, help="Of all processes together.")
@click.option("--seed", default=0, show_default=True)
@click.option("--every", is_flag=True, help="Every run of the report.")
@click.option("--output", type=Path, help="The CSV file, if not that of this machine.")
def main(backend, precision, epochs, steps, batch, seed, every, output) -> None:
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    output = output or ROOT / "benchmarks/results" / str(device_class(torch.device(device))) / "learning.csv"
    if every:
        return run_every(output)
    rank, processes = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
    runs_on, tiles = device, nullcontext()
    if backend == "triton" and INTERPRETED:
        runs_on, tiles = "Triton's interpreter", tap_tiles(channels=64, segments=256)
    if backend == "cuda" and device == "cpu":
        import cuda_shim

        cuda_shim.emulate()
        runs_on = "CUDA emulated on a CPU"
    start = time.perf_counter()
    with tiles:
        result = train(backend, precision, epochs, steps, batch, seed, device, rank, processes)
    if rank == 0:
        run = {"backend": backend, "precision": precision, "processes": processes, "batch": batch}
        write(output, run, result, {"runs_on": runs_on, "epochs": epochs, "seed": seed, **machine(device)})
        end = "" if result.accuracy is None else f", test accuracy {result.accuracy:.1%}"
        name = f"{backend} {precision} on {runs_on}, processes: {processes}"
        seconds = time.perf_counter() - start
        print(f"{name}; {len(result.losses)} steps, loss {result.losses[-1]:.4f}{end}, {seconds:.0f} s", flush=True)
    if processes > 1:
        dist.destroy_process_group()
        # DDP keeps gloo's threads; one that drops a tensor while Python shuts down aborts (PyTorch PR 179291)
        os._exit(0)


if __name__ == "__main__":
    main()
