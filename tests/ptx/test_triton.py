"""Triton's kernels as compiled for NVIDIA GPUs, in the dtypes that Triton's interpreter cannot do, on tensor cores.

What runs is the PTX of sm_80 and sm_90, through the real dispatch, plans and launches: see machine.py.
"""

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import (
    LAYOUTS,
    assert_op_accurate,
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    make_modulate_inputs,
    named_tensors,
)
from ptx.targets import for_every_gpu, for_every_gpu_and_dtype

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the place of compiled kernels")

if not INTERPRETED:
    from ptx.triton_kernels import emulated

AROUND = {"norm": True, "gamma": True, "drop_path": True}
CASES = {
    "context": (fk.focal_context, make_context_inputs, ((2, 16, 14, 14), (3, 5, 7)), {}),
    "context of small maps": (fk.focal_context, make_context_inputs, ((3, 24, 7, 7), (3, 5, 7)), {}),
    "context of odd maps": (fk.focal_context, make_context_inputs, ((2, 5, 9, 11), (3, (5, 7))), {}),
    "context of maps below the kernel": (fk.focal_context, make_context_inputs, ((2, 3, 3, 2), (7,)), {}),
    "context of a strip": (fk.focal_context, make_context_inputs, ((1, 16, 70, 20), (3, 5)), {}),
    "context of large kernels": (fk.focal_context, make_context_inputs, ((1, 16, 20, 23), (9, 11)), {}),
    "context of sequences": (fk.focal_context, make_context_inputs, ((2, 18, 45), (3, 5)), {}),
    "context of volumes": (fk.focal_context, make_context_inputs, ((1, 16, 4, 5, 6), (3, 3)), {}),
    "context without levels": (fk.focal_context, make_context_inputs, ((2, 16, 5, 6), ()), {}),
    "modulate": (fk.modulate, make_modulate_inputs, ((2, 40, 9, 10),), {}),
    "modulate of many channels": (fk.modulate, make_modulate_inputs, ((1, 272, 5, 6),), {"bias": False}),
    "layer": (fk.focal_modulation, make_layer_inputs, ((2, 14, 14, 24), (3, 5)), {}),
    "layer with a norm": (fk.focal_modulation, make_layer_inputs, ((1, 7, 9, 40), (3, 5)), {"postln": True}),
    "layer of sequences": (fk.focal_modulation, make_layer_inputs, ((2, 37, 16), (3,)), {"bias": False}),
    "mlp": (fk.mlp_branch, make_mlp_branch_inputs, ((2, 7, 9, 48), 192), AROUND),
    "mlp, post": (fk.mlp_branch, make_mlp_branch_inputs, ((2, 7, 9, 96), 200), AROUND | {"post_norm": True}),
    "mlp of many channels": (fk.mlp_branch, make_mlp_branch_inputs, ((2, 5, 6, 136), 200), AROUND),
    "branch": (fk.focal_branch, make_focal_branch_inputs, ((2, 9, 10, 24), (3, 5)), AROUND),
    "branch, post": (fk.focal_branch, make_focal_branch_inputs, ((2, 5, 7, 24), (3,)), AROUND | {"post_norm": True}),
}  # fmt: skip


def check(capability, op, inputs, seed):
    """Forward and backward within the error rule, without a race or a fault."""
    wanted = [name for name in named_tensors(inputs) if name != "drop_path"]
    y = op(**inputs, backend="reference")
    generator = torch.Generator().manual_seed(seed)
    grad_output = torch.randn(y.shape, generator=generator).to(y.dtype)
    with emulated(capability, seed) as launches:
        assert_op_accurate(op, inputs, "triton", grad_output, wanted)
    assert launches.results


@for_every_gpu_and_dtype
@pytest.mark.parametrize("op, make, sizes, options", CASES.values(), ids=CASES)
def test_ops(op, make, sizes, options, dtype, capability, seed):
    check(capability, op, make(*sizes, dtype=dtype, seed=seed, mean=0.25, **options), seed)


# the strangest of them; the interpreter has all
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in ("expanded", "permuted") else pytest.mark.slow) for name in LAYOUTS],
)
@pytest.mark.parametrize("name", ["context", "modulate", "layer", "mlp", "branch"])
def test_strides(name, layout, seed):
    op, make, sizes, options = CASES[name]
    small = {"context": ((2, 10, 6, 9), (3, 5)), "layer": ((2, 6, 7, 24), (3, 5)), "branch": ((2, 6, 7, 24), (3, 5))}
    sizes = small.get(name, sizes)
    check(80, op, make(*sizes, dtype=torch.bfloat16, seed=seed, layout=layout, **options), seed)


@for_every_gpu
@pytest.mark.parametrize("make, sizes", [CASES["mlp"][1:3], CASES["mlp of many channels"][1:3]], ids=["one", "around"])
def test_residual_of_more_bits(make, sizes, capability, seed):
    options = {"dtype": torch.bfloat16, "residual_dtype": torch.float32, "seed": seed, **AROUND}
    check(capability, fk.mlp_branch, make(*sizes, **options), seed)


@for_every_gpu
def test_kept_hidden_values(capability, seed):
    inputs = make_mlp_branch_inputs((2, 5, 6, 40), 160, dtype=torch.bfloat16, seed=seed, **AROUND)
    check(capability, fk.mlp_branch, inputs | {"keep_hidden": True}, seed)


def test_warps_in_any_order_give_the_same_bits(seed):
    inputs = make_layer_inputs((2, 9, 10, 24), (3, 5), dtype=torch.bfloat16, seed=seed)
    found = []
    for order in range(3):
        with emulated(80, order):
            found.append(fk.focal_modulation(**inputs, backend="triton"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
