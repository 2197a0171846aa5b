"""The CUDA kernels as nvcc compiles them, on tensor cores and off: what a build for the CPU (cuda_shim) leaves untried.

What runs is PTX, through the library's own plans and launches: see cuda_kernels.py. That of sm_80 is that of sm_90 but
for one instruction, and takes as long to compile: `make test` compares what compiles soon (`test_code_of_both_gpus`),
`make test-slow` compares the rest and runs it all.
"""

import os
import re

import cuda_shim
import pytest
import torch
from ops.strategies import dtype_name

import focalnet_kernels as fk
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import (
    assert_op_accurate,
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    make_modulate_inputs,
    named_tensors,
)
from ptx import cuda_kernels, faults
from ptx.memory import Fault

pytestmark = pytest.mark.skipif(INTERPRETED, reason="these are no kernels of Triton's")

AROUND = {"norm": True, "gamma": True, "drop_path": True}
BY_TOKENS = {"layout": "channels_last"}
CONTEXT = fk.focal_context, make_context_inputs
LAYER = fk.focal_modulation, make_layer_inputs
PASSES = " ".join(f"context_{part}" for part in "fwd_rows down gates up weights".split())
TOKENS = " ".join(
    f"tokens_{part}" for part in "level_fwd means combine mean_gradient gradients level_bwd weights".split()
)

# op and its inputs, bytes of shared memory, and the kernels that must have run
CASES = {
    "images": (*CONTEXT, ((1, 8, 14, 14), (3, 5, 7)), {}, None, "images_fwd images_bwd sum"),
    "images of odd units": (*CONTEXT, ((1, 8, 24, 8), (3, 5)), {}, None, "images_fwd images_bwd"),
    "small images": (*CONTEXT, ((9, 8, 7, 7), (3,)), {}, None, "images_fwd images_bwd"),
    "wide images": (*CONTEXT, ((1, 8, 3, 56), (7,)), {}, None, "images_fwd images_bwd"),
    "images beside one another": (*CONTEXT, ((3, 8, 12, 24), (3, 5, 7)), {}, None, "images_fwd images_bwd"),
    "two channels at a time": (*CONTEXT, ((1, 8, 9, 40), (3, 5, 7)), {}, 90_000, "images_fwd images_bwd"),
    "tokens": (*CONTEXT, ((2, 8, 6, 14), (3, 5)), BY_TOKENS, None, TOKENS),
    "tokens, large kernels": (*CONTEXT, ((1, 4, 3, 20), (9, 13)), BY_TOKENS, None, TOKENS),
    "tokens of volumes": (*CONTEXT, ((1, 8, 3, 4, 5), (3,)), BY_TOKENS, None, TOKENS),
    "rows": (*CONTEXT, ((2, 3, 9, 13), (3, 5)), {}, None, PASSES),
    "rows, four levels": (*CONTEXT, ((1, 2, 9, 13), (3, 5, 7, 9)), {}, None, PASSES),
    "strips of rows": (*CONTEXT, ((1, 2, 90, 56), (3,)), {}, None, f"{PASSES} context_finish"),
    "passes": (*CONTEXT, ((1, 2, 9, 17), (3, 11)), {}, None, PASSES),
    "large gates": (*CONTEXT, ((1, 1, 128, 128), (3,)), {}, None, "sum_pixels"),
    "planes": (*CONTEXT, ((1, 3, 3, 4, 5), (3,)), {}, None, "context_fwd context_bwd"),
    "planes in scratch": (*CONTEXT, ((1, 2, 9, 7), ((15, 3),)), {}, 4096, "context_fwd context_bwd"),
    "layer": (*LAYER, ((2, 6, 8, 8), (3,)), {}, None, "modulate_lines_fwd modulate_lines_bwd line_sums column_sums"),
    "layer of rows": (*LAYER, ((2, 5, 60, 4), (3,)), {}, None, f"{PASSES} modulate_lines_fwd modulate_lines_bwd"),
    "odd layer": (*LAYER, ((2, 2, 3, 7, 20), (3,)), {}, None, "pad_rows modulate_fwd modulate_bwd column_sums"),
    "layer with a norm": (*LAYER, ((1, 6, 8, 8), (3,)), {"postln": True}, None, "modulate_ln_fwd modulate_ln_bwd"),
    "layer of sequences": (*LAYER, ((2, 37, 16), (3,)), {}, None, "modulate_columns_fwd modulate_columns_bwd"),
    "mlp": (fk.mlp_branch, make_mlp_branch_inputs, ((2, 5, 6, 48), 96), AROUND, None,
            "norm_rows residual_fwd norm_bwd gelu_bwd"),
    "mlp, post": (fk.mlp_branch, make_mlp_branch_inputs, ((2, 5, 6, 20), 40), AROUND | {"post_norm": True}, None,
                  "residual_fwd norm_bwd"),
    "branch": (fk.focal_branch, make_focal_branch_inputs, ((2, 6, 8, 8), (3,)), AROUND, None, "norm_rows images_fwd"),
}  # fmt: skip
MODULATE = fk.modulate, make_modulate_inputs, ((1, 40, 5, 6),), {}, None, "modulate_fwd"  # its backward is the layer's

SOON_COMPILED = ("focal_context_fwd_rows", "modulate_fwd", "norm_rows", "pad_rows", "sums", "token_rows")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if reason := cuda_kernels.missing():
        (pytest.fail if os.environ.get("CI") and "nvcc" not in reason else pytest.skip)(reason)
    with cuda_kernels.recorded_memory():
        yield


def check(capability, case, dtype, seed, monkeypatch):
    """Forward and backward within the error rule, without a race or a fault, by the kernels that are meant."""
    op, make, sizes, options, shared, kernels = case
    if shared:
        monkeypatch.setenv("FOCALNET_SHIM_SHARED", str(shared))
    inputs = make(*sizes, dtype=dtype, seed=seed, mean=0.25, **options)
    wanted = [name for name in named_tensors(inputs) if name != "drop_path"]
    y = op(**inputs, backend="reference")
    grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if options == BY_TOKENS:
        grad_output = grad_output.movedim(1, -1).contiguous().movedim(-1, 1)
    with cuda_kernels.emulated(capability, seed) as launches:
        assert_op_accurate(op, inputs, "cuda", grad_output, wanted)
    ran = {result.program.name.partition("<")[0] for result in launches.results}
    assert ran >= named(kernels), ran


def named(kernels):
    return {f"{kernel}_kernel" for kernel in kernels.split()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [*CASES.values(), MODULATE], ids=[*CASES, "modulate"])
def test_ops(case, dtype, capability, seed, monkeypatch):
    check(capability, case, dtype, seed, monkeypatch)


@pytest.mark.parametrize(
    "source",
    [pytest.param(s, id=s.stem, marks=() if s.stem in SOON_COMPILED else pytest.mark.slow) for s in cuda_shim.KERNELS],
)
def test_code_of_both_gpus(source):
    """The same, but for how a bfloat16 becomes a float."""

    def instructions(text):
        text = re.sub(r"mov\.b32 (%f\d+), \{0,(%rs\d+)\};", r"cvt.f32.bf16 \1, \2;", text)
        return [line for line in text.splitlines() if not re.match(r"\s*(\.loc|\.file|\.target|//)", line)]

    (of_80,), (of_90,) = (cuda_kernels.compiled(capability, [source]) for capability in (80, 90))
    assert len(instructions(of_90)) > 50 and instructions(of_80) == instructions(of_90)


@pytest.mark.parametrize("name", ["tokens", "planes", "layer of sequences", "mlp"])
def test_float32(name, seed, monkeypatch):
    check(90, CASES[name], torch.float32, seed, monkeypatch)


def test_every_kernel_has_a_case():
    kernels = {name.partition("<")[0] for name in cuda_kernels.programs(90).entries}
    assert len(kernels) >= 30
    assert set().union(*[named(case[-1]) for case in [*CASES.values(), MODULATE]]) == kernels


# ------------------------------------------------------------ faults planted in compiled kernels


@pytest.fixture
def images(seed, monkeypatch):
    """A forward and backward over images, a few at a time: (its results, its launches)."""
    monkeypatch.setenv("FOCALNET_SHIM_SHARED", "120000")
    monkeypatch.setenv("FOCALNET_SHIM_PROCESSORS", "1")
    shape = (3, 8, 20, 22)  # stretches of six columns and of fewer rows too, and work for both of a channel's warps
    inputs = make_context_inputs(shape, (3, 5), dtype=torch.bfloat16, seed=seed)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def run(order=0):
        tensors = [t.detach().clone().requires_grad_() for t in (inputs["ctx"], inputs["gates"], *inputs["weights"])]
        with cuda_kernels.emulated(90, order) as launches:
            y = fk.focal_context(tensors[0], tensors[1], tensors[2:], backend="cuda")
            y.backward(grad_output)
        return [y, *[t.grad for t in tensors]], launches.results

    return run


def what_is_reported(run, right, name, program, orders=1):
    """With a program in a kernel's place: a fault, a race, other numbers; or nothing."""
    programs = cuda_kernels.programs(90)
    kept = programs[name]
    programs[name] = program
    try:
        for order in range(orders):
            found, _ = run(order)
            if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                return "other numbers"
    except (Fault, AssertionError) as error:
        return str(error)
    finally:
        programs[name] = kept
    return None


@pytest.mark.parametrize("kernels", [(3,), (3, 5), (3, 5, 7), (3, 5, 7, 9)], ids=len)
def test_images_one_after_the_other(kernels, seed, monkeypatch):
    """A block goes on to further images without a barrier of its own."""
    monkeypatch.setenv("FOCALNET_SHIM_SHARED", "64000" if len(kernels) < 4 else "80000")
    monkeypatch.setenv("FOCALNET_SHIM_PROCESSORS", "1")
    case = (*CONTEXT, ((9, 8, 7, 9), kernels), {}, None, "images_fwd images_bwd")
    check(90, case, torch.bfloat16, seed, monkeypatch)


def test_every_barrier_counts(images):
    """Removed one at a time from both kernels. (Barriers of a warp alone: cuda_shim, whose lanes run one by one.)"""
    right, results = images()
    programs = {r.program.name: r.program for r in results if r.program.name.startswith("images")}
    assert {name.partition("<")[0] for name in programs} == {"images_fwd_kernel", "images_bwd_kernel"}
    for name, program in programs.items():
        barriers = faults.barriers(program, sum(r.issued for r in results if r.program is program))
        assert what_is_reported(images, right, name, program, orders=2) is None
        unseen = [i for i in barriers if not what_is_reported(images, right, name, program.without(i), orders=2)]
        assert len(barriers) >= 4 and not unseen, [str(program.instructions[i]) for i in unseen]


@pytest.mark.parametrize("plant, least", faults.PLANTED.values(), ids=faults.PLANTED)
def test_planted_faults_are_noticed(images, plant, least):
    """In the forward's code, one at a time."""
    right, results = images()
    result = next(r for r in results if r.program.name.startswith("images_fwd"))
    assert what_is_reported(images, right, result.program.name, result.program) is None
    places = list(faults.planted(result.program, plant, result.issued, most=4))
    found = {
        f"{i}: {at}": what_is_reported(images, right, result.program.name, faulty)
        for i, (at, faulty) in enumerate(places)
    }
    noticed = sum(map(bool, found.values()))
    assert len(places) >= 3 and noticed >= least * len(places), found
