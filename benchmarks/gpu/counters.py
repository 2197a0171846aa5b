"""What the GPU's own counters say of our kernels: instructions, bytes and stalls beside the time. Needs Nsight Compute.

PYTHONPATH=. python benchmarks/gpu/report.py --parts counters
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
BATCH, KERNELS = 128, (3, 5, 7)
OURS = "regex:images_|context_|modulate_|rows_|linear_planes|sum_kernel|lgamma"
MARK = "lgamma"  # the kernel that begins a direction of a stage
COLUMNS = {  # of the CSV file: the counter's name
    "us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "alu": "smsp__inst_executed_pipe_alu.sum",
    "fma": "smsp__inst_executed_pipe_fma.sum",
    "lsu": "smsp__inst_executed_pipe_lsu.sum",
    "special": "smsp__inst_executed_pipe_xu.sum",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
FIELDS = ("case", "shape", "dtype", "mode", "provider", "kernel", "per_128_outputs", *COLUMNS, "stalls", "skipped")


def counters(backends: Sequence[str], until: float) -> Iterator[dict]:
    """A row of `FIELDS` for each of our kernels in a layer's forward and backward, stage by stage.

    Args:
        backends: of ours to look at.
        until: by time.monotonic(), when no further stage begins.
    """
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    for (C, H), backend in product(STAGES, backends):
        row = {"case": "counters", "shape": f"{BATCH}x{H}x{H}x{C}", "dtype": "bfloat16", "provider": f"ours {backend}"}
        left = until - time.monotonic()
        if ncu is None or left <= 0:
            yield row | {"skipped": "ncu is not installed" if ncu is None else "the time was over"}
            continue
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start",
            "no", "--kernel-name", OURS, "--section", "WarpStateStats", "--section", "LaunchStats", "--metrics",
            ",".join(counter for counter in COLUMNS.values() if not counter.startswith("launch")),
            sys.executable, __file__, backend, str(C), str(H),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            yield row | {"skipped": f"ncu was not done in {left:.0f} seconds"}
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
        if not lines:
            yield row | {"skipped": f"ncu says: {(done.stdout + done.stderr)[-300:]}"}
        yield from _rows(lines, row, BATCH * C * H * H)


def _rows(lines: list[str], common: dict, outputs: int) -> Iterator[dict]:
    modes = iter(("forward", "backward"))
    for found in list(csv.DictReader(lines))[1:]:  # the first line has the units
        if MARK in found["Kernel Name"]:
            common = common | {"mode": next(modes)}
            continue
        values = {name: _number(found.get(counter)) for name, counter in COLUMNS.items()}
        values["us"] = values["us"] and round(values["us"] / 1e3, 2)
        count = values["instructions"]
        kernel = found["Kernel Name"].partition("(")[0][:60]
        per_128 = count and round(count * 128 / outputs, 1)
        yield common | values | {"kernel": kernel, "per_128_outputs": per_128, "stalls": _stalls(found)}


def _stalls(found: dict) -> str:
    """Why a warp waited, the five most frequent reasons: cycles of each between two of its instructions."""
    begin, end = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
    all_of = {k.removeprefix(begin).removesuffix(end): _number(v) for k, v in found.items() if k.endswith(end)}
    longest = sorted(((v, k) for k, v in all_of.items() if v is not None), reverse=True)[:5]
    return " ".join(f"{k.rpartition('__')[2]}={v:.2f}" for v, k in longest)


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def program(backend: str, C: int, H: int) -> None:
    """What ncu runs: a layer's forward and backward, behind a mark each."""
    import torch

    import focalnet_kernels as fk
    from focalnet_kernels.testing import make_layer_inputs, map_tensors, run

    fk.use_backend(backend)
    mark = torch.rand(8, device="cuda")
    shape = (BATCH, H, H, C)
    inputs = make_layer_inputs(shape, KERNELS, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(shape, device="cuda").bfloat16()
    run(fk.focal_modulation, inputs, grad)  # compiles
    inputs = map_tensors(lambda t: t.detach().requires_grad_(), inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    mark.lgamma()
    y = fk.focal_modulation(**inputs)
    mark.lgamma()
    y.backward(grad)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    program(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
