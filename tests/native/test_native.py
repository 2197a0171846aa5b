"""The CPU kernels without torch, on machines that need not be there: aarch64, and x86-64 without AVX-512 or AVX2.

`kernels.cpp` beside this file holds them to double precision. What emulates is qemu-user; what is not installed is
skipped, and says so.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import cuda_shim
import pytest

CSRC = cuda_shim.CSRC
HARNESS = Path(__file__).parent / "kernels.cpp"
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=fast", "-Wno-attributes", f"-I{CSRC}"]
X86 = sorted((CSRC / "cpu").glob("isa*.cpp"))
ANYWHERE = [CSRC / "cpu/isa.cpp", CSRC / "cpu/isa_portable.cpp"]
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is no x86-64")


def need(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def build(name, compiler, sources, *flags):
    """The program; of the same sources once."""
    need(compiler)
    key = hashlib.sha256(" ".join([compiler, *FLAGS, *flags]).encode())
    for path in sorted([HARNESS, *sources, *CSRC.rglob("*.h")]):
        key.update(path.read_bytes())
    program = cuda_shim.ROOT / "build/native" / f"{name}-{key.hexdigest()[:16]}"
    with cuda_shim.locked(program.parent):
        if not program.exists():
            unfinished = program.with_suffix(".tmp")
            command = [compiler, *FLAGS, *flags, HARNESS, *sources, "-o", unfinished]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            unfinished.rename(program)
    return program


def check(command, kernels, seed, **environment):
    """Every kernel is right, in the instruction set that is meant; None: in whichever."""
    done = subprocess.run(
        [*command, str(seed % 2**63)], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    first, *lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0 and lines[-1] == "0 wrong", done.stdout + done.stderr
    assert len(lines) > 60 and (kernels is None or first.startswith(f"{kernels}, ")), first


@on_x86
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_here(level, isa_of_this_machine, seed):
    if level not in isa_of_this_machine:
        pytest.skip(f"this machine has no {level}")
    check([build("x86", os.environ.get("CXX", "g++"), X86, "-static")], level, seed, FOCALNET_KERNELS_CPU_ISA=level)


@pytest.fixture
def isa_of_this_machine():
    """What the program says that it could run."""
    program = build("x86", os.environ.get("CXX", "g++"), X86, "-static")
    environment = os.environ | {"FOCALNET_KERNELS_CPU_ISA": "none of them"}
    return subprocess.run([program], env=environment, capture_output=True, text=True).stderr


@on_x86
@pytest.mark.parametrize(
    ("cpu", "kernels"), [("Haswell", "avx2"), ("SandyBridge", "portable"), ("Nehalem", "portable")]
)
def test_older_x86(cpu, kernels, seed):
    """What such a machine takes by itself, and no instruction that it lacks."""
    need("qemu-x86_64")
    program = build("x86", os.environ.get("CXX", "g++"), X86, "-static")
    check(["qemu-x86_64", "-cpu", cpu, program], kernels, seed)


def test_aarch64(seed):
    """In NEON, through the same vectors."""
    need("qemu-aarch64")
    program = build("aarch64", "aarch64-linux-gnu-g++", ANYWHERE, "-static", "-O2")
    check(["qemu-aarch64", program], "portable", seed)
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", program], capture_output=True, text=True, check=True
    ).stdout
    assert code.count("fmla\tv") > 500


@pytest.mark.slow
def test_another_function_is_noticed(seed):
    """GELU's slope with another pi: every gradient differs, and no forward."""
    sources = X86 if platform.machine() == "x86_64" else ANYWHERE
    program = build("wrong", os.environ.get("CXX", "g++"), sources, "-DPI=3.0")
    done = subprocess.run([program, str(seed % 2**63)], capture_output=True, text=True)
    wrong = {line.split("  ")[0] for line in done.stdout.splitlines() if "WRONG" in line}
    assert done.returncode == 1
    assert wrong >= {"map grad ctx", "volume grad weight"} and not any("forward" in line for line in wrong), wrong
