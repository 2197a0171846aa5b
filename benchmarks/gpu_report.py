"""One script for a GPU: first whether every backend is right there, then how fast, then which tiles are best.

    python benchmarks/gpu_report.py --output results          everything, in about 8 minutes
    python benchmarks/gpu_report.py --parts correct,layers    some of it

Each part appends to its own CSV as it goes, so that an interrupted run keeps what it found. A backend that is wrong
anywhere is not timed. On a CPU under TRITON_INTERPRET=1, --tiny walks the same way in small sizes.
"""

from __future__ import annotations

import csv
import datetime
import time
from pathlib import Path

import click
import gpu_correctness
import gpu_measure
import torch

import focalnet_kernels as fk
from focalnet_kernels.bench.machine import machine as about_machine
from focalnet_kernels.bench.records import MEASURED
from focalnet_kernels.testing import make_layer_inputs

SHOWN = (
    "case",
    "shape",
    "dtype",
    "mode",
    "provider",
    "p50_ms",
    "gbyte_per_s",
    "gflop_per_s",
    "peak_bytes",
    "skipped",
    "result",
)
PARTS = ("correct", "ceilings", "contexts", "layers", "latency", "models", "experiments", "convolutions", "tiles")


@click.command()
@click.option("--output", default="gpu-report", type=click.Path(file_okay=False, path_type=Path))
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--seconds", default=480.0, show_default=True, help="Parts that would begin later are left out.")
@click.option("--no-compile", is_flag=True, help="Without torch.compile, which takes most of the time.")
@click.option("--tiny", is_flag=True)
def main(output, parts, device, seconds, no_compile, tiny) -> None:
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    machine = about_machine(device) | {"date": datetime.date.today().isoformat()}
    backends = _backends(device, tiny)
    print(f"{machine['device']}: backends {', '.join(backends) or 'none'}", flush=True)
    compiled = () if no_compile or tiny else ("default",)
    bf16 = [torch.float16] if tiny else [torch.bfloat16]
    every = bf16 if tiny else [torch.bfloat16, torch.float16, torch.float32]
    large, one = ([2], [1]) if tiny else ([128], [1])

    def measured(level, batches, dtypes, compile_modes):
        return gpu_measure.timed(device, level, batches, dtypes, backends, compile_modes, tiny)

    for part in parts.split(","):
        if time.monotonic() - started > seconds:
            print(f"{part}: left out, {seconds:.0f} seconds are over", flush=True)
            continue
        rows = {
            "correct": lambda: _correct(backends, device, tiny),
            "ceilings": lambda: gpu_measure.ceilings(device, every, tiny),
            "contexts": lambda: measured("op", [*large, *one], every, ()),
            "layers": lambda: measured("layer", large, bf16, compiled),
            "latency": lambda: measured("layer", one, every, ()),
            "models": lambda: measured("model", large, bf16, compiled),
            "experiments": lambda: gpu_measure.experiments(device, tiny),
            "convolutions": lambda: gpu_measure.convolutions(device, tiny),
            "tiles": lambda: gpu_measure.tiles(device, tiny),
        }[part]()
        with (output / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["part", *MEASURED, "result", *machine])
            writer.writeheader()
            for row in rows:
                writer.writerow({"part": part, **machine, **row})
                file.flush()
                shown = (row.get(k) for k in SHOWN)
                print(f"{part:12}", *(str(v) for v in shown if v not in (None, "")), sep="  ", flush=True)
        print(f"{part}: done after {time.monotonic() - started:.0f} s", flush=True)


def _backends(device: str, tiny: bool) -> list[str]:
    inputs = make_layer_inputs((1, 4, 4, 8), [3], dtype=torch.float16 if tiny else torch.bfloat16, device=device)
    found = fk.explain(fk.focal_modulation, **inputs)
    usable = [b for b, reason in found.reasons.items() if reason.endswith("is preferred")]
    return [b for b in ("triton", "cuda") if b == found.backend or b in usable]


def _correct(backends: list[str], device: str, tiny: bool):
    """Runs every check; takes a backend that fails one off the list."""
    for backend in list(backends):
        for name, check in gpu_correctness.checks(backend, device, tiny):
            try:
                check()
                result = "right"
            except Exception as error:
                result = f"{type(error).__name__}: {str(error).strip()[:300]}"
                if backend in backends and "not installed" not in result:
                    backends.remove(backend)
            yield {"case": name, "provider": backend, "result": result}


if __name__ == "__main__":
    main()
