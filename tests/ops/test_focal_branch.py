"""focal_branch: every backend against float64, for any shape, dtype and memory layout."""

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw, make_focal_branch_inputs, named_tensors
from ops.strategies import DTYPES, SWEPT_DTYPES, by_name, dtype_name

ALL = {"norm": True, "gamma": True, "drop_path": True}


def check(backend, shape, kernels, seed, grad_layout="contiguous", mean=0.0, wanted=None, **options):
    inputs = make_focal_branch_inputs(shape, kernels, seed=seed, mean=mean, **options)
    generator = torch.Generator().manual_seed(seed + 2)
    grad_output = draw(shape, grad_layout, generator, dtype=inputs["x"].dtype, mean=mean)
    wanted = wanted or [name for name in named_tensors(inputs) if name != "drop_path"]
    return assert_op_accurate(fk.focal_branch, inputs, backend, grad_output, wanted)


SHAPES = {
    "map": ((2, 7, 9, 24), (3, 5)),
    "sequence": ((2, 17, 19), (3,)),
    "volume": ((1, 3, 4, 5, 17), (3, 3)),
    "odd": ((3, 5, 6, 33), (3, 5, 7)),
    "one-channel": ((2, 3, 5, 1), (3,)),
    "one-pixel": ((5, 1, 1, 16), (3,)),
    "no-levels": ((2, 3, 5, 8), ()),
    "empty-batch": ((0, 5, 5, 16), (3,)),
    "many": ((9, 7, 7, 16), (3,)),
    "long-sums": ((1, 3, 5, 400), (3,)),
    "more-than-few": ((3, 16, 12, 17), (3,)),
}
# in Triton's interpreter focal_modulation's own tests sweep them
OF_THE_LAYER = ("volume", "odd", "one-channel", "many", "long-sums", "more-than-few")


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, kernels_", by_name(SHAPES, OF_THE_LAYER))
def test_shapes(backend, shape, kernels_, dtype, post, seed):
    check(backend, shape, kernels_, seed, dtype=dtype, post_norm=post, postln=post, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, kernels_", by_name(SHAPES, OF_THE_LAYER))
def test_inference(backend, one_thread, shape, kernels_, dtype, post, seed):
    options = {"dtype": dtype, "post_norm": post, "postln": post, "mean": 0.5}
    assert_op_accurate(fk.focal_branch, make_focal_branch_inputs(shape, kernels_, seed=seed, **options, **ALL), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_in_any_layout(backend, layout, seed):
    inputs = make_focal_branch_inputs((2, 6, 7, 18), (3,), seed=seed, layout=layout, **ALL)
    assert_op_accurate(fk.focal_branch, inputs, backend)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, post, seed):
    for shape, kernels in SHAPES.values():
        check("cpu", shape, kernels, seed, dtype=dtype, post_norm=post, postln=post, **ALL)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("absent", [(), ("norm",), ("gamma",), ("drop_path",), tuple(ALL)], ids=str)
def test_parts(backend, bias, post, absent, seed):
    parts = {name: name not in absent for name in ALL}
    check(backend, (3, 5, 6, 16), (3,), seed, bias=bias, post_norm=post, mean=1.0, **parts)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("wanted", ["x", "norm_weight", "gamma", "f_bias", "focal_weights[0]", "proj_weight"])
def test_one_gradient_alone(backend, wanted, post, seed):
    check(backend, (3, 5, 6, 16), (3,), seed, wanted=[wanted], post_norm=post, **ALL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SWEPT_DTYPES, ids=dtype_name)
def test_layouts(backend, dtype, layout, seed):
    check(backend, (2, 6, 7, 18), (3,), seed, dtype=dtype, layout=layout, grad_layout=layout, **ALL)


MIXED = {"float32-residual": {"residual_dtype": torch.float32}, "float32-norm": {"norm_dtype": torch.float32}}


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize(
    "parts", by_name({"all": (ALL,), "none": ({"norm": False},), "norm": ({"norm": True},)}, ("norm",))
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_mixed_dtypes(backend, mixed, dtype, parts, post, seed):
    options = {"dtype": dtype, "post_norm": post, **mixed, **parts}
    check(backend, (2, 6, 7, 24), (3,), seed, **options)
    for layout in ("contiguous", "channels_last", "slice"):
        # which 16 bits would round before the norm
        mean = 100 if "residual_dtype" in mixed and parts["norm"] and not post else 0
        inputs = make_focal_branch_inputs((2, 6, 7, 24), (3,), seed=seed, layout=layout, mean=mean, **options)
        assert_op_accurate(fk.focal_branch, inputs, backend)


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_instruction_sets_of_a_float32_residual(isa, dtype, post, seed):
    for shape, kernels in SHAPES.values():
        check("cpu", shape, kernels, seed, residual_dtype=torch.float32, dtype=dtype, post_norm=post, **ALL)


def test_keeps_the_memory_order(backend, seed):
    inputs = make_focal_branch_inputs((2, 6, 7, 24), (3,), layout="channels_last", seed=seed)
    with fk.use_backend(backend):
        y = fk.focal_branch(**inputs)
    if backend != "reference":
        assert y.stride() == inputs["x"].stride()


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_threads_change_no_bit(cpu_kernels, dtype, post, seed):
    """Of few rows: with one thread products are cut by columns, with many by rows."""
    inputs = make_focal_branch_inputs((2, 5, 7, 60), (3, 5), dtype=dtype, post_norm=post, seed=seed, **ALL)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(fk.focal_branch(**inputs, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
