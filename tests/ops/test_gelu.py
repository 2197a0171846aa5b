"""GELU and its slope of every 16-bit number, on every instruction set: the worst errors stand in docs/accuracy.md."""

import math

import pytest
import torch

import focalnet_kernels as fk
from ops.strategies import dtype_name

# in units in the last place (ULP), as docs/accuracy.md has them; of results below LEAST, in its ULP
WORST = {torch.bfloat16: {"value": 0.57, "slope": 0.91}, torch.float16: {"value": 0.51, "slope": 0.51}}
LEAST = {"value": 2.0**-14, "slope": 2.0**-6}


def every_number(dtype):
    """All finite ones of 16 bits, one channel each: (1, N, 1, 1)."""
    found = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    return found[found.isfinite()].reshape(1, -1, 1, 1)


def gelu(x):
    x = x.double()
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def slope(x):
    x = x.double()
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * density


def units(name, result, exact):
    """The largest error in ULP."""
    info = torch.finfo(result.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(LEAST[name])))
    error = (result.double() - exact).abs() / (torch.exp2(exponent) * info.eps)
    return error[exact.abs() <= info.max].max().item()


def value_and_slope(x, backend):
    """By a level whose one tap and gate are 1, and no global context."""
    x = x.clone().requires_grad_()
    gates = torch.tensor([1.0, 0.0]).to(x.dtype).reshape(1, 2, 1, 1)
    y = fk.focal_context(x, gates, [torch.ones(x.shape[1], 1, 1, 1, dtype=x.dtype)], backend=backend)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return {"value": y.detach(), "slope": gradient}


@pytest.mark.parametrize("dtype", WORST, ids=dtype_name)
def test_of_every_number(isa, dtype):
    x = every_number(dtype)
    assert x.numel() > 63000
    exact = {"value": gelu(x), "slope": slope(x)}
    worst = {name: units(name, result, exact[name]) for name, result in value_and_slope(x, "cpu").items()}
    print(isa, worst)
    assert all(worst[name] <= most for name, most in WORST[dtype].items()), worst
