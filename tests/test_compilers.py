"""The CPU kernels compile with every compiler that is taken, of those that are installed: `make test-slow`."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
COMPILERS = [*(f"g++-{n}" for n in range(10, 16)), *(f"clang++-{n}" for n in range(14, 23))]
FILES = sorted(path.name for path in CSRC.glob("cpu/isa*.cpp"))  # all that is written in vectors


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_compile(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    for name in FILES:
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-ffp-contract=fast", f"-I{CSRC}", "-c", CSRC / "cpu" / name]
        done = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
