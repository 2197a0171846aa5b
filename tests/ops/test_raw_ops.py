"""The raw ops of every backend as torch.library sees them: schema, fake, strides, what is changed and what aliased."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import (
    LAYOUTS,
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
SUFFIX = {"cpu": "", "triton": "_triton", "cuda": "_cuda"}  # of the raw ops' names

RARE = ("contiguous", "channels_last", "expanded", "permuted", "offset")
SLOW = pytest.mark.slow if INTERPRETED else ()  # the interpreter takes its time for each; 16 bits are contiguous


def raw_op(name, backend):
    return getattr(OPS, name + SUFFIX[backend])


def opcheck(name, backend, layout, dtype, seed):
    arguments = RAW_OPS[name](backend, layout, dtype, seed)
    torch.library.opcheck(raw_op(name.partition("-")[0], backend).default, arguments)


def context_arguments(backend, layout, dtype, seed):
    inputs = make_context_inputs((2, 10, 5, 6), [3, 5], layout=layout, dtype=dtype, seed=seed)
    return *inputs.values(), True


def modulate_arguments(backend, layout, dtype, seed):
    return tuple(make_modulate_inputs((2, 10, 5, 6), layout=layout, dtype=dtype, seed=seed).values())


def layer_arguments(save, postln=True):
    def make(backend, layout, dtype, seed):
        inputs = make_layer_inputs((2, 5, 6, 10), [3, 5], postln=postln, layout=layout, dtype=dtype, seed=seed)
        return *layer_tensors(inputs), False, 1e-5, save

    return make


def context_bwd_arguments(needed):
    def make(backend, layout, dtype, seed):
        ctx, gates, weights, normalize = context_arguments(backend, layout, dtype, seed)
        _, mean = raw_op("focal_context_fwd", backend)(ctx, gates, weights, normalize)
        return torch.randn(ctx.shape).to(dtype), ctx, gates, weights, mean, normalize, needed

    return make


def layer_bwd_arguments(needed, postln=True):
    def make(backend, layout, dtype, seed):
        arguments = layer_arguments(True, postln)(backend, layout, dtype, seed)
        _, saved = raw_op("focal_modulation_fwd", backend)(*arguments)
        x, parameters, normalize, ln_eps, _ = arguments
        return torch.randn(x.shape).to(dtype), x, parameters, *saved, normalize, ln_eps, needed

    return make


def mlp_branch_arguments(save, post=False, keep_hidden=False):
    def make(backend, layout, dtype, seed):
        inputs = make_mlp_branch_inputs(
            (2, 5, 6, 10), 24, post_norm=post, gamma=post, drop_path=True, layout=layout, dtype=dtype, seed=seed
        )
        return *branch_tensors(inputs), 1e-5, post, keep_hidden, save

    return make


def focal_branch_arguments(save, post=False):
    def make(backend, layout, dtype, seed):
        inputs = make_focal_branch_inputs(
            (2, 5, 6, 10), [3, 5], post_norm=post, gamma=post, drop_path=True, layout=layout, dtype=dtype, seed=seed
        )
        return *branch_tensors(inputs), False, 1e-5, 1e-5, post, save

    return make


def branch_bwd_arguments(forward, make_forward, needed):
    def make(backend, layout, dtype, seed):
        x, parameters, *options, save = make_forward(backend, layout, dtype, seed)
        _, saved = raw_op(forward, backend)(x, parameters, *options, save)
        return torch.randn(x.shape).to(dtype), x, parameters, saved, *options, needed

    return make


RAW_OPS = {
    "mlp_branch_fwd": mlp_branch_arguments(False),
    "mlp_branch_fwd-post": mlp_branch_arguments(True, post=True),
    "mlp_branch_fwd-keep": mlp_branch_arguments(True, post=True, keep_hidden=True),
    "focal_branch_fwd": focal_branch_arguments(False),
    "focal_branch_fwd-post": focal_branch_arguments(True, post=True),
    "mlp_branch_bwd": branch_bwd_arguments("mlp_branch_fwd", mlp_branch_arguments(True), 0b1111111),
    "mlp_branch_bwd-post": branch_bwd_arguments("mlp_branch_fwd", mlp_branch_arguments(True, True), 0b11111111),
    "mlp_branch_bwd-keep": branch_bwd_arguments("mlp_branch_fwd", mlp_branch_arguments(True, True, True), 0b11111111),
    "focal_branch_bwd": branch_bwd_arguments("focal_branch_fwd", focal_branch_arguments(True), 0b1100111111111),
    "focal_branch_bwd-post": branch_bwd_arguments(
        "focal_branch_fwd", focal_branch_arguments(True, True), 0b11100111111111
    ),
    "focal_context_fwd": context_arguments,
    "modulate_fwd": modulate_arguments,
    "focal_modulation_fwd": layer_arguments(False),
    "focal_modulation_fwd-save": layer_arguments(True),
    "focal_context_bwd": context_bwd_arguments(0b1111),
    "focal_context_bwd-some": context_bwd_arguments(0b0101),
    "focal_modulation_bwd": layer_bwd_arguments(0b00111111111, postln=False),
    "focal_modulation_bwd-postln": layer_bwd_arguments(0b11111111111),
    "focal_modulation_bwd-some": layer_bwd_arguments(0b00000010010),
}


@pytest.mark.parametrize("name", RAW_OPS)
@pytest.mark.parametrize("layout", [pytest.param(x, marks=SLOW if x in RARE else ()) for x in LAYOUTS])
def test_opcheck(kernels, name, layout, seed):
    opcheck(name, kernels, layout, torch.float32, seed)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW if n.endswith(("some", "postln")) else ()) for n in RAW_OPS]
)
def test_opcheck_16_bits(kernels, name, seed):
    dtype = torch.float16 if kernels == "triton" else torch.bfloat16  # which Triton's interpreter computes wrongly
    opcheck(name, kernels, "contiguous", dtype, seed)


@pytest.mark.parametrize("backend", SUFFIX)
@pytest.mark.parametrize("name", [name for name in RAW_OPS if "fwd" in name])
def test_exist_without_kernels(name, backend, seed):
    """Schema and fake stand in Python: the meta device needs no extension and no Triton."""
    call = map_tensors(lambda t: t.to("meta"), RAW_OPS[name](backend, "contiguous", torch.float32, seed))
    found = raw_op(name.partition("-")[0], backend)(*call)
    first = found[0] if isinstance(found, tuple) else found
    assert first.shape == call[0].shape and first.device.type == "meta"


@pytest.mark.parametrize("name", RAW_OPS)
def test_copy_on_write(kernels, name, seed):
    """What is shared until somebody writes to it is read, on any thread, and stays shared."""
    arguments = RAW_OPS[name](kernels, "contiguous", torch.float32, seed)
    shared = map_tensors(torch._lazy_clone, arguments)
    op = raw_op(name.partition("-")[0], kernels)
    torch.testing.assert_close(op(*shared), op(*arguments), rtol=0, atol=0)
    if kernels != "triton":  # which asks for the pointer to write through
        assert all(map(torch._C._is_cow_tensor, (t for t in tree_leaves(shared) if isinstance(t, torch.Tensor))))
