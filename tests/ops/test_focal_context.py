"""focal_context: every backend against float64, for any shape, kernel, dtype and memory layout."""

import pytest
import torch
from hypothesis import given

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw, make_context_inputs
from ops import golden
from ops.strategies import DTYPES, SWEPT_DTYPES, by_name, context_cases, dtype_name, seeds, skip_what_cannot_run


def check(backend, shape, kernels, seed, grad_layout="contiguous", normalize=False, mean=0.0, **options):
    inputs = make_context_inputs(shape, kernels, seed=seed, mean=mean, **options) | {"normalize": normalize}
    generator = torch.Generator().manual_seed(seed + 1)
    grad_output = draw(shape, grad_layout, generator, dtype=inputs["ctx"].dtype, mean=mean)
    return assert_op_accurate(fk.focal_context, inputs, backend, grad_output)


@pytest.mark.parametrize("path", golden.FILES, ids=golden.NAMES)
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.float16, 1e-2)], ids=dtype_name
)
def test_authors_modulator(backend, path, dtype, limit):
    skip_what_cannot_run(backend, dtype)
    config, tensors = golden.load(path)
    layer = golden.layer_inputs(config, tensors)
    C, L = config["dim"], config["focal_level"]
    projected = torch.nn.functional.linear(layer["x"], layer["f_weight"], layer["f_bias"]).movedim(-1, 1)
    _, ctx, gates = projected.to(dtype).split((C, C, L + 1), 1)
    weights = [w.to(dtype) for w in layer["focal_weights"]]
    with fk.use_backend(backend):
        ctx_all = fk.focal_context(ctx, gates, weights, normalize=layer["normalize"])
    modulator = torch.nn.functional.conv2d(ctx_all.double(), layer["h_weight"], layer["h_bias"])
    assert golden.relative_error(modulator, tensors["modulator"]) <= limit


@given(case=context_cases(), seed=seeds)
def test_any_shape(backend, case, seed):
    check(backend, seed=seed, **case)


# what kernels treat in their own ways: vector tails, one channel, maps within one kernel, the models' sizes
SHAPES = {
    "sequence": ((2, 17, 19), [3, 5]),
    "tiny-model-stage": ((1, 96, 14, 14), [3, 5]),
    "last-stage": ((2, 40, 7, 7), [3, 5, 7]),
    "one-channel": ((2, 1, 9, 6), [3, 5]),
    "odd-channels": ((2, 33, 8, 11), [5, 7, 9]),
    "detection": ((1, 24, 20, 13), [9, 11, 13]),
    "four-levels": ((1, 16, 12, 12), [3, 5, 7, 9]),
    "no-level": ((2, 16, 5, 7), []),
    "pointwise-level": ((2, 16, 5, 7), [1, 3]),
    "kernel-larger-than-map": ((2, 16, 3, 2), [7, 9]),
    "one-pixel": ((3, 16, 1, 1), [3, 5]),
    "one-row": ((2, 16, 1, 23), [5]),
    "one-column": ((2, 16, 23, 1), [5]),
    "volume": ((1, 17, 4, 5, 6), [3, 5]),
    "uneven-kernel": ((1, 16, 4, 9, 8), [(1, 3, 5), (3, 1, 1)]),
    "long-map": ((1, 16, 3, 70), [3, (1, 13)]),
    "empty-batch": ((0, 16, 5, 5), [3]),
    "batch": ((9, 8, 6, 6), [3, 5]),
}


@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, kernels", by_name(SHAPES, ("tiny-model-stage", "odd-channels", "detection")))
def test_shapes(backend, shape, kernels, dtype, seed):
    check(backend, shape, kernels, seed, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
def test_layouts(backend, dtype, layout, seed):
    check(backend, (2, 18, 7, 9), [3, 5], seed, dtype=dtype, layout=layout, grad_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, seed):
    for shape, kernels in SHAPES.values():
        check("cpu", shape, kernels, seed, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("C, size, kernels", [(96, 56, [3, 5, 7]), (192, 28, [3, 5]), (768, 7, [3, 5, 7, 9])])
def test_published_stages(backend, C, size, kernels, dtype, seed):
    check(backend, (2, C, size, size), kernels, seed, dtype=dtype, layout="channels_last")
