"""torch.func, forward mode and vmap: no kernel knows them, so "auto" takes the reference and a named one says no."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import focalnet_kernels as fk
from focalnet_kernels.testing import make_context_inputs, make_layer_inputs, make_modulate_inputs

OPS = {
    "focal_context": (fk.focal_context, lambda seed: make_context_inputs((3, 6, 5, 4), [3, 5], seed=seed)),
    "modulate": (fk.modulate, lambda seed: make_modulate_inputs((3, 6, 5, 4), seed=seed)),
    "focal_modulation": (fk.focal_modulation, lambda seed: make_layer_inputs((3, 5, 4, 6), [3, 5], seed=seed)),
}
for_every_op = pytest.mark.parametrize("op, make_inputs", OPS.values(), ids=OPS)


@pytest.fixture
def layer(seed):
    torch.manual_seed(seed)
    return fk.FocalModulation(8, 3, 2)


@pytest.fixture
def x(layer):
    return torch.randn(3, 5, 4, 8)


def loss_of(layer):
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


def detached(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


def backpropagated(layer, x):
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    return dict(zip(detached(layer), found, strict=True))


def test_grad(layer, x):
    torch.testing.assert_close(grad(loss_of(layer))(detached(layer), x), backpropagated(layer, x), rtol=1e-4, atol=1e-4)


def test_gradients_per_sample(layer, x):
    found = vmap(grad(loss_of(layer)), (None, 0))(detached(layer), x[:, None])
    for i in range(len(x)):
        expected = backpropagated(layer, x[i : i + 1])
        torch.testing.assert_close({k: v[i] for k, v in found.items()}, expected, rtol=1e-4, atol=1e-4)


def test_grad_compiles(layer, x):
    torch.compiler.reset()
    compiled = torch.compile(grad(loss_of(layer)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(detached(layer), x), backpropagated(layer, x), rtol=1e-4, atol=1e-4)


@for_every_op
def test_vmap(op, make_inputs, seed):
    inputs = make_inputs(seed)
    name, first = next(iter(inputs.items()))
    rest = {key: value for key, value in inputs.items() if key != name}
    batch = torch.stack([first, first.flip(0), first * 2])
    found = vmap(lambda t: op(**{name: t}, **rest))(batch)
    for result, t in zip(found, batch, strict=True):
        torch.testing.assert_close(result, op(**{name: t}, **rest), rtol=1e-4, atol=1e-4)


@for_every_op
def test_forward_mode(op, make_inputs, seed):
    """A raw op would drop the tangent and answer zero."""
    inputs = make_inputs(seed)
    name, first = next(iter(inputs.items()))
    rest = {key: value for key, value in inputs.items() if key != name}
    tangent = torch.randn_like(first)
    with fk.use_backend("reference"):
        _, expected = jvp(lambda t: op(**{name: t}, **rest), (first,), (tangent,))
    assert expected.abs().max() > 0
    _, found = jvp(lambda t: op(**{name: t}, **rest), (first,), (tangent,))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        y = op(**{name: forward_ad.make_dual(first, tangent)}, **rest)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


@for_every_op
def test_batched_gradients(backend, op, make_inputs, seed):
    """vmap over the backward alone: the forward has been a kernel's."""
    inputs = make_inputs(seed)
    name, first = next(iter(inputs.items()))
    leaf = first.requires_grad_()
    with fk.use_backend(backend):
        y = op(**inputs)
        directions = torch.randn(3, *y.shape)

        def pulled_back(direction, **options):
            return torch.autograd.grad(y, leaf, direction, retain_graph=True, **options)[0]

        expected = torch.stack([pulled_back(d) for d in directions])
        for found in (pulled_back(directions, is_grads_batched=True), vmap(pulled_back)(directions)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert not found.requires_grad


def test_jacobians_agree(layer, x, backend):
    def means(x):
        return layer(x).mean((1, 2, 3))

    with fk.use_backend(backend):
        row_by_row = torch.autograd.functional.jacobian(means, x)
        at_once = torch.autograd.functional.jacobian(means, x, vectorize=True)
    torch.testing.assert_close(at_once, row_by_row, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jacrev(means)(x), row_by_row, rtol=1e-4, atol=1e-6)


def test_a_named_backend_refuses(layer, x, cpu_kernels):
    with fk.use_backend("cpu"):
        for transformed, x_in in ((grad(loss_of(layer)), x), (vmap(loss_of(layer), (None, 0)), x[:, None])):
            with pytest.raises(fk.dispatch.BackendError, match="torch.func transforms .* left to 'reference'"):
                transformed(detached(layer), x_in)
        with forward_ad.dual_level():
            with pytest.raises(fk.dispatch.BackendError, match="forward-mode .* left to 'reference'"):
                layer(forward_ad.make_dual(x, x))
        layer(x)  # and only there


def test_explain_tells(layer, x, cpu_kernels):
    with forward_ad.dual_level():
        explanation = fk.explain(layer, x)
    assert explanation.backend == "reference" and "forward-mode" in explanation.reasons["cpu"]
    assert fk.explain(layer, x).backend == "cpu"
