"""What the GPU's own counters say of our kernels: instructions, bytes and stalls beside the time. Needs Nsight Compute.

PYTHONPATH=. python benchmarks/gpu_report.py --parts counters
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
BATCH, KERNELS = 128, (3, 5, 7)
DIRECTIONS = ("forward", "backward")
OURS = "regex:context_|modulate_|rows_|linear_planes|lgamma"
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


def counters(backends: Sequence[str], raw: Path) -> Iterator[dict]:
    """A row of `FIELDS` for each of our kernels in a layer's forward and backward, stage by stage.

    Args:
        backends: of ours to look at.
        raw: where all that ncu says goes, one CSV file a backend.
    """
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    for backend in backends:
        row = {"case": "counters", "provider": f"ours {backend}"}
        if ncu is None:
            yield row | {"skipped": "ncu is not installed"}
            continue
        log = raw / f"ncu_{backend}.csv"
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start",
            "no", "--kernel-name", OURS, "--log-file", str(log),
            "--section", "WarpStateStats", "--section", "LaunchStats", "--metrics", ",".join(v for v in COLUMNS.values() if not v.startswith("launch")),
            sys.executable, __file__, backend,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150)
            lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
            if not lines:
                yield row | {"skipped": f"ncu says: {(done.stdout + done.stderr + log.read_text())[-300:]}"}
            yield from _rows(lines, row)
        except (OSError, subprocess.TimeoutExpired, KeyError, StopIteration) as error:
            yield row | {"skipped": f"ncu: {type(error).__name__} {error}"}


def _rows(lines: list[str], common: dict) -> Iterator[dict]:
    parts = product(STAGES, DIRECTIONS)
    for found in list(csv.DictReader(lines))[1:]:  # the first line has the units
        kernel = found["Kernel Name"].partition("(")[0]
        if MARK in found["Kernel Name"]:
            (C, H), mode = next(parts)
            continue
        values = {name: _number(found.get(counter)) for name, counter in COLUMNS.items()}
        values["us"] = values["us"] and round(values["us"] / 1e3, 2)
        count = values["instructions"]
        yield (
            common
            | values
            | {
                "shape": f"{BATCH}x{H}x{H}x{C}",
                "dtype": "bfloat16",
                "mode": mode,
                "kernel": kernel[:60],
                "per_128_outputs": count and round(count * 128 / (BATCH * C * H * H), 1),
                "stalls": _stalls(found),
            }
        )


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


def program(backend: str) -> None:
    """What ncu runs: every stage's layer, forward and backward, behind a mark each."""
    import torch

    import focalnet_kernels as fk
    from focalnet_kernels.testing import make_layer_inputs, map_tensors, run

    fk.use_backend(backend)
    mark = torch.rand(8, device="cuda")
    for C, H in STAGES:
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
    program(sys.argv[1])
