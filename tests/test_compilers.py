"""The CPU kernels with every compiler that is taken, of those that are installed: `make test-slow`."""

import platform
import shutil

import pytest
from native.test_native import ANYWHERE, X86, build, check

COMPILERS = [*(f"g++-{n}" for n in range(10, 16)), *(f"clang++-{n}" for n in range(14, 23))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_of_another_compiler(compiler, seed):
    """Compiled, linked and right, in the best instruction set that this machine has."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = build(compiler, compiler, X86 if platform.machine() == "x86_64" else ANYWHERE, "-fPIC")
    check([program], None, seed)
