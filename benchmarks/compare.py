"""Whether the working tree is slower than another revision: `make bench-compare BASE=<git rev>`.

Both are built below build/compare/ (FOCALNET_KERNELS_BUILD=cpu unless set) and loaded by a process each. The two wait
for each other and take turns call by call, in changing order, so that drift hits both alike; they are started anew
a few times, because where memory lies differs from process to process. Shown are the ratios of neighbouring calls,
tree / BASE: above 1 the tree is slower. Exits 1 where even the p20 of a ratio is above --limit.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
LEAST_MS = 20  # of one measurement: shorter calls are repeated


@click.command()
@click.option("--base", required=True, help="A git revision.")
@click.option("--variant", default="focalnet_tiny_lrf", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--size", default=224, show_default=True, help="Pixels a side.")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=2))
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--limit", default=1.05, show_default=True)
def main(base, variant, batch, size, dtypes, device, rounds, restarts, limit) -> None:
    revision = _git("rev-parse", "--short=12", f"{base}^{{commit}}")
    libraries = [_built(_worktree(revision), revision), _built(ROOT, "tree")]
    cases = _cases(variant, batch, size, dtypes, device)
    ratios: dict[int, list[float]] = {i: [] for i in range(len(cases))}
    for _ in range(restarts):
        workers = [Worker(library, cases) for library in libraries]
        for i in ratios:
            for turn in range(rounds):
                order = (0, 1) if turn % 2 else (1, 0)
                found = {which: workers[which].measure(i) for which in order}
                ratios[i].append(found[1] / found[0])
        for worker in workers:
            worker.stop()
    slower = []
    print(f"{'tree / ' + revision:52}{'p20':>8}{'p50':>8}{'p80':>8}")
    for i, case in enumerate(cases):
        p20, _, _, p80 = statistics.quantiles(ratios[i], n=5, method="inclusive")
        name = f"{'x'.join(map(str, case['shape']))} {case['dtype']} {case['mode']}"
        print(f"{name:52}{p20:8.3f}{statistics.median(ratios[i]):8.3f}{p80:8.3f}")
        if p20 > limit:
            slower.append(name)
    if slower:
        sys.exit(f"slower than {limit} times {revision}: {', '.join(slower)}")


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True).stdout.strip()


def _worktree(revision: str) -> Path:
    path = ROOT / "build" / "compare" / revision / "tree"
    if not path.exists():
        _git("worktree", "prune")  # of those that `make clean` removed
        _git("worktree", "add", "--detach", str(path), revision)
    return path


def _built(tree: Path, name: str) -> Path:
    """The folder that the package of this source tree was built into; objects of the last build are used again."""
    place = ROOT / "build" / "compare" / name
    library = place / "lib"
    shutil.rmtree(library, ignore_errors=True)  # a module that is gone must not be found
    print(f"building {name}", flush=True)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-temp", place / "temp", "--build-lib", library],
        cwd=tree, check=True, env={"FOCALNET_KERNELS_BUILD": "cpu"} | os.environ, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return library


def _cases(variant, batch, size, dtypes, device) -> list[dict]:
    try:
        from focalnet_kernels.bench.layers import published_layers
    except ModuleNotFoundError:  # an older revision
        from focalnet_kernels.models.layers import published_layers

    shapes = [
        {"shape": (batch, *layer.spatial, layer.dim), "options": layer.options}
        for layer in published_layers(variant, (size, size))
    ]
    shapes.append({"shape": (batch, 3, size, size), "variant": variant})
    modes = ("forward", "forward+backward")
    return [s | {"dtype": d, "mode": m, "device": device} for s in shapes for d in dtypes for m in modes]


class Worker:
    """A process with one build of the package, which measures when told to."""

    def __init__(self, library: Path, cases: list[dict]):
        environment = os.environ | {"PYTHONPATH": str(library), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=library,
        )  # fmt: skip
        self._say(json.dumps(cases))
        loaded = Path(self._hear())
        if not loaded.is_relative_to(library):
            raise RuntimeError(f"expected focalnet_kernels from {library}, got {loaded}")

    def measure(self, case: int) -> float:
        """Milliseconds of one call."""
        self._say(str(case))
        return float(self._hear())

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the process of a revision ended; its message stands above")
        return line


def _work() -> None:
    """What a worker does. Of the package it may use only what every revision has."""
    import focalnet_kernels

    steps = [_step(**case) for case in json.loads(sys.stdin.readline())]
    repeats: dict[int, int] = {}
    print(focalnet_kernels.__file__, flush=True)
    for line in sys.stdin:
        case = int(line)
        if case not in repeats:
            _timed(steps[case], 1)
            repeats[case] = max(1, round(LEAST_MS / _timed(steps[case], 1)))
        print(_timed(steps[case], repeats[case]), flush=True)


def _step(shape, dtype, mode, device, options=None, variant=None):
    import torch

    import focalnet_kernels as fk

    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    if variant is None:
        module = fk.FocalModulation(shape[-1], **options)
    else:
        module = fk.create_model(variant, drop_path_rate=0.0)
    module = module.to(device, dtype)
    x = torch.randn(shape).to(device, dtype)
    if mode == "forward":
        module.eval()

        def forward():
            with torch.inference_mode():
                module(x)

        return forward
    x.requires_grad_(variant is None)

    def both():
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).sum().backward()

    return both


def _timed(step, repeats: int) -> float:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return 1e3 * (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    _work() if "--worker" in sys.argv else main()
