"""Sums over many pixels: how exact they are where nothing cancels, and that they depend on the shape alone."""

import threading

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import assert_op_accurate, make_layer_inputs, run
from ops.strategies import dtype_name


def one_sign(shape, seed, **options):
    """A layer's inputs and a gradient of its output, both without a negative number."""
    inputs = make_layer_inputs(shape, [3, 5], seed=seed, **options)
    inputs["x"] = inputs["x"].abs()
    return inputs, torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
@pytest.mark.parametrize("shape", [(8, 56, 56, 8), (1, 200, 334, 8), (2, 50_000, 8)], ids=["batch", "map", "sequence"])
def test_sums_of_one_sign(isa, shape, postln, seed):
    inputs, grad_output = one_sign(shape, seed, postln=postln)
    assert_op_accurate(fk.focal_modulation, inputs, "cpu", grad_output)


@pytest.mark.parametrize("shape", [(1, 8, 200, 334), (1, 8, 66_800)], ids=["map", "sequence"])
def test_mean_and_its_gradient_lose_nothing(isa, shape, seed):
    """Both go to every pixel, so that any sum behind them adds one and the same error up. No level hides it here."""
    generator = torch.Generator().manual_seed(seed)
    ctx, gates, grad_output = (0.5 + torch.rand(1, c, *shape[2:], generator=generator) for c in (8, 1, 8))

    def both(backend, dtype):
        call = {"ctx": ctx.to(dtype), "gates": gates.to(dtype), "weights": []}
        with fk.use_backend(backend):
            return run(fk.focal_context, call, grad_output.to(dtype), wanted=["ctx"])

    exact, result = both("reference", torch.float64), both("cpu", torch.float32)
    for name, value in result.items():
        error = (value.double() / exact[name] - 1).abs().max().item()
        assert error <= 4 * torch.finfo(torch.float32).eps, f"{name}: {error:.1e} of it"


def test_sums_of_one_sign_by_every_backend(kernels, seed):
    inputs, grad_output = one_sign((3, 25, 31, 8), seed)
    assert_op_accurate(fk.focal_modulation, inputs, kernels, grad_output)


# strips of one map; several images in a unit of sums, and a rest; a block per unit and several; narrow, wide
SHAPES = [(1, 90, 56, 8), (7, 7, 7, 24), (2, 14, 14, 40), (9, 3, 70, 8), (1, 3000, 8), (2, 4, 5, 6, 8)]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads(isa, shape, dtype, set_threads, seed):
    """Nor on whether a thread calls for the first time, when PyTorch has not told it yet how many there are."""
    inputs = make_layer_inputs(shape, [3, 5], dtype=dtype, postln=True, seed=seed)
    grad_output = torch.randn(shape).to(dtype)
    found = []

    def call():
        with fk.use_backend("cpu"):
            found.append(run(fk.focal_modulation, inputs, grad_output))
            with torch.no_grad():
                found[-1]["inference"] = fk.focal_modulation(**inputs)

    for threads in (1, 2, 3, 16):
        set_threads(threads)
        call()
    fresh = threading.Thread(target=lambda: (call(), call()))
    fresh.start()
    fresh.join()
    assert len(found) == 6
    for other in found[1:]:
        different = [name for name, value in found[0].items() if not torch.equal(value, other[name])]
        assert not different
