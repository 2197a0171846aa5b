"""modulate: every backend against float64, for any shape, dtype and memory layout."""

import pytest
import torch
from hypothesis import given

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw, make_modulate_inputs
from ops.strategies import DTYPES, dtype_name, modulate_cases, seeds


def check(backend, shape, seed, grad_layout="contiguous", mean=0.0, **options):
    inputs = make_modulate_inputs(shape, seed=seed, mean=mean, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    grad_output = draw(shape, grad_layout, generator, dtype=inputs["q"].dtype, mean=mean)
    return assert_op_accurate(fk.modulate, inputs, backend, grad_output)


@given(case=modulate_cases(), seed=seeds)
def test_any_shape(backend, case, seed):
    check(backend, seed=seed, **case)


SHAPES = {
    "sequence": (2, 17, 19),
    "map": (2, 96, 14, 14),
    "one-channel": (2, 1, 9, 6),
    "odd-channels": (2, 33, 8, 11),
    "one-pixel": (3, 16, 1, 1),
    "volume": (1, 17, 4, 5, 6),
    "empty-batch": (0, 16, 5, 5),
    "wide": (1, 200, 3, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend, shape, dtype, seed):
    check(backend, shape, seed, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(backend, dtype, layout, seed):
    check(backend, (2, 18, 7, 9), seed, dtype=dtype, layout=layout, grad_layout=layout)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_tokens_that_only_look_adjacent(isa, size, seed):
    """A transposed square map: its first and last token lie as far apart as in a row of neighbours."""
    inputs = make_modulate_inputs((2, 32, size, size), seed=seed)
    for name in ("q", "ctx_all"):
        inputs[name] = inputs[name].mT
    assert_op_accurate(fk.modulate, inputs, "cpu", torch.randn(2, 32, size, size).mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, seed):
    for shape in SHAPES.values():
        check("cpu", shape, seed, dtype=dtype)


def test_takes_the_weight_of_a_pointwise_convolution(backend, seed):
    inputs = make_modulate_inputs((2, 18, 7, 9), seed=seed)
    with fk.use_backend(backend):
        plain = fk.modulate(**inputs)
        inputs["weight"] = inputs["weight"][:, :, None, None]
        assert torch.equal(fk.modulate(**inputs), plain)
    assert_op_accurate(fk.modulate, inputs, backend, torch.randn(2, 18, 7, 9))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_widest_model(backend, dtype, seed):
    """The huge model's last stage: sums of 2816 terms, where one long float32 chain loses to blocked ones."""
    check(backend, (1, 2816, 7, 7), seed, dtype=dtype, layout="channels_last")
