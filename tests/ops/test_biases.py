"""Levels with biases, and with even kernels, which lie as padding="same" lays them."""

import pytest
import torch
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.functional import cross_focal_modulation
from focalnet_kernels.testing import (
    assert_op_accurate,
    draw,
    layer_tensors,
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
)
from ops.golden import relative_error
from ops.strategies import DTYPES, dtype_name

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES = {
    "speech": ((2, 40, 61), [14, 18]),
    "sequence-shorter-than-kernels": ((2, 16, 5), [14, 18]),
    "map": ((2, 33, 8, 11), [4, 5, (2, 7)]),
    "many-rows": ((1, 17, 70, 5), [3, 4]),
    "wide": ((1, 8, 3, 600), [3]),
    "one-pixel": ((3, 16, 1, 1), [2, 3]),
    "one-channel": ((2, 1, 9, 6), [2, 5]),
    "volume": ((1, 17, 4, 5, 6), [2, (3, 2, 5)]),
    "even-alone": ((2, 96, 14, 14), [4, 6]),
}


@pytest.fixture(params=["reference", "cpu"])
def takes(request):
    """The backends that take biases."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_kernels")
    return request.param


def biases(C, count, seed, dtype=torch.float32, missing=()):
    generator = torch.Generator().manual_seed(seed + 7)
    return [None if i in missing else draw((C,), "contiguous", generator, dtype=dtype) for i in range(count)]


def context_inputs(shape, sizes, seed, missing=(), **options):
    inputs = make_context_inputs(shape, sizes, seed=seed, **options)
    return inputs | {"biases": biases(shape[1], len(sizes), seed, inputs["ctx"].dtype, missing)}


def modules(inputs):
    """The same levels as PyTorch's own modules."""
    ctx = inputs["ctx"]
    levels = nn.ModuleList()
    for weight, bias in zip(inputs["weights"], inputs["biases"], strict=True):
        C, _, *k = weight.shape
        conv = CONV[ctx.ndim - 2](C, C, k, padding="same", groups=C, bias=bias is not None).to(ctx.dtype)
        conv.weight.data = weight.clone()
        if bias is not None:
            conv.bias.data = bias.clone()
        levels.append(nn.Sequential(conv, nn.GELU()))
    return levels


def by_modules(levels, ctx, gates, normalize):
    total = 0
    for i, level in enumerate(levels):
        ctx = level(ctx)
        total = total + gates[:, i : i + 1] * ctx
    mean = nn.functional.gelu(ctx.mean(tuple(range(2, ctx.ndim)), keepdim=True))
    total = total + gates[:, len(levels) :] * mean
    return total / (len(levels) + 1) if normalize else total


@pytest.mark.parametrize("missing", [(), (0,)], ids=["all", "not-the-first"])
@pytest.mark.parametrize("shape, sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_pytorch_s_own_modules(shape, sizes, missing, seed):
    """The reference in float64: output and gradients."""
    inputs = context_inputs(shape, sizes, seed, missing, dtype=torch.float64, mean=0.4)
    levels = modules(inputs)
    ctx, gates = (inputs[name].requires_grad_() for name in ("ctx", "gates"))
    expected = by_modules(levels, ctx, gates, True)
    parameters = list(levels.parameters())
    exact = torch.autograd.grad(expected.sin().sum(), [ctx, gates, *parameters])

    ours = [t for pair in zip(inputs["weights"], inputs["biases"], strict=True) for t in pair if t is not None]
    ours = [t.requires_grad_() for t in ours]
    found = fk.focal_context(**inputs, normalize=True, backend="reference")
    gradients = torch.autograd.grad(found.sin().sum(), [ctx, gates, *ours])
    assert relative_error(found, expected) < 1e-13
    for one, other in zip(gradients, exact, strict=True):
        assert one.shape == other.shape and relative_error(one, other) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, sizes", SHAPES.values(), ids=SHAPES)
def test_within_the_error_rule(takes, shape, sizes, dtype, seed):
    missing = (1,) if shape[1] % 2 else ()  # one level without a bias
    inputs = context_inputs(shape, sizes, seed, missing, dtype=dtype, mean=0.4)
    grad_output = draw(shape, "contiguous", torch.Generator().manual_seed(seed), dtype=dtype, mean=0.3)
    found = assert_op_accurate(fk.focal_context, inputs, takes, grad_output)
    biased = [i for i in range(len(sizes)) if i not in missing]
    assert [name for name in found if name.startswith("grad biases")] == [f"grad biases[{i}]" for i in biased]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape, sizes", [SHAPES["speech"], SHAPES["map"]], ids=["speech", "map"])
def test_every_instruction_set(isa, shape, sizes, dtype, seed):
    inputs = context_inputs(shape, sizes, seed, dtype=dtype, mean=0.4)
    grad_output = draw(shape, "contiguous", torch.Generator().manual_seed(seed), dtype=dtype)
    assert_op_accurate(fk.focal_context, inputs, "cpu", grad_output)


@pytest.mark.parametrize("shape", [(2, 61, 48), (1, 9, 8, 40), (3, 30, 30, 24)], ids=str)
@pytest.mark.parametrize("op", ["focal_modulation", "focal_branch"])
def test_layers_and_branches(takes, op, shape, seed):
    """Of few rows and of more, in inference and in training."""
    make = {"focal_modulation": make_layer_inputs, "focal_branch": make_focal_branch_inputs}[op]
    options = {} if op == "focal_modulation" else {"norm": True, "gamma": True}
    inputs = make(shape, (4, 7), seed=seed, mean=0.3, **options)
    inputs |= {"focal_biases": biases(shape[-1], 2, seed)}
    grad_output = draw(shape, "contiguous", torch.Generator().manual_seed(seed), dtype=torch.float32)
    assert_op_accurate(getattr(fk, op), inputs, takes, grad_output)
    assert_op_accurate(getattr(fk, op), inputs, takes)


def test_a_layer_part_by_part_and_of_another_map(takes, seed):
    x = make_layer_inputs((2, 6, 7, 16), (3, 4), seed=seed)
    x |= {"focal_biases": biases(16, 2, seed)}
    y, gates, modulator = fk.focal_modulation(**x, return_gates=True, backend=takes)
    torch.testing.assert_close(y, fk.focal_modulation(**x, backend=takes), rtol=1e-4, atol=1e-5)
    crossed = cross_focal_modulation(x.pop("x"), x["x"] if "x" in x else y, **x, backend=takes)
    assert crossed.shape == y.shape and gates.shape == (2, 3, 6, 7) and modulator.shape == (2, 16, 6, 7)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_autocast_casts_the_biases_too(takes, seed):
    inputs = context_inputs((2, 24, 31), [4, 5], seed)
    levels = modules(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager = by_modules(levels, inputs["ctx"], inputs["gates"].bfloat16(), False)
        found = fk.focal_context(**inputs, backend=takes)
        mixed = fk.focal_context(
            **inputs | {"weights": [w.bfloat16() for w in inputs["weights"]]}, backend=takes
        )  # which autocast makes one of
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), eager.double()) < 0.02
    assert torch.equal(mixed, found)


def test_second_derivatives(takes, seed):
    """By the reference, through the bias, for every backend."""
    inputs = context_inputs((1, 3, 6), [2, 3], seed)
    tensors = [inputs["ctx"], inputs["gates"], *inputs["weights"], *inputs["biases"]]
    tensors = [t.requires_grad_() for t in tensors]

    def gradient_norm(backend):
        ctx, gates, w1, w2, b1, b2 = tensors
        y = fk.focal_context(ctx, gates, [w1, w2], biases=[b1, b2], backend=backend)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for one, other in zip(gradient_norm(takes), gradient_norm("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_compiles_without_a_break(takes, seed):
    inputs = context_inputs((2, 8, 17), [4, 3], seed)
    tensors = inputs["ctx"].requires_grad_(), inputs["biases"][0].requires_grad_()

    def call(ctx, bias):
        return fk.focal_context(
            ctx, inputs["gates"], inputs["weights"], biases=[bias, inputs["biases"][1]], backend=takes
        )

    expected = call(*tensors)
    # not Inductor, which in torch 2.10 cannot give the reference's convolution a part of joined tensors for its weight
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_raw_ops(cpu_kernels, seed):
    """The weight that has the bias: its gradient has it at the centre, and zeros around."""
    ctx, gates, weights, of_levels = context_inputs((2, 10, 5, 6), [3, 5], seed).values()
    weights = [
        torch.cat((w, nn.functional.pad(b[:, None, None, None], [n // 2 for n in (w.shape[-1],) * 4])), 1)
        for w, b in zip(weights, of_levels, strict=True)
    ]
    ops = torch.ops.focalnet_kernels
    torch.library.opcheck(ops.focal_context_fwd.default, (ctx, gates, weights, False))
    out, mean = ops.focal_context_fwd(ctx, gates, weights, False)
    arguments = (torch.randn_like(out), ctx, gates, weights, mean, False, 0b1111)
    torch.library.opcheck(ops.focal_context_bwd.default, arguments)
    *_, first, second = ops.focal_context_bwd(*arguments)
    for gradient, centre in ((first, 1), (second, 2)):
        bias = gradient[:, 1].clone()
        assert bias[:, centre, centre].abs().min() > 0
        bias[:, centre, centre] = 0
        assert not bias.any()
    channels_last = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    again = ops.focal_context_bwd(*arguments[:3], channels_last, *arguments[4:])[2:]
    for one, other in zip(again, (first, second), strict=True):
        torch.testing.assert_close(one, other)


def test_cuda_leaves_biases_to_the_reference(cuda_on_cpu, seed):
    inputs = context_inputs((2, 8, 6, 6), [3], seed)
    reason = fk.explain("focal_context", **inputs).reasons["cuda"]
    assert reason == "levels with biases are left to the reference on a GPU"
    with pytest.raises(fk.BackendError, match="levels with biases are left to the reference on a GPU"):
        fk.focal_context(**inputs, backend="cuda")
    even = {name: value for name, value in context_inputs((2, 8, 6, 6), [4], seed).items() if name != "biases"}
    expected = fk.focal_context(**even, backend="reference")
    torch.testing.assert_close(fk.focal_context(**even, backend="cuda"), expected, rtol=1e-4, atol=1e-5)


def test_errors(seed):
    x, parameters = layer_tensors(make_layer_inputs((1, 5, 8), (3, 4), seed=seed))
    named = make_layer_inputs((1, 5, 8), (3, 4), seed=seed)
    right = biases(8, 2, seed)
    for wrong, error, message in [
        (right[:1], ValueError, r"focal_biases: expected one per level, 2, got 1"),
        ([right[0], torch.zeros(7)], ValueError, r"focal_biases\[1\]: expected shape \(8,\) = \(C,\), got \(7,\)"),
        ([right[0].double(), None], TypeError, r"focal_biases\[0\]: expected its weight's torch.float32 on cpu"),
        ([1.0, None], TypeError, r"focal_biases\[0\]: expected a tensor, got float"),
        (3, TypeError, "focal_biases: expected a sequence with one tensor per level, got int"),
    ]:
        with pytest.raises(error, match=message):
            fk.focal_modulation(**named, focal_biases=wrong)
    for shape in ((8, 2, 3), (8, 3, 4), (8, 1, 0)):
        got = str(shape).replace("(", "\\(").replace(")", "\\)")
        for bias in (None, [torch.zeros(8)]):
            with pytest.raises(ValueError, match=rf"^weights\[0\]: expected shape \((8|C), 1, k\).*got {got}"):
                fk.focal_context(torch.randn(1, 8, 5), torch.randn(1, 2, 5), [torch.randn(shape)], biases=bias)
