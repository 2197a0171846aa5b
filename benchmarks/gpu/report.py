"""One script for a GPU: first whether every backend is right there, then how fast, then which tiles are best.

    PYTHONPATH=. python benchmarks/gpu/report.py                            everything, in less than 8 minutes
    PYTHONPATH=. python benchmarks/gpu/report.py --parts correct,layers     some of it

From a fresh checkout, on an H200:

    FOCALNET_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=16 python setup.py build_ext --inplace &&
    PYTHONPATH=. python benchmarks/gpu/report.py

Each part writes benchmarks/results/<device>/gpu_<part>.csv as it goes, so that an interrupted run keeps what it found.
Part "dispatch" has what benchmarks/dispatch_table.py wants, 128 images in bfloat16 first; all of it takes several runs,
whose files are put beside one another there under names of their own:

    PYTHONPATH=. python benchmarks/gpu/report.py --output gpu-report-float16 --parts dispatch --dtypes float16

Every backend is checked, each check apart from the others; one that faults or hangs is not timed, and no figure is
given where it is wrong. On a CPU, --tiny --device cpu walks the same way in small sizes: the Triton kernels under
TRITON_INTERPRET=1, the CUDA kernels with --emulate.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import tempfile
import time
from pathlib import Path

import branches
import compiled
import correctness
import counters
import measure
import torch
from processes import Fault, in_processes

import focalnet_kernels as fk
from focalnet_kernels._machine import device_class
from focalnet_kernels.bench.machine import machine as about_machine
from focalnet_kernels.bench.records import MEASURED
from focalnet_kernels.testing import make_layer_inputs

SHOWN = (
    "case", "shape", "dtype", "mode", "provider", "p50_ms", "gbyte_per_s", "gflop_per_s", "peak_bytes", "skipped",
    "result", "kernel", "us", "per_128_outputs", "issue_active_percent",
)  # fmt: skip
PARTS = (
    "correct", "compiled_networks", "compiled_layers", "ceilings", "layers", "kernels", "counters", "dispatch",
    "models", "detection", "latency", "experiments", "convolutions", "tiles", "branches", "branch_tiles", "networks",
)  # fmt: skip
LONGEST = {
    "correct": 200.0,
    "compiled_networks": 90.0,
    "compiled_layers": 90.0,
    "dispatch": 150.0,
}  # seconds of a part, where others wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32", help="default: %(default)s")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", default=420.0, type=float, help="then no further case begins; default: %(default)s"
    )
    parser.add_argument("--workers", default=max(1, (os.cpu_count() or 2) - 2), type=int, help="default: %(default)s")
    parser.add_argument("--backends", default="triton,cuda", help="of ours; default: %(default)s")
    parser.add_argument("--commit", help="of this tree, where it is a copy without its .git")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--emulate", action="store_true", help="the CUDA kernels emulated on a CPU")
    report(parser.parse_args())


def report(options: argparse.Namespace) -> None:
    """Runs the parts; a CSV each."""
    if options.emulate:
        correctness.emulate_cuda()
    started = time.monotonic()
    toy = Path(tempfile.gettempdir()) / "gpu-report"  # no figures to be kept
    kept = Path(__file__).parents[1] / "results" / str(device_class(torch.device(options.device)))
    output = options.output or (toy if options.tiny else kept)
    output.mkdir(parents=True, exist_ok=True)
    machine = about_machine(options.device) | {"date": datetime.date.today().isoformat()}
    machine["commit"] = options.commit or machine["commit"]
    absent = {backend: _reason_against(backend, options) for backend in options.backends.split(",")}
    backends = [backend for backend, reason in absent.items() if reason is None]
    print(f"{machine['device']}, torch {machine['torch']}: backends {', '.join(backends) or 'none'}", flush=True)
    parts = options.parts.split(",")
    compile_beside = [part for part in parts if part.startswith("compiled_")]  # while others check
    beside = {
        part: compiled.Compiled(part.removeprefix("compiled_"), options.device, options.tiny) for part in compile_beside
    }
    for part in parts:
        begun = time.monotonic()
        until = started + options.seconds
        if begun > until:
            print(f"{part}: left out, {options.seconds:.0f} seconds are over", flush=True)
            continue
        # one that runs alone may take all there is
        until = min(until, begun + LONGEST.get(part, options.seconds)) if options.parts != part else until
        path = output / f"gpu_{part}.csv"
        columns = counters.FIELDS if part == "counters" else (*MEASURED, "result")
        for i, row in enumerate(_rows(part, backends, absent, beside, options, until)):
            with path.open("a" if i else "w", newline="") as file:
                writer = csv.DictWriter(file, ["part", *columns, *machine])
                if i == 0:
                    writer.writeheader()
                writer.writerow({"part": part, **machine, **row})
                print(f"{part:12}", *(str(row[k]) for k in SHOWN if row.get(k)), sep="  ", flush=True)
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)


def _reason_against(backend: str, options) -> str | None:
    """Why it cannot run here, or None."""
    dtype = torch.float16 if options.tiny else torch.bfloat16
    with fk.use_backend(backend):
        found = fk.explain(
            fk.focal_modulation, **make_layer_inputs((1, 4, 4, 8), [3], dtype=dtype, device=options.device)
        )
    return found.reasons.get(backend)


def _rows(part: str, backends: list[str], absent: dict[str, str | None], beside: dict, options, until: float):
    device, tiny = options.device, options.tiny
    dtypes = [torch.float16] if tiny else [getattr(torch, name) for name in options.dtypes.split(",")]
    if part == "correct":
        yield from _correct(backends, absent, options, until)
    elif part in beside:
        with beside[part] as prepared:
            yield from prepared.rows(until)
    elif part == "ceilings":
        yield from measure.ceilings(device, dtypes, tiny)
    elif part in measure.BLOCKS:
        compiling = None if tiny else options.workers
        for block in measure.BLOCKS[part](dtypes, device, tiny):
            yield from block.rows(backends, not (tiny or options.no_compile), compiling, until)
    elif part == "latency":
        yield from measure.latency(backends, device, tiny)
    elif part == "kernels":
        yield from measure.kernels(backends, device, tiny)
    elif part == "counters":
        yield from counters.counters(backends, until)
    elif part in ("experiments", "tiles", "branches", "branch_tiles") and "triton" not in backends:
        yield {"case": part, "provider": "triton", "skipped": absent.get("triton") or "it was not asked for, or faults"}
    else:
        rows = {
            "experiments": measure.experiments,
            "convolutions": measure.convolutions,
            "tiles": measure.tiles,
            "branches": branches.branches,
            "branch_tiles": branches.tiles,
            "networks": branches.networks,
        }
        more = (options.workers, until) if rows[part].__module__ == "branches" else ()
        for row in rows[part](device, tiny, *more):
            yield row
            if time.monotonic() > until:
                return


def _correct(backends: list[str], absent: dict[str, str | None], options, until: float):
    """Makes every check; takes a backend that faults off the list."""
    yield from ({"case": "all", "provider": b, "skipped": reason} for b, reason in absent.items() if reason)
    about = (options.device, options.tiny)
    names = {backend: correctness.names(backend, *about) for backend in backends}
    tasks = sorted((i, b, *about, options.emulate) for b in backends for i in range(len(names[b])))
    limits = {"workers": options.workers, "seconds": correctness.SANITIZER_SECONDS + 20, "until": until}
    verdicts = in_processes(correctness.verdict, tasks, chunk=5 if options.tiny else 1, **limits)
    for (index, backend, *_), said in verdicts:
        if isinstance(said, Fault) and backend in backends:
            backends.remove(backend)
        said = "skipped: the time was over" if said is None else said
        yield {"case": names[backend][index], "provider": backend, "result": said}


if __name__ == "__main__":
    main()
