"""focal_modulation, the whole layer: every backend against the authors' numbers and against float64."""

import pytest
import torch
from hypothesis import given

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw, make_layer_inputs, map_tensors, run
from ops import golden
from ops.strategies import DTYPES, SWEPT_DTYPES, by_name, dtype_name, layer_cases, seeds, skip_what_cannot_run


def check(backend, shape, kernels, seed, grad_layout="contiguous", normalize=False, mean=0.0, **options):
    inputs = make_layer_inputs(shape, kernels, seed=seed, mean=mean, **options) | {"normalize": normalize}
    generator = torch.Generator().manual_seed(seed + 1)
    grad_output = draw(shape, grad_layout, generator, dtype=inputs["x"].dtype, mean=mean, channel_axis=-1)
    return assert_op_accurate(fk.focal_modulation, inputs, backend, grad_output)


@pytest.mark.parametrize("path", golden.FILES, ids=golden.NAMES)
@pytest.mark.parametrize(
    "dtype, limit",
    [
        (torch.float64, 1e-9),
        (torch.float32, 1e-5),
        pytest.param(torch.float16, 1e-2, marks=pytest.mark.slow_interpreted),
    ],
    ids=dtype_name,
)
def test_authors_numbers(backend, path, dtype, limit):
    skip_what_cannot_run(backend, dtype)
    config, tensors = golden.load(path)
    expected = {"output": tensors["output"]} | golden.layer_gradients(config, tensors)
    inputs = map_tensors(lambda t: t.to(dtype), golden.layer_inputs(config, tensors))
    with fk.use_backend(backend):
        results = run(fk.focal_modulation, inputs, tensors["grad_output"].to(dtype))
    assert results.keys() == expected.keys()
    errors = {name: golden.relative_error(results[name], expected[name]) for name in expected}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("path", golden.FILES, ids=golden.NAMES)
def test_authors_gates_and_modulator(backend, path):
    config, tensors = golden.load(path)
    with fk.use_backend("reference"):
        y, gates, modulator = fk.focal_modulation(**golden.layer_inputs(config, tensors), return_gates=True)
    for result, name in ((y, "output"), (gates, "gates"), (modulator, "modulator")):
        assert golden.relative_error(result, tensors[name]) <= 1e-9, name


@given(case=layer_cases(), seed=seeds)
def test_any_shape(backend, case, seed):
    check(backend, seed=seed, **case)


SHAPES = {
    "sequence": ((2, 19, 17), [3, 5]),
    "tiny-model-stage": ((1, 14, 14, 96), [3, 5]),
    "last-stage": ((2, 7, 7, 40), [3, 5, 7]),
    "two-channels": ((2, 9, 6, 2), [3, 5]),
    "odd-channels": ((2, 8, 11, 33), [5, 7, 9]),
    "detection": ((1, 20, 13, 24), [9, 11, 13]),
    "four-levels": ((1, 12, 12, 16), [3, 5, 7, 9]),
    "no-level": ((2, 5, 7, 16), []),
    "kernel-larger-than-map": ((2, 3, 2, 16), [7, 9]),
    "one-pixel": ((3, 1, 1, 16), [3, 5]),
    "volume": ((1, 4, 5, 6, 17), [3, 5]),
    "uneven-kernel": ((1, 4, 9, 8, 16), [(1, 3, 5), (3, 1, 1)]),
    "empty-batch": ((0, 5, 5, 16), [3]),
    "batch": ((9, 6, 6, 8), [3, 5]),
}


@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, kernels", by_name(SHAPES, ("tiny-model-stage", "odd-channels", "detection")))
def test_shapes(backend, shape, kernels, dtype, seed):
    check(backend, shape, kernels, seed, dtype=dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_weights_of_pointwise_convolutions(backend, memory_format, seed):
    """The same numbers, and gradients of the weights' own shapes and strides, which DDP asks for."""
    inputs = make_layer_inputs((2, 6, 5, 10), [3, 5], seed=seed)
    names = ("f_weight", "h_weight", "proj_weight")
    of_convolutions = {name: inputs[name][:, :, None, None].clone(memory_format=memory_format) for name in names}
    grad_output = torch.randn(2, 6, 5, 10)
    with fk.use_backend(backend):
        expected = run(fk.focal_modulation, inputs, grad_output)
        results = run(fk.focal_modulation, inputs | of_convolutions, grad_output)
    for name in names:
        gradient = results[f"grad {name}"]
        assert gradient.stride() == of_convolutions[name].stride() and gradient.shape[2:] == (1, 1)
        results[f"grad {name}"] = gradient[:, :, 0, 0]
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalize"])
@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_options(backend, bias, postln, normalize, seed):
    options = {"bias": bias, "postln": postln, "normalize": normalize}
    for dtype in DTYPES:
        check(backend, (2, 6, 7, 18), [3, 5], seed, dtype=dtype, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
def test_layouts(backend, dtype, layout, seed):
    check(backend, (2, 7, 9, 18), [3, 5], seed, dtype=dtype, layout=layout, grad_layout=layout, postln=True)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_tokens_that_only_look_adjacent(isa, size, seed):
    """A transposed square map: its first and last token lie as far apart as in a row of neighbours."""
    inputs = make_layer_inputs((2, size, size, 32), [3, 5], layout="channels_last", seed=seed)
    inputs["x"] = inputs["x"].transpose(1, 2)
    grad_output = torch.randn(2, 32, size, size).permute(0, 3, 2, 1)
    assert_op_accurate(fk.focal_modulation, inputs, "cpu", grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, seed):
    for shape, kernels in SHAPES.values():
        check("cpu", shape, kernels, seed, dtype=dtype)
        if shape[-1] >= 8:  # LayerNorm over few channels amplifies rounding without bound
            check("cpu", shape, kernels, seed, dtype=dtype, postln=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("C, size, kernels", [(96, 56, [3, 5, 7]), (192, 28, [3, 5]), (768, 7, [3, 5, 7, 9])])
def test_published_stages(backend, C, size, kernels, dtype, seed):
    check(backend, (2, size, size, C), kernels, seed, dtype=dtype)
