"""What torch's flop counter says of the raw ops: as much as of plain PyTorch in their place, gradient by gradient."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import focalnet_kernels as fk
from focalnet_kernels.testing import (
    branch_tensors,
    layer_tensors,
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    make_modulate_inputs,
    map_tensors,
)

OPS = torch.ops.focalnet_kernels
VARIANTS = ("", "_triton", "_cuda")
SIZES = {"1d": ((9,), [3, 5]), "2d": ((6, 5), [3, 5]), "3d": ((3, 4, 5), [3, 3]), "no levels": ((6, 5), [])}
for_every_size = pytest.mark.parametrize("size, kernels", SIZES.values(), ids=SIZES)


def counted(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        result = function(*args, **kwargs)
    return counter.get_total_flops(), result


def on_meta(inputs):
    return map_tensors(lambda t: t.to("meta"), inputs)


def backward_of_reference(op, inputs, tensors, needed):
    """What plain PyTorch's backward counts where these of the tensors need gradients."""
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            tensor.requires_grad_(bool(needed >> i & 1))
    y = op(**inputs, backend="reference")
    wanted = [t for i, t in enumerate(tensors) if needed >> i & 1]
    flops = counted(torch.autograd.grad, y, wanted, torch.empty_like(y))[0]
    for tensor in wanted:
        tensor.requires_grad_(False)
    return flops


@for_every_size
@pytest.mark.parametrize("variant", VARIANTS)
def test_focal_context(variant, size, kernels):
    inputs = on_meta(make_context_inputs((2, 8, *size), kernels))
    ctx, gates, weights = inputs.values()
    flops, (y, mean) = counted(getattr(OPS, f"focal_context_fwd{variant}"), ctx, gates, weights, False)
    assert flops == counted(fk.focal_context, **inputs, backend="reference")[0]
    backward = getattr(OPS, f"focal_context_bwd{variant}")
    for needed in range(1, 1 << (2 + len(kernels))):
        flops = counted(backward, torch.empty_like(y), ctx, gates, weights, mean, False, needed)[0]
        assert flops == backward_of_reference(fk.focal_context, inputs, (ctx, gates, *weights), needed), needed


@pytest.mark.parametrize("variant", VARIANTS)
def test_modulate(variant):
    inputs = on_meta(make_modulate_inputs((2, 8, 6, 5)))
    flops = counted(getattr(OPS, f"modulate_fwd{variant}"), *inputs.values())[0]
    assert flops == counted(fk.modulate, **inputs, backend="reference")[0] > 0


@for_every_size
@pytest.mark.parametrize("variant", VARIANTS)
def test_focal_modulation(variant, size, kernels):
    inputs = on_meta(make_layer_inputs((2, *size, 8), kernels, postln=True))
    x, parameters = layer_tensors(inputs)
    flops, results = counted(getattr(OPS, f"focal_modulation_fwd{variant}"), x, parameters, False, 1e-5, True)
    assert flops == counted(fk.focal_modulation, **inputs, backend="reference")[0] > 0
    y, intermediate = results
    backward = getattr(OPS, f"focal_modulation_bwd{variant}")
    tensors = (x, *parameters)
    some = [*(1 << i for i in range(len(tensors))), *(1 << i | 1 << j for i, j in itertools.combinations(range(9), 2))]
    for needed in [*some, (1 << len(tensors)) - 1]:
        arguments = (torch.empty_like(y), x, parameters, *intermediate, False, 1e-5, needed)
        assert counted(backward, *arguments)[0] == backward_of_reference(fk.focal_modulation, inputs, tensors, needed)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mlp_branch(variant, post):
    inputs = on_meta(make_mlp_branch_inputs((2, 5, 6, 8), 24, post_norm=post, gamma=True))
    check_branch(fk.mlp_branch, f"mlp_branch_fwd{variant}", inputs, (1e-5, post, False))
    check_branch(fk.mlp_branch, f"mlp_branch_fwd{variant}", inputs, (1e-5, post, True))


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_focal_branch(variant, post):
    inputs = on_meta(make_focal_branch_inputs((2, 5, 6, 8), [3, 5], post_norm=post, gamma=True, postln=True))
    check_branch(fk.focal_branch, f"focal_branch_fwd{variant}", inputs, (False, 1e-5, 1e-5, post))


def check_branch(op, forward, inputs, options):
    x, parameters = branch_tensors(inputs)
    flops, (y, saved) = counted(getattr(OPS, forward), x, parameters, *options, True)
    assert flops == counted(op, **inputs, backend="reference")[0] > 0
    tensors = (x, *parameters)
    differentiable = [i for i, t in enumerate(tensors) if t is not None]
    for needed in [1 << i for i in differentiable] + [sum(1 << i for i in differentiable)]:
        arguments = (torch.empty_like(y), x, parameters, saved, *options, needed)
        found = counted(getattr(OPS, forward.replace("_fwd", "_bwd")), *arguments)[0]
        assert found == backward_of_reference(op, inputs, tensors, needed)


ORDERS = """
import sys
for name in sys.argv[1:]:
    __import__(name)
from torch.utils.flop_counter import flop_registry
print(sum(str(op).startswith("focalnet_kernels.") for op in flop_registry))
"""


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "focalnet_kernels"])
def test_whichever_is_imported_first(first):
    done = subprocess.run([sys.executable, "-c", ORDERS, first, "focalnet_kernels"], capture_output=True, text=True)
    assert done.stdout.strip() == "34", done.stderr
