"""The machine can fail: what is wrong with a kernel is reported."""

import numpy as np
import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import make_context_inputs
from ptx.targets import for_every_gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the place of compiled kernels")

if not INTERPRETED:
    from ptx import faults, triton_kernels
    from ptx.machine import run
    from ptx.memory import Fault
    from ptx.program import Program

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 buffer[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 64
{
.reg .pred %p<9>;
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
ld.param.u64 %rd1, [kernel_param_0];
ld.param.u32 %r1, [kernel_param_1];
mov.u32 %r2, %tid.x;
shl.b32 %r3, %r2, 2;
"""


def launch(body, numbers, argument=0, blocks=1, shared=1024, seed=0):
    """Runs `body` in blocks of 64 threads: %rd1 has the address of `numbers`, %r1 `argument`, %r2 the thread, %r3 four
    times that."""
    program = Program(HEAD + body + "ret;\n}")
    data = numbers.view(np.uint8)
    address = 4096
    arguments = address.to_bytes(8, "little") + argument.to_bytes(4, "little")
    return run(program, arguments, [("numbers", address, data)], blocks, None, shared, seed)


AT_THREAD = "cvt.u64.u32 %rd2, %r3;\nadd.s64 %rd3, %rd1, %rd2;\n"
EXCHANGE = (
    "mov.u32 %r4, buffer;\nadd.s32 %r5, %r4, %r3;\nst.shared.b32 [%r5], %r2;\n"
    "{barrier}\n"
    "xor.b32 %r6, %r3, 128;\nadd.s32 %r6, %r4, %r6;\nld.shared.b32 %r7, [%r6];\n"
    + AT_THREAD + "st.global.b32 [%rd3], %r7;\n"
)  # fmt: skip


def test_a_barrier_and_its_absence():
    numbers = np.zeros(64, np.uint32)
    assert not launch(EXCHANGE.format(barrier="bar.sync 0;"), numbers).races
    assert (numbers == np.arange(64) ^ 32).all()
    races = launch(EXCHANGE.format(barrier=""), numbers).races
    assert races and all("another warp" in race for race in races.values())


def test_a_barrier_that_not_all_lanes_reach():
    body = "setp.lt.u32 %p1, %r2, 20;\n@%p1 bra $over;\nbar.sync 0;\n$over:\n"
    with pytest.raises(Fault, match="not all lanes of a warp come to bar.sync"):
        launch(body, np.zeros(64, np.uint32))
    body = "setp.lt.u32 %p1, %r2, 32;\n@%p1 bra $over;\nbar.sync 0;\n$over:\n"
    with pytest.raises(Fault, match="some threads of a block wait at a barrier, others have ended"):
        launch(body, np.zeros(64, np.uint32))


def test_a_shuffle_that_not_all_lanes_reach():
    body = "setp.lt.u32 %p1, %r2, 20;\n@%p1 bra $over;\nshfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;\n$over:\n"
    with pytest.raises(Fault, match="not all lanes of a warp come to shfl"):
        launch(body, np.zeros(64, np.uint32))


def test_lanes_part_and_meet():
    """A loop of as many rounds as the thread's number, and a shuffle after it."""
    body = (
        "mov.u32 %r4, 0;\nmov.u32 %r5, 0;\n$again:\nsetp.ge.u32 %p1, %r4, %r2;\n@%p1 bra $done;\n"
        "add.s32 %r5, %r5, %r4;\nadd.s32 %r4, %r4, 1;\nbra $again;\n$done:\n"
        "shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;\n" + AT_THREAD + "st.global.b32 [%rd3], %r6;\n"
    )
    numbers = np.zeros(64, np.uint32)
    launch(body, numbers)
    thread = np.arange(64) ^ 1
    assert (numbers == thread * (thread - 1) // 2).all()


@pytest.mark.parametrize("offset, message", [(4, "byte 256 of numbers, which has 256"), (2, "misaligned store")])
def test_out_of_bounds_and_misaligned(offset, message):
    with pytest.raises(Fault, match=message):
        launch(AT_THREAD + f"st.global.b32 [%rd3+{offset}], %r2;\n", np.zeros(64, np.uint32))


def test_out_of_shared_memory():
    body = "mov.u32 %r4, buffer;\nadd.s32 %r5, %r4, %r3;\nst.shared.b32 [%r5+800], %r2;\n"
    with pytest.raises(Fault, match="byte 1024 of 1024 bytes of shared memory"):
        launch(body, np.zeros(64, np.uint32))


def test_blocks_that_write_one_place():
    races = launch(
        "mov.u32 %r4, %ctaid.x;\n" + AT_THREAD + "st.global.b32 [%rd3], %r4;\n", np.ones(64, np.uint32), blocks=2
    )
    assert races.races


def test_a_copy_arrives_when_it_is_waited_for():
    body = (
        "mov.u32 %r4, buffer;\nadd.s32 %r5, %r4, %r3;\n" + AT_THREAD + "cp.async.ca.shared.global [%r5], [%rd3], 4;\n"
        "cp.async.commit_group;\n{wait}\nld.shared.b32 %r6, [%r5];\nst.global.b32 [%rd3], %r6;\n"
    )
    expected = np.arange(64, dtype=np.uint32) + 7
    for wait, arrived in (("cp.async.wait_group 0;", True), ("", False), ("cp.async.wait_group 1;", False)):
        numbers = expected.copy()
        launch(body.format(wait=wait), numbers)
        assert (numbers == expected).all() == arrived


INTEGERS = {
    "div.s32": lambda a, b: np.trunc(a / b),
    "rem.s32": lambda a, b: np.fmod(a, b),
    "mul.hi.s32": lambda a, b: (a * b) >> 32,
    "min.s32": np.minimum,
    "shr.s32": lambda a, b: a >> np.minimum(b % 2**32, 31),
    "sub.s32": lambda a, b: a - b,
    "xor.b32": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode):
    """Of signed numbers, against Python's and NumPy's in 64 bits."""
    body = AT_THREAD + f"ld.global.b32 %r4, [%rd3];\n{opcode} %r5, %r4, %r1;\nst.global.b32 [%rd3], %r5;\n"
    for other in (3, 40, -7 % 2**32):
        numbers = np.random.default_rng(other).integers(-(2**31), 2**31, 64).astype(np.int32)
        signed = np.int64(other - 2**32 if other >= 2**31 else other)
        expected = INTEGERS[opcode](numbers.astype(np.int64), signed).astype(np.int64).astype(np.int32)
        launch(body, numbers, argument=other)
        assert (numbers == expected).all(), other


# ------------------------------------------------------------ faults planted in compiled kernels


def recorded(op, inputs, capability):
    """The launches of a forward, its result from the machine, and that of float64 and of eager PyTorch."""
    launches = []
    real = triton_kernels.run_launch
    with pytest.MonkeyPatch.context() as patch, triton_kernels.emulated(capability):
        patch.setattr(triton_kernels, "run_launch", lambda *a: launches.append(a[0]) or real(*a))
        y = op(**inputs, backend="triton")
    return launches, y


def with_program(launch, capability, program, seed=0):
    """The launch again, its kernel replaced. A fault, its races, or nothing."""
    key = next(k for k, v in triton_kernels._compiled.items() if v == triton_kernels.compiled(launch, capability))
    kept = triton_kernels._compiled[key]
    triton_kernels._compiled[key] = program, *kept[1:]
    try:
        return triton_kernels.run_launch(launch, capability, seed).races
    except Fault as fault:
        return {"fault": str(fault)}
    finally:
        triton_kernels._compiled[key] = kept


@pytest.mark.slow  # minutes, and test_cuda.py does the same with kernels of fewer barriers
@for_every_gpu
def test_every_barrier_counts(capability, seed):
    """Removed one at a time from a forward: a race, or else another barrier stands beside it."""
    inputs = make_context_inputs((3, 14, 14, 14), (3, 5, 7), dtype=torch.bfloat16, seed=seed)
    (launch, *_), _ = recorded(fk.focal_context, inputs, capability)
    program = triton_kernels.compiled(launch, capability)[0]
    barriers = [i for i, instruction in enumerate(program.instructions) if instruction.opcode[0] == "bar"]
    unseen = []
    for barrier in barriers:
        without = program.without(barrier)
        if not any(with_program(launch, capability, without, order) for order in range(2)):
            unseen.append(str(program.instructions[barrier]))
    print(f"{len(barriers)} barriers, unseen: {unseen}")
    assert len(barriers) > 20 and len(unseen) <= len(barriers) // 8, unseen


@pytest.mark.parametrize("plant, least", faults.PLANTED.values(), ids=faults.PLANTED)
def test_planted_faults_are_noticed(plant, least, seed):
    """In the code of a forward, one at a time: a fault, a race, or another result."""
    inputs = make_context_inputs((3, 14, 14, 14), (3, 5, 7), dtype=torch.bfloat16, seed=seed)
    (launch, *_), y = recorded(fk.focal_context, inputs, 80)
    right, program = y.clone(), triton_kernels.compiled(launch, 80)[0]
    places = list(faults.planted(program, plant, triton_kernels.run_launch(launch, 80).issued, most=4))
    noticed = 0
    for _, faulty in places:
        y.fill_(float("nan"))
        noticed += bool(with_program(launch, 80, faulty)) or not torch.equal(y, right)
    assert len(places) == 4 and noticed >= least * len(places), f"{noticed} of {len(places)}"
    assert not with_program(launch, 80, program) and torch.equal(y, right)
