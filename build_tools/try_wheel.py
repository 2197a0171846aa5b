"""Installs the wheel of dist/ where neither compiler nor nvcc is to be found, and tests it there: `make test-wheel`.

    python build_tools/try_wheel.py newest 2.10

For each torch a fresh environment: the wheel and what it asks for, `info`, `check` of FocalNet-T's layers on the CPU
kernels, the op tests of this tree; then it is uninstalled, and nothing may be left of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("numpy", "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")


def run(*command: str | Path, path: Path, **options) -> str:
    """Of this environment alone: what it does not hold is not found."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FOCALNET", "CUDA", "PYTHON"))
    }
    environment |= {"PATH": str(path), "CC": "none", "CXX": "none"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([str(part) for part in command], env=environment, text=True, cwd=path, **options)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout or ''}")
    return done.stdout or ""


def left_over(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*focalnet*"))


def try_under(torch: str, wheel: Path) -> None:
    folder = ROOT / f"build/wheel-torch-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    binaries = folder / "bin"
    python = binaries / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    wanted = [] if torch == "newest" else [f"torch=={torch}.*"]
    run(python, "-m", "pip", "install", "--quiet", wheel, *wanted, *TESTS, path=binaries)
    for tool in ("gcc", "g++", "cc", "c++", "nvcc"):
        if (binaries / tool).exists():
            sys.exit(f"{tool} is in {binaries}")
    print(run(python, "-m", "focalnet_kernels", "info", path=binaries, stdout=subprocess.PIPE))
    run(binaries / "focalnet-kernels", "check", "--variant", "focalnet_tiny_lrf", "--batch", "1", path=binaries)
    tests = (*"-q -n auto -p no:cacheprovider -m".split(), "not slow", "-k", "not cuda", "-c", ROOT / "pyproject.toml")
    run(binaries / "pytest", *tests, "--rootdir", ROOT, ROOT / "tests/ops", path=binaries)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "focalnet_kernels", path=binaries)
    if found := left_over(site) + left_over(binaries):
        sys.exit(f"left behind: {', '.join(found)}")
    print(f"torch {torch}: installed, tested and gone without a trace")


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    for torch in sys.argv[1:]:
        try_under(torch, wheel)


if __name__ == "__main__":
    main()
