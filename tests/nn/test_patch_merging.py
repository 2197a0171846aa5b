"""Embedding, merging and splitting of patches: against loops in float64, and shapes there and back."""

import pytest
import torch
import torch.nn.functional as F
from ops.golden import relative_error
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.nn.patch_merging import depth_to_space, space_to_depth


@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
def test_merging_by_loops(norm_layer, seed):
    torch.manual_seed(seed)
    merging = fk.PatchMerging(3, norm_layer=norm_layer).double()
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    y = merging(x)
    assert y.shape == (2, 2, 3, 6)
    for i in range(2):
        for j in range(3):
            block = torch.cat([x[:, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)], -1)
            expected = merging.reduction(block if norm_layer is None else merging.norm(block))
            assert relative_error(y[:, i, j].detach(), expected.detach()) <= 1e-12


def test_merging_pairs_by_loops(seed):
    torch.manual_seed(seed)
    merging = fk.PatchMerging1d(3).double()
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    pairs = [torch.cat((x[:, 2 * n], x[:, 2 * n + 1]), -1) for n in range(4)]
    expected = torch.stack([merging.reduction(pair) for pair in pairs], 1)
    assert expected.shape == (2, 4, 6)
    assert relative_error(merging(x).detach(), expected.detach()) <= 1e-12


def test_splitting_is_a_pixel_shuffle(seed):
    """Of channels that are numbered with the offset within the block first."""
    torch.manual_seed(seed)
    splitting = fk.PatchSplitting(8).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expanded = splitting.expansion(x).permute(0, 3, 1, 2)
    reordered = expanded.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
    expected = F.pixel_shuffle(reordered, 2).permute(0, 2, 3, 1)
    assert expected.shape == (2, 6, 10, 2)
    assert torch.equal(splitting(x), expected)


def test_splitting_a_sequence_by_loops(seed):
    torch.manual_seed(seed)
    splitting = fk.PatchSplitting1d(8).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = torch.empty(2, 12, 2, dtype=torch.float64)
    for n in range(3):
        expanded = splitting.expansion(x[:, n])
        for part in range(4):
            expected[:, 4 * n + part] = expanded[:, 2 * part : 2 * part + 2]
    assert torch.equal(splitting(x), expected)


@pytest.mark.parametrize("spatial", [(12,), (6, 12), (6, 12, 18)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_depth_and_space_are_inverse(spatial, factor, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, *spatial, 5)
    deep = space_to_depth(x, factor)
    assert deep.shape == (2, *(n // factor for n in spatial), factor ** len(spatial) * 5)
    assert torch.equal(depth_to_space(deep, factor), x)


@pytest.mark.parametrize(
    "there, back",
    [
        (fk.PatchMerging(8), fk.PatchSplitting(16, out_dim=8)),
        (fk.PatchMerging1d(8), fk.PatchSplitting1d(16, factor=2)),
        (fk.PatchSplitting(8), fk.PatchMerging(2, out_dim=8)),
        (fk.PatchSplitting1d(8), nn.Sequential(fk.PatchMerging1d(2), fk.PatchMerging1d(4))),
    ],
    ids=["merging", "pairs", "splitting", "sequence-splitting"],
)
def test_shapes_there_and_back(there, back):
    sequence = isinstance(there, (fk.PatchMerging1d, fk.PatchSplitting1d))
    x = torch.randn(2, 6, 8) if sequence else torch.randn(2, 6, 4, 8)
    assert there(x).shape != x.shape
    assert back(there(x)).shape == x.shape


@pytest.mark.parametrize("overlapping", [False, True])
def test_embedding_and_back_to_pixels(overlapping, seed):
    torch.manual_seed(seed)
    embed = fk.PatchEmbed(4, 3, 16, use_conv_embed=overlapping, is_stem=True).double()
    image = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    tokens = embed(image)
    assert tokens.shape == (2, 8, 6, 16)
    assert fk.PatchSplitting(16, out_dim=3, factor=4).double()(tokens).permute(0, 3, 1, 2).shape == image.shape
    kernel, padding = (7, 2) if overlapping else (4, 0)
    padded = F.pad(image, (padding, 3) * 2)
    for i, j in ((0, 0), (3, 5), (7, 2)):
        patch = padded[:, :, 4 * i : 4 * i + kernel, 4 * j : 4 * j + kernel]
        expected = torch.einsum("bchw,ochw->bo", patch, embed.proj.weight) + embed.proj.bias
        assert relative_error(tokens[:, i, j].detach(), expected.detach()) <= 1e-12


@pytest.mark.parametrize(
    "module, x, message",
    [
        (fk.PatchMerging(4), (2, 3, 4, 4), r"x: expected shape \(B, H, W, C\) with C = 4 and only even spatial sizes"),
        (fk.PatchMerging(4), (2, 4, 4, 3), r"x: expected shape \(B, H, W, C\) with C = 4"),
        (fk.PatchMerging1d(4), (2, 5, 4), r"x: expected shape \(B, N, C\) with C = 4 and only even spatial sizes"),
        (fk.PatchSplitting(4), (2, 4, 4), r"x: expected shape \(B, H, W, C\) with C = 4, got \(2, 4, 4\)"),
        (fk.PatchSplitting1d(4), (2, 4, 8), r"x: expected shape \(B, N, C\) with C = 4, got \(2, 4, 8\)"),
    ],
)
def test_wrong_shapes_are_refused(module, x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        module(torch.zeros(x))


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="dim: expected a multiple of the 4 parts of a token, got 6"):
        fk.PatchSplitting(6)
