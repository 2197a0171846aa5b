"""The ops as torch.compile sees them. As torch.library does: tests/ops/test_raw_ops.py."""

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import (
    make_context_inputs,
    make_modulate_inputs,
)

OPS = torch.ops.focalnet_kernels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


MODULES = {
    "1d": (fk.FocalModulation1d, (9,)),
    "2d": (fk.FocalModulation, (6, 7)),
    "3d": (fk.FocalModulation3d, (4, 5, 6)),
}


def training_step(function, x, parameters):
    x = x.clone().requires_grad_()
    y = function(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters])
    return y.detach(), *gradients


@pytest.mark.parametrize("postln, name", [(True, "1d"), (False, "2d"), (True, "2d"), (False, "3d")])
def test_modules_compile_without_a_break(backend, name, postln, seed):
    module, size = MODULES[name]
    torch.manual_seed(seed)
    layer = module(16, 3, 2, use_postln_in_modulation=postln)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, *size, 16)
    with fk.use_backend(backend):
        expected = training_step(layer, x, layer.parameters())
        results = training_step(compiled, x, layer.parameters())
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected[0], rtol=1e-4, atol=1e-4)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-3, atol=1e-3)


def test_dynamic_shapes_compile_once(backend, seed):
    torch.manual_seed(seed)
    layer = fk.FocalModulation(16, 3, 2)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with fk.use_backend(backend):
        for B, H, W in ((2, 6, 7), (3, 9, 5), (4, 12, 8)):
            x = torch.randn(B, H, W, 16)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_dynamic_shapes_train(backend, seed):
    torch.manual_seed(seed)
    layer = fk.FocalModulation(16, 3, 2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with fk.use_backend(backend):
        for shape in ((2, 6, 7, 16), (3, 9, 5, 16)):
            x = torch.randn(shape)
            results = training_step(compiled, x, layer.parameters())
            expected = training_step(layer, x, layer.parameters())
            for result, value in zip(results, expected, strict=True):
                torch.testing.assert_close(result, value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_functions_compile_for_any_layout(backend, layout, seed):
    """The fakes promise strides; a wrong promise shows in what follows the op."""
    context = make_context_inputs((2, 16, 5, 6), [3, 5], layout=layout, seed=seed)
    modulate = make_modulate_inputs((2, 16, 5, 6), layout=layout, seed=seed)
    for op, inputs in ((fk.focal_context, context), (fk.modulate, modulate)):
        compiled = torch.compile(lambda op, kw: op(**kw).transpose(1, 2) + 1, fullgraph=True, backend="aot_eager")
        with fk.use_backend(backend):
            expected = op(**inputs).transpose(1, 2) + 1
            result = compiled(op, inputs)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert backend == "reference" or result.stride() == expected.stride()


def test_autocast_compiles(backend, seed):
    torch.manual_seed(seed)
    layer = fk.FocalModulation(16, 3, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 7, 16)
    with fk.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant, seed):
    """Recomputing saves the same tensors and gives the same gradients, bit by bit."""
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(16, 3, 2), torch.randn(2, 6, 7, 16)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    def step(function):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        function(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    with fk.use_backend(backend):
        assert all(map(torch.equal, step(checkpointed), step(layer)))
