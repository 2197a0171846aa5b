"""The sequence form: against loops over tokens in float64, and its fused form against the literal one."""

import math

import pytest
import torch
from ops.golden import relative_error

import focalnet_kernels as fk
from focalnet_kernels.forms.reference import similarity_focal_modulation_reference
from focalnet_kernels.testing import BACKWARD_FACTOR, FORWARD_FACTOR, assert_accurate, draw, map_tensors

# N, M, C, L: M smaller than a kernel, no multiple of a stride, one token
SIZES = {
    "plain": (5, 8, 4, 3),
    "odd-target": (4, 7, 3, 3),
    "short-target": (3, 3, 4, 4),
    "one-token": (1, 1, 5, 2),
    "one-level": (6, 5, 4, 1),
    "long-target": (3, 21, 6, 3),
}
for_every_size = pytest.mark.parametrize("N, M, C, L", SIZES.values(), ids=SIZES)


def make_inputs(N, M, C, L, seed, B=2, dtype=torch.float64, layout="contiguous"):
    """Tensor arguments of `similarity_focal_modulation`."""
    generator = torch.Generator().manual_seed(seed)

    def layer(*shape):
        scale = math.prod(shape[1:]) ** -0.5
        return (
            draw(shape, "contiguous", generator, dtype=dtype, scale=scale),
            draw(shape[:1], "contiguous", generator, dtype=dtype),
        )

    return {
        "query": draw((B, N, C), layout, generator, dtype=dtype),
        "target": draw((B, M, C), layout, generator, dtype=dtype),
        "contexts": [layer(C, 1, 2 ** (i + 1)) for i in range(L)],
        "scales": [layer(C, C) for _ in range(L)],
        "biases": [layer(C, C) for _ in range(L)],
    }


def by_loops(query, target, contexts, scales, biases, scale_factor):
    """Every context window, similarity and token one by one."""
    (_, N, C), M, y = query.shape, target.shape[1], torch.empty_like(query)
    for b in range(len(query)):
        context = []
        for i, (weight, bias) in enumerate(contexts):
            stride = 2**i
            for start in range(0, M, stride):
                window = bias.clone()
                for tap in range(2 * stride):
                    token = start - stride // 2 + tap
                    if 0 <= token < M:
                        window += weight[:, 0, tap] * target[b, token]
                context.append(window)
        for n in range(N):
            similar = [math.exp(scale_factor * float(query[b, n] @ c)) for c in context]
            modulator = sum(s / sum(similar) * c for s, c in zip(similar, context, strict=True))
            scale, shift = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
            for scale_layer, bias_layer in zip(scales, biases, strict=True):
                scale = scale + scale_layer[0] @ modulator + scale_layer[1]
                shift = shift + bias_layer[0] @ modulator + bias_layer[1]
            y[b, n] = scale * query[b, n] + shift
    return y


def leaves_of(inputs):
    return [inputs["query"], inputs["target"]] + [
        tensor for role in ("contexts", "scales", "biases") for layer in inputs[role] for tensor in layer
    ]


@for_every_size
@pytest.mark.parametrize("scale_factor", [1.0, 0.3])
def test_loops(N, M, C, L, scale_factor, seed):
    inputs = make_inputs(N, M, C, L, seed) | {"scale_factor": scale_factor}
    expected = by_loops(**inputs)
    assert relative_error(fk.similarity_focal_modulation(**inputs), expected) <= 1e-12
    assert relative_error(similarity_focal_modulation_reference(**inputs), expected) <= 1e-12


@pytest.mark.parametrize("N, M, C, L", [SIZES[name] for name in ("plain", "short-target", "one-token")])
def test_gradcheck(N, M, C, L, seed):
    inputs = make_inputs(N, M, C, L, seed)
    leaves = leaves_of(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: fk.similarity_focal_modulation(**inputs), leaves)


def results_of(function, inputs, grad_output):
    """The output, and the gradient of every tensor."""
    inputs = map_tensors(lambda t: t.detach().clone().requires_grad_(), inputs)
    y = function(**inputs)
    return [y.detach(), *torch.autograd.grad(y, leaves_of(inputs), grad_output)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "permuted"])
def test_as_accurate_as_the_literal_form(dtype, layout, seed):
    inputs = make_inputs(33, 50, 24, 3, seed, dtype=dtype, layout=layout)
    grad_output = torch.randn(2, 33, 24, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    fused = results_of(fk.similarity_focal_modulation, inputs, grad_output)
    nearby = [inputs, *(map_tensors(lambda t: t * (1 + torch.rand_like(t) / 64), inputs) for _ in range(3))]
    literal = [results_of(similarity_focal_modulation_reference, i, grad_output) for i in nearby]
    exact = [
        results_of(similarity_focal_modulation_reference, map_tensors(torch.Tensor.double, i), grad_output.double())
        for i in nearby
    ]
    for i, result in enumerate(fused):
        neighbours = [(e[i], x[i]) for e, x in zip(literal[1:], exact[1:], strict=True)]
        factor = BACKWARD_FACTOR if i else FORWARD_FACTOR
        assert_accurate(f"result {i}", result, literal[0][i], exact[0][i], factor, neighbours)


def test_module_keeps_each_level_apart(seed):
    torch.manual_seed(seed)
    module = fk.SimilarityFocalModulation(4, 3, scale_factor=0.5).double()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        f"{role}.{i}.{name}": shape
        for i in range(3)
        for role, weight in (("contexts", (4, 1, 2 ** (i + 1))), ("scales", (4, 4)), ("biases", (4, 4)))
        for name, shape in (("weight", weight), ("bias", (4,)))
    }
    query, target = torch.randn(2, 5, 4).double(), torch.randn(2, 6, 4).double()
    layers = {
        role: [(m.weight.detach(), m.bias.detach()) for m in getattr(module, role)]
        for role in ("contexts", "scales", "biases")
    }
    expected = by_loops(query, target, **layers, scale_factor=0.5)
    assert relative_error(module(query, target).detach(), expected) <= 1e-12


def test_compiles_without_a_break(seed):
    torch.manual_seed(seed)
    module, query, target = fk.SimilarityFocalModulation(8, 2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, target), module(query, target))


def test_autocast_and_empty_batch(seed):
    torch.manual_seed(seed)
    module, query, target = fk.SimilarityFocalModulation(8, 2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(query, target)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(query, target), rtol=0.1, atol=0.1)
    assert module(query[:0], target[:0]).shape == (0, 5, 8)
    assert module(query[:, :0], target).shape == (2, 0, 8)


BAD = {
    "query-map": ({"query": torch.zeros(2, 4)}, ValueError, r"query: expected \(B, N, C\), got shape \(2, 4\)"),
    "query-integers": ({"query": torch.zeros(2, 5, 4, dtype=torch.int64)}, TypeError, "query: expected a floating"),
    "target-batch": ({"target": torch.zeros(3, 8, 4)}, ValueError, r"target: expected shape \(2, M, 4\)"),
    "target-empty": ({"target": torch.zeros(2, 0, 4)}, ValueError, r"target: expected shape \(2, M, 4\)"),
    "target-dtype": ({"target": torch.zeros(2, 8, 4)}, TypeError, "target: expected query's dtype torch.float64"),
    "no-level": ({"contexts": []}, ValueError, "contexts: expected at least one level, got none"),
    "levels": ({"biases": []}, ValueError, "biases: expected one layer for each of the 2 contexts, got 0"),
    "kernel": (
        {"contexts": [(torch.zeros(4, 1, 3).double(), torch.zeros(4).double())] * 2},
        ValueError,
        r"contexts\[0\] weight: expected shape \(4, 1, 2\)",
    ),
    "matrix": (
        {"scales": [(torch.zeros(4, 3).double(), torch.zeros(4).double())] * 2},
        ValueError,
        r"scales\[0\] weight: expected shape \(4, 4\)",
    ),
    "no-bias": (
        {"biases": [(torch.zeros(4, 4).double(), None)] * 2},
        TypeError,
        r"biases\[0\] bias: expected a tensor",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(change, error, message, seed):
    with pytest.raises(error, match=f"^{message}"):
        fk.similarity_focal_modulation(**make_inputs(5, 8, 4, 2, seed) | change)


def test_no_context_is_refused():
    with pytest.raises(ValueError, match="num_contexts: expected at least 1, got 0"):
        fk.SimilarityFocalModulation(8, 0)


CHANGES = {
    "hook": lambda layer: layer.scales[1].register_forward_hook(lambda module, args, y: 2 * y),
    "hook on a context": lambda layer: layer.contexts[1].register_forward_hook(lambda module, args, y: 2 * y),
    "wrapped": lambda layer: layer.biases.__setitem__(0, torch.nn.Sequential(layer.biases[0], torch.nn.Tanh())),
    "forward": lambda layer: setattr(layer.scales[0], "forward", lambda x: 3 * x),
    "without bias": lambda layer: layer.scales.__setitem__(0, torch.nn.Linear(6, 6, bias=False).double()),
    "circular": lambda layer: setattr(layer.contexts[0], "padding_mode", "circular"),
    "parametrised": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.contexts[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_parts_act(change, seed):
    """Called one after the other, as the pseudo-code has it."""
    torch.manual_seed(seed)
    layer = fk.SimilarityFocalModulation(6, 2).double()
    query, target = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    change(layer)
    channels_first = target.mT
    contexts = [layer.contexts[0](torch.nn.functional.pad(channels_first, (0, 1)))]
    contexts.append(layer.contexts[1](torch.nn.functional.pad(channels_first, (1, 2))))
    context = torch.cat(contexts, 2).mT
    modulator = (query @ context.mT).softmax(-1) @ context
    expected = (1 + sum(f(modulator) for f in layer.scales)) * query + sum(f(modulator) for f in layer.biases)
    assert relative_error(layer(query, target), expected) <= 1e-12
    for _ in range(2):  # a parametrised weight has a graph of its own for each step
        layer(query, target).sum().backward()
    with pytest.raises(ValueError, match="^target: expected shape"):
        layer(query, target[..., :5])
