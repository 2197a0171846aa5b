"""The pseudo-code's network: its dimensions, and its forward layer by layer. That it learns: test_examples.py."""

import pytest
import torch

import focalnet_kernels as fk


def make_network(depth=12, dim=8, image_size=(8, 16), **options):
    arguments = {"patch_size": 2, "num_classes": 5, "num_contexts": 2, "hidden_dim": 12} | options
    return fk.SequenceFocalNet(image_size, dim=dim, depth=depth, **arguments)


def shapes_of(network, image):
    """(tokens, width) at the input of every layer, and after the last."""
    shapes = []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[1:])))
    return shapes + [tuple(network.forward_features(image).shape[1:])], network


def test_dimensions_of_every_layer():
    shapes, network = shapes_of(make_network(), torch.randn(2, 3, 8, 16))
    # layers 1-2, 3-6 after merging, 7-8 after merging again, 9-12 after splitting, the output
    assert shapes == [(32, 8)] * 2 + [(16, 16)] * 4 + [(8, 32)] * 2 + [(32, 8)] * 5
    assert [layer.mlp.fc1.out_features for layer in network.layers] == [12] * 2 + [24] * 4 + [48] * 2 + [12] * 4


@pytest.mark.parametrize("depth, last", [(0, (32, 8)), (2, (32, 8)), (3, (16, 16)), (7, (8, 32)), (9, (32, 8))])
def test_any_depth(depth, last):
    network = make_network(depth)
    assert network.forward_features(torch.randn(2, 3, 8, 16)).shape[1:] == last
    assert network(torch.randn(2, 3, 8, 16)).shape == (2, 5)


def test_layer_by_layer(seed):
    """The whole forward in float64, with every sum and product of the plain layers written out."""
    torch.manual_seed(seed)
    network = make_network(depth=9, image_size=4, patch_size=(2, 1), in_chans=2).double()
    image = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    conv = network.patch_embed.proj
    patches = [image[:, :, 2 * i : 2 * i + 2, j : j + 1].flatten(1) for i in range(2) for j in range(4)]
    x = torch.stack([p @ conv.weight.flatten(1).mT + conv.bias for p in patches], 1) + network.positions

    def linear(layer, x):
        return x @ layer.weight.mT + layer.bias

    for number, layer in enumerate(network.layers, start=1):
        if number in (3, 7):
            x = torch.cat((x[:, 0::2], x[:, 1::2]), -1)
            x = linear(network.resizing[str(number)].reduction, x)
        if number == 9:
            x = linear(network.resizing["9"].expansion, x).reshape(3, 4 * x.shape[1], x.shape[2] // 4)
        tokens = layer.norm1(x)
        x = x + layer.modulation(tokens, tokens)
        x = x + linear(layer.mlp.fc2, torch.nn.functional.gelu(linear(layer.mlp.fc1, layer.norm2(x))))
    expected = linear(network.head, network.norm(x).mean(1))
    torch.testing.assert_close(network(image), expected, rtol=1e-12, atol=1e-12)


def test_every_parameter_takes_part(seed):
    torch.manual_seed(seed)
    network = make_network(depth=9, dropout=0.1)
    network(torch.randn(2, 3, 8, 16)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_bfloat16(seed):
    torch.manual_seed(seed)
    network, image = make_network(depth=9), torch.randn(2, 3, 8, 16)
    exact = network(image)
    found = network.bfloat16()(image.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("image_size, patch_size", [(9, 2), ((8, 9), 2), (8, (2, 3)), (2, 4)])
def test_images_that_do_not_tile_are_refused(image_size, patch_size):
    with pytest.raises(ValueError, match="^image_size: expected multiples of patch_size"):
        make_network(image_size=image_size, patch_size=patch_size)


@pytest.mark.parametrize("image_size, depth, layer, tokens", [(6, 3, 3, 9), ((4, 6), 7, 7, 3)])
def test_tokens_that_do_not_pair_are_refused(image_size, depth, layer, tokens):
    make_network(image_size=image_size, depth=layer - 1)
    with pytest.raises(ValueError, match=f"merge in pairs before layer {layer}, got {tokens} tokens there"):
        make_network(image_size=image_size, depth=depth)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, 3, 8, 16\), got \(2, 3, 16, 8\)"):
        make_network()(torch.zeros(2, 3, 16, 8))
