"""Cross modulation: against loops over pixels in float64, and against plain focal modulation."""

import itertools
import math

import pytest
import torch
from ops.golden import relative_error
from ops.strategies import DTYPES, dtype_name

import focalnet_kernels as fk
from focalnet_kernels.testing import assert_op_accurate, draw, make_layer_inputs

MODULES = {1: fk.CrossFocalModulation1d, 2: fk.CrossFocalModulation, 3: fk.CrossFocalModulation3d}
SELF = {1: fk.FocalModulation1d, 2: fk.FocalModulation, 3: fk.FocalModulation3d}
SIZES = {
    "sequence": ((7,), (5,)),
    "same-size": ((4, 5), (4, 5)),
    "enlarged": ((6, 5), (3, 4)),
    "reduced": ((2, 3), (5, 4)),
    "mixed": ((6, 2), (3, 4)),
    "one-pixel-target": ((3, 4), (1, 1)),
    "one-pixel-query": ((1, 1), (4, 3)),
    "volume": ((2, 3, 4), (3, 2, 2)),
}
for_every_size = pytest.mark.parametrize("spatial, target_spatial", SIZES.values(), ids=SIZES)


def make_inputs(spatial, target_spatial, seed, C=6, kernels=(3, 5), **options):
    """Arguments of `cross_focal_modulation`."""
    inputs = make_layer_inputs((2, *spatial, C), kernels, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    layout, dtype = options.get("layout", "contiguous"), options.get("dtype", torch.float32)
    return inputs | {"target": draw((2, *target_spatial, C), layout, generator, dtype=dtype, channel_axis=-1)}


def gelu(value):
    return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))


def pixels(spatial):
    return itertools.product(*map(range, spatial))


def context_by_loops(ctx, gates, weights):
    """ctx {pixel: C numbers}, gates {pixel: L+1 numbers} of one image: ctx_all, likewise."""
    C = len(next(iter(ctx.values())))
    ctx_all = {p: [0.0] * C for p in ctx}
    for level, weight in enumerate(weights):
        half = [k // 2 for k in weight.shape[2:]]
        taps = [(t, weight[(slice(None), 0, *t)].tolist()) for t in pixels(weight.shape[2:])]
        following = {}
        for p in ctx:
            sums = [0.0] * C
            for t, w in taps:
                neighbour = ctx.get(tuple(a + b - h for a, b, h in zip(p, t, half, strict=True)))
                if neighbour is not None:
                    sums = [s + n * v for s, n, v in zip(sums, neighbour, w, strict=True)]
            following[p] = [gelu(s) for s in sums]
            ctx_all[p] = [a + gates[p][level] * c for a, c in zip(ctx_all[p], following[p], strict=True)]
        ctx = following
    everywhere = [gelu(sum(c) / len(ctx)) for c in zip(*ctx.values(), strict=True)]
    return {p: [a + gates[p][-1] * c for a, c in zip(ctx_all[p], everywhere, strict=True)] for p in ctx_all}


def resample_by_loops(values, old, new):
    """Linear interpolation with pixel centres at half-integers, the border pixels continued outwards."""
    sampled = {}
    for p in pixels(new):
        corners = []
        for i, n_old, n_new in zip(p, old, new, strict=True):
            at = max((i + 0.5) * n_old / n_new - 0.5, 0.0)
            low = math.floor(at)
            corners.append([(low, 1 - at + low), (min(low + 1, n_old - 1), at - low)])
        sampled[p] = sum(
            math.prod(w for _, w in corner) * torch.tensor(values[tuple(i for i, _ in corner)], dtype=torch.float64)
            for corner in itertools.product(*corners)
        )
    return sampled


def cross_by_loops(x, target, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, **_):
    C, y = x.shape[-1], torch.empty_like(x)
    for b in range(len(x)):
        projected = {p: f_weight[C:] @ target[(b, *p)] + f_bias[C:] for p in pixels(target.shape[1:-1])}
        ctx = {p: v[:C].tolist() for p, v in projected.items()}
        gates = {p: v[C:].tolist() for p, v in projected.items()}
        ctx_all = context_by_loops(ctx, gates, focal_weights)
        ctx_all = resample_by_loops(ctx_all, target.shape[1:-1], x.shape[1:-1])
        for p, context in ctx_all.items():
            q = f_weight[:C] @ x[(b, *p)] + f_bias[:C]
            y[(b, *p)] = proj_weight @ (q * (h_weight @ context + h_bias)) + proj_bias
    return y


@for_every_size
def test_loops(spatial, target_spatial, seed):
    inputs = make_inputs(spatial, target_spatial, seed, C=3, dtype=torch.float64)
    assert relative_error(fk.cross_focal_modulation(**inputs), cross_by_loops(**inputs)) <= 1e-12


@for_every_size
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_backend(backend, spatial, target_spatial, dtype, seed):
    inputs = make_inputs(spatial, target_spatial, seed, dtype=dtype, postln=True) | {"normalize": True}
    generator = torch.Generator().manual_seed(seed + 2)
    grad_output = draw(inputs["x"].shape, "contiguous", generator, dtype=dtype)
    assert_op_accurate(fk.cross_focal_modulation, inputs, backend, grad_output)


@pytest.mark.parametrize("layout", ["channels_last", "slice", "permuted"])
def test_layouts(backend, layout, seed):
    inputs = make_inputs((5, 4), (3, 6), seed, layout=layout)
    assert_op_accurate(fk.cross_focal_modulation, inputs, backend, torch.randn(inputs["x"].shape))


@pytest.mark.parametrize("spatial, target_spatial", [((3, 2), (2, 3)), ((3,), (3,))], ids=["resampled", "same-size"])
def test_gradcheck(spatial, target_spatial, seed):
    inputs = make_inputs(spatial, target_spatial, seed, C=3, kernels=[3], dtype=torch.float64)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    leaves = [inputs[name].requires_grad_() for name in names] + [inputs["focal_weights"][0].requires_grad_()]

    def call(*leaves):
        return fk.cross_focal_modulation(
            **inputs | dict(zip(names, leaves, strict=False)) | {"focal_weights": leaves[-1:]}
        )

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("flags", [{}, {"bias": False, "use_postln_in_modulation": True, "normalize_modulator": True}])
def test_of_itself_it_is_focal_modulation(backend, ndim, flags, seed):
    torch.manual_seed(seed)
    layer, cross = SELF[ndim](12, 3, 2, **flags), MODULES[ndim](12, 3, 2, **flags)
    cross.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, *(5, 4, 3)[:ndim], 12)
    results = []
    for module, inputs in ((layer, (x,)), (cross, (x, x))):
        module.zero_grad()
        with fk.use_backend(backend):
            y = module(*inputs)
            y.square().mean().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_context_depends_on_the_target(seed):
    torch.manual_seed(seed)
    layer = fk.CrossFocalModulation(8, 3, 2)
    x, target = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 3, 8)
    assert not torch.equal(layer(x, target), layer(x, target + 1))
    changed = x.clone()
    changed[:, 0, 0] += 1
    difference = (layer(changed, target) - layer(x, target)).abs().amax((0, 3))
    assert difference[0, 0] > 0 and (difference.flatten()[1:] == 0).all()


def test_compiles_without_a_break(seed):
    torch.manual_seed(seed)
    layer = fk.CrossFocalModulation(8, 3, 2)
    x, target = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), layer(x, target))


def test_autocast_and_empty_batch(seed):
    torch.manual_seed(seed)
    layer = fk.CrossFocalModulation(8, 3, 2, use_postln_in_modulation=True)
    x, target = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, target)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, target), rtol=0.1, atol=0.1)
    assert layer(x[:0], target[:0]).shape == (0, 4, 4, 8)


def test_explain_tells_the_backend_of_the_core(backend):
    layer = fk.CrossFocalModulation(8, 3, 2)
    with fk.use_backend(backend):
        explanation = fk.explain(layer, torch.randn(2, 4, 4, 8), torch.randn(2, 2, 3, 8))
    assert (explanation.op, explanation.backend) == ("focal_context", backend)


@pytest.mark.parametrize(
    "target, error, message",
    [
        (torch.zeros(3, 4, 4, 8), ValueError, "target: expected x's batch 2, channels 8 and 2 spatial axes"),
        (torch.zeros(2, 4, 8), ValueError, "target: expected x's batch 2, channels 8 and 2 spatial axes"),
        (torch.zeros(2, 4, 4, 9), ValueError, "target: expected x's batch 2, channels 8 and 2 spatial axes"),
        (torch.zeros(2, 0, 4, 8), ValueError, "target: expected at least one channel and one pixel"),
        (torch.zeros(2, 4, 4, 8).double(), TypeError, "target: expected x's dtype torch.float32, got torch.float64"),
        (None, TypeError, "target: expected a tensor, got NoneType"),
    ],
)
def test_wrong_targets_are_refused(target, error, message, seed):
    inputs = make_inputs((3, 3), (3, 3), seed, C=8) | {"target": target}
    with pytest.raises(error, match=message):
        fk.cross_focal_modulation(**inputs)


def test_the_module_names_the_wrong_argument():
    layer = fk.CrossFocalModulation1d(8, 3, 2)
    with pytest.raises(ValueError, match=r"^target: expected shape \(B, N, C=8\), got \(2, 4, 9\)"):
        layer(torch.zeros(2, 4, 8), torch.zeros(2, 4, 9))
