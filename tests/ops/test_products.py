"""The CPU kernels' matrix products: sums in runs, and weights in panels."""

import pytest
import torch
from torch.nn.functional import one_hot

import focalnet_kernels as fk
from focalnet_kernels.testing import assert_op_accurate, draw, make_layer_inputs, make_modulate_inputs, run
from ops.strategies import DTYPES, dtype_name

# -------------------------------------------------------------------- sums of more than 384 terms are made of runs


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("C", [385, 800], ids=["two-runs", "three-runs"])
def test_runs(isa, C, dtype, seed):
    shape = (2, C, 3, 5)
    inputs = make_modulate_inputs(shape, dtype=dtype, mean=1, seed=seed)
    grad_output = draw(shape, "contiguous", torch.Generator().manual_seed(seed + 1), dtype=dtype, mean=1)
    assert_op_accurate(fk.modulate, inputs, "cpu", grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("postln", [False, True], ids=["plain", "postln"])
def test_runs_of_the_layer(isa, postln, dtype, seed):
    """Forward: 400 terms. Backward: 400, and 802 for the gradient of x."""
    shape = (2, 3, 5, 400)
    inputs = make_layer_inputs(shape, [3], postln=postln, dtype=dtype, mean=1, seed=seed)
    grad_output = draw(shape, "contiguous", torch.Generator().manual_seed(seed + 1), dtype=dtype, mean=1)
    assert_op_accurate(fk.focal_modulation, inputs, "cpu", grad_output)


# ------------------------------------ packing: weights with a single 1 in every row give back the values they choose

STRIDES = {  # an (N, K) matrix within new memory
    "contiguous": lambda new, N, K: new(N, K),
    "transposed": lambda new, N, K: new(K, N).t(),
    "rows-apart": lambda new, N, K: new(N, K + 3)[:, 1 : K + 1],
    "columns-apart": lambda new, N, K: new(K, N + 3)[:, 1 : N + 1].t(),
    "every-other-row": lambda new, N, K: new(2 * N, K)[::2],
    "every-other-column": lambda new, N, K: new(N, 2 * K)[:, ::2],
    "sliced": lambda new, N, K: new(2 * K, 3 * N)[::2, ::3].t(),
}
SIZES = [1, 5, 16, 31, 48, 50, 97, 389]  # of vectors and panels: whole ones and parts; two runs


def choosing(columns, K, strides, dtype):
    """Row n is 1 at columns[n] and 0 elsewhere; NaN around it."""
    weight = STRIDES[strides](lambda *shape: torch.full(shape, float("nan"), dtype=dtype), len(columns), K)
    return weight.copy_(one_hot(columns, K))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("strides", STRIDES)
def test_packing(isa, strides, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    for C in SIZES:
        order = torch.randperm(C, generator=generator)
        weight = choosing(order, C, strides, dtype)
        for layout in ("contiguous", "channels_last", "slice"):
            ctx_all = draw((2, C, 3, 5), layout, generator, dtype=dtype)
            with fk.use_backend("cpu"):
                found = fk.modulate(torch.ones_like(ctx_all), ctx_all, weight, None)
            assert torch.equal(found, ctx_all[:, order]), (C, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("strides", STRIDES)
def test_packing_of_the_layer(isa, strides, dtype, seed):
    """More rows than columns (f), and transposed (backward): with a modulator of 1, the layer is proj(f(x)'s q)."""
    generator = torch.Generator().manual_seed(seed)
    for C in SIZES:
        inputs = make_layer_inputs((2, 3, 5, C), [3], bias=False, dtype=dtype, seed=seed)
        x = inputs["x"]
        q, y = torch.randperm(C, generator=generator), torch.randperm(C, generator=generator)
        others = torch.randint(C, (C + 2,), generator=generator)
        inputs["f_weight"] = choosing(torch.cat([q, others]), C, strides, dtype)
        inputs["proj_weight"] = choosing(y, C, strides, dtype)
        inputs["h_weight"], inputs["h_bias"] = torch.zeros(C, C, dtype=dtype), torch.ones(C, dtype=dtype)
        grad_output = draw(x.shape, "contiguous", generator, dtype=dtype)
        with fk.use_backend("cpu"):
            with torch.no_grad():
                inference = fk.focal_modulation(**inputs)
            training = run(fk.focal_modulation, inputs, grad_output)
        assert torch.equal(inference, x[..., q[y]]), C
        assert torch.equal(training["output"], x[..., q[y]]), C
        assert torch.equal(training["grad x"], grad_output[..., q[y].argsort()]), C
