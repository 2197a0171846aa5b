"""patch_embed: against float64, for any kernel, stride, padding, dtype and memory layout."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import focalnet_kernels as fk
from focalnet_kernels.testing import LAYOUTS, assert_op_accurate, draw
from ops.strategies import DTYPES, dtype_name

# x, output channels, kernel, stride, padding
CASES = {
    "stem": ((2, 3, 24, 20), 10, (4, 4), 4, 0),
    "overlapping stem": ((2, 3, 23, 18), 10, (7, 7), 4, 2),
    "merge": ((2, 12, 10, 14), 24, (2, 2), 2, 0),
    "overlapping merge": ((2, 12, 9, 11), 50, (3, 3), 2, 1),
    "many": ((3, 20, 30, 34), 40, (2, 2), 2, 0),
    "many, overlapping": ((2, 5, 35, 33), 48, (3, 2), (2, 1), (1, 0)),
    "lost pixels": ((1, 4, 11, 13), 6, (4, 3), (4, 3), 0),
    "pixels left out": ((2, 4, 13, 15), 6, (2, 3), (3, 5), 0),
    "one patch": ((1, 3, 4, 4), 33, (4, 4), 4, 0),
    "pointwise": ((2, 17, 5, 6), 9, (1, 1), 1, 0),
    "sequence": ((2, 6, 41), 100, (3,), 2, 1),
    "volume": ((1, 5, 6, 7, 8), 12, (2, 3, 2), (2, 2, 2), (0, 1, 0)),
    "wide": ((1, 40, 8, 8), 300, (2, 2), 2, 0),
    "no image": ((0, 3, 8, 8), 10, (4, 4), 4, 0),
}
for_every_case = pytest.mark.parametrize("shape, N, kernel, stride, padding", CASES.values(), ids=CASES)


def make(shape, N, kernel, stride, padding, seed, dtype=torch.float32, layout="contiguous", norm=True, bias=True):
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": dtype}
    fan_in = shape[1] * torch.Size(kernel).numel()
    weight_layout = "contiguous" if layout == "expanded" else layout
    return {
        "x": draw(shape, layout, generator, mean=0.5, **options),
        "weight": draw((N, shape[1], *kernel), weight_layout, generator, scale=fan_in**-0.5, **options),
        "bias": draw((N,), "contiguous", generator, **options) if bias else None,
        "stride": stride,
        "padding": padding,
        "norm_weight": draw((N,), "contiguous", generator, **options) if norm else None,
        "norm_bias": draw((N,), "contiguous", generator, **options) if norm else None,
    }


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Those that have it."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_kernels")
    return request.param


@pytest.mark.parametrize("norm", [False, True], ids=["no-norm", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@for_every_case
def test_shapes(backend, shape, N, kernel, stride, padding, dtype, norm, seed):
    inputs = make(shape, N, kernel, stride, padding, seed, dtype, norm=norm, bias=norm)
    assert_op_accurate(fk.patch_embed, inputs, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", ["overlapping stem", "merge", "many", "overlapping merge", "wide", "volume"])
def test_layouts(backend, one_thread, case, dtype, layout, seed):
    """Of x and the weight: every order of a patch's channels and taps; with one thread some cases are of few rows."""
    assert_op_accurate(fk.patch_embed, make(*CASES[case], seed, dtype, layout), backend)


@pytest.mark.parametrize("x_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("weight_last", [False, True], ids=["weight-first", "weight-last"])
@pytest.mark.parametrize("case", ["merge", "many", "overlapping merge", "one patch", "wide"])
def test_orders(backend, case, x_last, weight_last, seed):
    inputs = make(*CASES[case], seed)
    for name, last in (("x", x_last), ("weight", weight_last)):
        if last:
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    assert_op_accurate(fk.patch_embed, inputs, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_instruction_sets(isa, dtype, seed):
    for case in CASES.values():
        assert_op_accurate(fk.patch_embed, make(*case, seed, dtype), "cpu")


def test_gradients_are_pytorch_s(backend, seed):
    inputs = make(*CASES["overlapping merge"], seed)
    y = fk.patch_embed(**inputs, backend="reference")
    assert_op_accurate(fk.patch_embed, inputs, backend, torch.ones_like(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_threads_change_no_bit(cpu_kernels, dtype, seed):
    inputs = make((2, 24, 20, 22), 100, (2, 2), 2, 0, seed, dtype)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(fk.patch_embed(**inputs, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_infinite_and_missing_numbers_stay_in_their_patch(cpu_kernels, seed):
    inputs = make(*CASES["merge"], seed, norm=False)
    inputs["x"][0, 3, 2, 4] = float("nan")
    y = fk.patch_embed(**inputs, backend="cpu")
    assert y[0, 1, 2].isnan().all()
    y[0, 1, 2] = 0
    assert y.isfinite().all()


def test_autocast_gives_the_dtype_of_eager(backend, seed):
    inputs = make(*CASES["merge"], seed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fk.patch_embed(**inputs, backend=None if backend == "cpu" else backend)
        conv = torch.nn.functional.conv2d(inputs["x"], inputs["weight"], inputs["bias"], 2).permute(0, 2, 3, 1)
        expected = torch.nn.functional.layer_norm(conv, (24,), inputs["norm_weight"], inputs["norm_bias"])
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["merge", "overlapping stem", "volume"])
def test_opcheck(cpu_kernels, case, seed):
    inputs = make(*CASES[case], seed)
    patches = inputs["x"]
    for axis, k in enumerate(inputs["weight"].shape[2:], 2):
        patches = patches.unfold(axis, k, 2)
    arguments = (patches, inputs["weight"], inputs["bias"], inputs["norm_weight"], inputs["norm_bias"], 1e-5)
    torch.library.opcheck(torch.ops.focalnet_kernels.patch_embed_fwd, arguments)


def test_flops(cpu_kernels, seed):
    inputs, counted = make(*CASES["overlapping merge"], seed), []
    for backend in ("reference", "cpu"):
        with FlopCounterMode(display=False) as counter:
            fk.patch_embed(**inputs, backend=backend)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_refuses_what_does_not_fit():
    inputs = make((2, 3, 8, 8), 10, (4, 4), 4, 0, seed=0)

    def with_(**changed):
        return fk.patch_embed(**(inputs | changed))

    with pytest.raises(
        ValueError, match=r"^weight: expected shape \(N, 3, k, k\) = \(N, C, \*k\), got \(10, 4, 4, 4\)"
    ):
        with_(weight=torch.zeros(10, 4, 4, 4))
    with pytest.raises(ValueError, match=r"^bias: expected shape \(10,\) = \(N,\), got \(3,\)"):
        with_(bias=torch.zeros(3))
    with pytest.raises(ValueError, match="^norm_weight, norm_bias: give both or neither"):
        with_(norm_bias=None)
    with pytest.raises(ValueError, match="^stride: expected a whole number from 1 on, or one per spatial axis, got 0"):
        with_(stride=0)
    with pytest.raises(ValueError, match=r"^padding: expected a whole number from 0 on, .*, got \(1, -1\)"):
        with_(padding=(1, -1))
    with pytest.raises(ValueError, match=r"^x: expected at least one patch of \(4, 4\), got a map of \(3, 9\)"):
        with_(x=torch.zeros(2, 3, 3, 9))
    with pytest.raises(TypeError, match="^weight: expected x's dtype torch.float32, got torch.float64"):
        with_(weight=inputs["weight"].double())
    with pytest.raises(fk.BackendError, match="does not implement this op"):
        with_(backend="triton")


def test_says_which_backend_runs(cpu_kernels):
    few, many = make((1, 12, 16, 16), 24, (3, 3), 2, 1, seed=0), make((4, 12, 64, 64), 24, (3, 3), 2, 1, seed=0)
    assert fk.explain(fk.patch_embed, **few).backend == "cpu"
    assert "patches overlap and are many" in fk.explain(fk.patch_embed, **many).reasons["cpu"]
    few["x"].requires_grad_()
    assert "training" in fk.explain(fk.patch_embed, **few).reasons["cpu"]
