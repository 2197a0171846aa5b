"""torch.func, forward mode and vmap: no kernel knows them, so "auto" takes the reference and a named one says no."""

import copy

import pytest
import torch
from integrations import foreign_layers
from models.foreign import small_config, timm_model
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["timm", "yolo"])
def test_vmap_over_accelerated_layers(form, channels_last):
    """vmap cannot ask for the order of a map's memory."""
    torch.manual_seed(0)
    layer, x = foreign_layers.build(form).double(), torch.randn(3, 2, 12, 5, 4, dtype=torch.float64)
    layer = layer.to(memory_format=torch.channels_last) if channels_last else layer
    expected = torch.stack([layer(image) for image in x])
    assert fk.accelerate(layer).replaced
    torch.testing.assert_close(vmap(layer)(x), expected)
    torch.testing.assert_close(vmap(layer, 3)(x.movedim(0, 3)), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_an_accelerated_model(seed):
    torch.manual_seed(seed)
    model, x = timm_model(small_config()).double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    parameters = detached(model)
    gradients = vmap(grad(loss_of(model)), (None, 0))
    expected, per_sample = model(x), gradients(parameters, x[:, None])
    assert fk.accelerate(model).replaced
    torch.testing.assert_close(vmap(lambda image: model(image[None])[0])(x), expected)
    torch.testing.assert_close(gradients(parameters, x[:, None]), per_sample)


@pytest.mark.filterwarnings("ignore:a timm layer changed after accelerate:RuntimeWarning")
def test_pytorch_s_own_gradients_per_sample(seed):
    """Its weights are of a kind of their own: the layer's class computes with them."""
    torch.manual_seed(seed)
    x, found = torch.randn(3, 12, 5, 4), []
    layer = foreign_layers.build("timm")
    for accelerated in (False, True):
        twin = copy.deepcopy(layer)
        assert not accelerated or fk.accelerate(twin).replaced
        call_for_per_sample_grads(twin, loss_reduction="sum")(x).square().sum().backward()
        found.append({name: p.grad_sample for name, p in twin.named_parameters()})
    torch.testing.assert_close(*found)
