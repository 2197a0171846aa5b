"""Counts beside what is known: numbers that can be said beforehand, and machine code."""

import re
import subprocess

import numpy as np
import pytest

from focalnet_kernels.ops.triton.launch import INTERPRETED

resources = pytest.importorskip("focalnet_kernels.ops.triton.resources", reason="its cuobjdump reads machine code")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="these are no kernels of Triton's")

from ptx import cuda_kernels  # noqa: E402
from ptx.meter import NOTHING, Traffic, kind_and_cost  # noqa: E402
from ptx.program import Program  # noqa: E402
from ptx.test_machine import HEAD  # noqa: E402

LANES = np.arange(32)
WARP = np.full(32, 7 << 40)


def instruction(text):
    return Program(HEAD + text + "\n}").instructions[-1]


LOAD = instruction("ld.global.b32 %r4, [%rd1];")


@pytest.mark.parametrize(
    "addresses, size, sectors",
    [(4 * LANES, 4, 4), (16 * LANES, 16, 16), (32 * LANES, 2, 32), (0 * LANES, 8, 1)],
    ids=["in a row", "wide, in a row", "a sector each", "one for all"],
)
def test_sectors(addresses, size, sectors):
    traffic = Traffic()
    traffic.global_access("load", addresses, size, WARP, LOAD)
    assert (traffic.loaded_sectors, traffic.stored_sectors) == (sectors, 0)
    traffic.global_access("store", np.tile(addresses, 2), size, np.repeat([1 << 40, 2 << 40], 32), LOAD)
    assert traffic.stored_sectors == 2 * sectors  # of two warps


@pytest.mark.parametrize(
    "addresses, size, wavefronts, ideal",
    [
        (4 * LANES, 4, 1, 1), (128 * LANES, 4, 32, 1), (8 * LANES, 4, 2, 1), (0 * LANES, 4, 1, 1), (2 * LANES, 2, 1, 1),
        (16 * LANES, 16, 4, 4), (16 * LANES, 8, 4, 2), (128 * LANES, 16, 32, 4), (144 * LANES, 16, 4, 4),
    ],
)  # fmt: skip
def test_wavefronts(addresses, size, wavefronts, ideal):
    traffic = Traffic()
    traffic.shared_access("load", addresses, size, WARP, LOAD)
    assert (traffic.wavefronts, traffic.ideal_wavefronts) == (wavefronts, ideal)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("add.s32 %r4, %r5, %r6;", ("integer", 1)),
        ("add.s64 %rd4, %rd5, %rd6;", ("integer", 2)),
        ("rem.s32 %r4, %r5, %r6;", ("integer", 22)),
        ("fma.rn.f32 %r4, %r5, %r6, %r7;", ("float", 1)),
        ("ex2.approx.ftz.f32 %r4, %r5;", ("special", 1)),
        ("mov.b32 %r4, %r5;", (NOTHING, 0)),
        ("ld.param.u64 %rd4, [kernel_param_0];", (NOTHING, 0)),
        ("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];", ("global 16 bytes", 1)),
        ("st.shared.b32 [%r4], %r5;", ("shared", 1)),
        ("bar.sync 0;", ("barrier", 1)),
    ],
)
def test_kinds(text, expected):
    assert kind_and_cost(instruction(text)) == expected


@pytest.mark.parametrize(
    "name", ["images_fwd_kernel<__nv_bfloat16, 72, true>", "tokens_level_fwd_kernel<__nv_bfloat16, 7>"]
)
def test_costs_are_those_of_machine_code(name, tmp_path):
    """Every instruction of a kernel once: as many in SASS, within 15%."""
    if reason := cuda_kernels.missing():
        pytest.skip(reason)
    program = cuda_kernels.programs(90)[name]
    (tmp_path / "kernel.ptx").write_text(program.text)
    command = [cuda_kernels.tool("ptxas"), "-arch=sm_90", "-e", program.entry]
    subprocess.run([*command, tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"], check=True)
    (tool,) = resources._nvidia_tools("cuobjdump")
    said = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    machine_code = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", said, re.M)
    issued = [opcode for opcode in machine_code if not opcode.startswith(("NOP", "BSSY", "BSYNC"))]
    counted = sum(cost for _, cost in map(kind_and_cost, program.instructions))
    assert 0.85 < counted / len(issued) < 1.15, f"{counted:.0f} counted, {len(issued)} in {name}"
