"""The FocalNet block and its parts."""

import pytest
import torch
from torch import nn

from focalnet_kernels.models.focalnet import FocalNet
from focalnet_kernels.nn.block import FocalNetBlock
from focalnet_kernels.nn.drop_path import DropPath
from focalnet_kernels.nn.patch_embed import PatchEmbed


@pytest.mark.parametrize("use_layerscale", [False, True])
@pytest.mark.parametrize("use_postln", [False, True])
def test_block_is_the_formula(use_postln, use_layerscale):
    block = FocalNetBlock(
        12, focal_level=2, use_postln=use_postln, use_layerscale=use_layerscale, layerscale_value=0.3
    ).double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    gamma = 0.3 if use_layerscale else 1.0
    if use_postln:
        y = x + gamma * block.norm1(block.modulation(x))
        expected = y + gamma * block.norm2(block.mlp(y))
    else:
        y = x + gamma * block.modulation(block.norm1(x))
        expected = y + gamma * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), expected)
    assert ("gamma_1" in block.state_dict()) is use_layerscale


def test_block_takes_any_strides():
    block = FocalNetBlock(8, focal_level=1).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), block(x.contiguous()))


def test_mlp_takes_its_width_and_activation():
    mlp = FocalNetBlock(6, mlp_ratio=2.5, act_layer=nn.ReLU).mlp
    assert mlp.fc1.weight.shape == (15, 6)
    x = torch.randn(3, 6)
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(20_000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y, kept[:, None, None] / 0.75 * x)  # whole samples, scaled
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.015)  # five standard deviations
    assert drop.eval()(x) is x


def test_drop_path_at_its_ends():
    x = torch.randn(4, 3, requires_grad=True)
    assert DropPath(0.0)(x) is x
    y = DropPath(1.0)(x)
    assert torch.equal(y, torch.zeros_like(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"drop_prob: expected a probability .*got {wrong}"):
            DropPath(wrong)


def test_dropped_branches_leave_the_block_an_identity():
    block = FocalNetBlock(8, drop_path=1.0)
    x = torch.randn(2, 4, 4, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_hidden_values_are_kept_where_asked(cpu_kernels):
    """The MLP's, 4 times x, and nothing else; gradients are the same."""
    models = [FocalNet(embed_dim=8, depths=(1, 1), focal_levels=(1, 1), focal_windows=(3, 3), num_classes=3,
                       keep_hidden=keep) for keep in (False, True)]  # fmt: skip
    models[1].load_state_dict(models[0].state_dict())
    image, kept, gradients = torch.randn(2, 3, 24, 24), [], []
    for model in models:
        sizes: list[int] = []
        model.eval()  # no drop path
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            y = model(image)
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    assert kept[1] - kept[0] == 2 * (6 * 6 * 32 + 3 * 3 * 64)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size", [(7, 7), (8, 13), (16, 33)], ids=str)
@pytest.mark.parametrize("is_stem", [False, True])
@pytest.mark.parametrize("use_conv_embed", [False, True])
def test_patch_embed_sizes(use_conv_embed, is_stem, size):
    embed = PatchEmbed(4 if is_stem else 2, 3, 6, use_conv_embed, nn.LayerNorm, is_stem)
    kernel = {(False, False): 2, (False, True): 4, (True, False): 3, (True, True): 7}[use_conv_embed, is_stem]
    assert embed.proj.weight.shape == (6, 3, kernel, kernel)
    y = embed(torch.randn(2, 3, *size))
    assert tuple(y.shape) == (2, *embed.output_size(size), 6)
    assert y.is_contiguous()


def test_patch_embed_takes_patches_that_are_not_square():
    embed = PatchEmbed((2, 5), 3, 6)
    assert embed(torch.randn(1, 3, 9, 11)).shape == (1, 4, 2, 6)
    assert embed.output_size((1, 11)) == (0, 2)
