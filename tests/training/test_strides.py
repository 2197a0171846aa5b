"""Parameters' gradients with the parameters' strides, those of axes of one element too: DDP's buckets count on it."""

import pytest
import torch
from integrations.foreign_layers import BUILD, build, example

import focalnet_kernels as fk


def in_order(value, memory_format):
    """A 4-d tensor, or a module's 4-d parameters, in that memory format."""
    if isinstance(value, torch.Tensor) and value.ndim != 4:
        return value
    return value.to(memory_format=memory_format)


ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("form", sorted(set(BUILD) - {"volume", "video"}))
@pytest.mark.parametrize("parameters", ORDERS)
@pytest.mark.parametrize("inputs", ORDERS)
def test_accelerated_layers(form, parameters, inputs, kernels):
    layer, x = in_order(build(form), ORDERS[parameters]), in_order(example(form), ORDERS[inputs])
    if parameters == "channels_last":
        assert any(p.ndim == 4 and p.stride(-1) != 1 for p in layer.parameters())
    fk.accelerate(layer, kernels)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_of_convolutions(order, kernels, seed):
    torch.manual_seed(seed)
    q, ctx_all = torch.randn(2, 2, 6, 5, 4)
    weight = torch.randn(6, 6, 1, 1).to(memory_format=ORDERS[order]).requires_grad_()
    with fk.use_backend(kernels):
        y = fk.modulate(q, ctx_all, weight)
    torch.testing.assert_close(y, q * torch.einsum("ij,bjhw->bihw", weight[:, :, 0, 0], ctx_all))
    y.sum().backward()
    assert weight.grad.stride() == weight.stride()
