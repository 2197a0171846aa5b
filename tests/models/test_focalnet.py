"""FocalNet against the authors' numbers, timm, and itself under every way to run it."""

import copy
from pathlib import Path

import pytest
import timm.layers
import torch
from ops.golden import load, relative_error
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.models import FocalNet
from focalnet_kernels.models.key_maps import convert_state_dict, recognise_layout
from models.foreign import SMALL, logits, small_config, small_model, timm_model

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("model_*.safetensors"))
assert len(GOLDEN) == 5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 5e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_authors_numbers(path, dtype, tolerance):
    config, tensors = load(path)
    model = FocalNet(**config, drop_path_rate=0.0).to(dtype)
    state = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(FocalNet(**config).state_dict())

    x = tensors["input"].to(dtype).requires_grad_()
    output = model(x)
    output.backward(tensors["grad_output"].to(dtype))
    results = {"output": output, "features": model.forward_features(x), "grad_input": x.grad}
    results |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
    checked = [name for name in results if name in tensors]
    assert len(checked) >= 3 + 12
    for name in checked:
        assert relative_error(results[name].detach(), tensors[name]) <= tolerance, name


def test_a_seed_gives_the_authors_weights():
    """Parameters are drawn in the authors' order: as modules are built, then again for linear layers."""

    def block(name, dim, levels):
        return {
            f"{name}.modulation.f": nn.Linear(dim, 2 * dim + levels + 1),
            f"{name}.modulation.h": nn.Conv2d(dim, dim, 1),
            f"{name}.modulation.proj": nn.Linear(dim, dim),
            **{
                f"{name}.modulation.focal_layers.{i}.0": nn.Conv2d(dim, dim, 3 + 2 * i, groups=dim, bias=False)
                for i in range(levels)
            },
            f"{name}.mlp.fc1": nn.Linear(dim, 4 * dim),
            f"{name}.mlp.fc2": nn.Linear(4 * dim, dim),
        }

    torch.manual_seed(7)
    drawn = {
        "patch_embed.proj": nn.Conv2d(3, 8, 4),
        **block("layers.0.blocks.0", 8, 1),
        **block("layers.0.blocks.1", 8, 1),
        "layers.0.downsample.proj": nn.Conv2d(8, 16, 2),
        **block("layers.1.blocks.0", 16, 2),
        "head": nn.Linear(16, 5),
    }
    for module in drawn.values():
        if isinstance(module, nn.Linear):
            timm.layers.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    torch.manual_seed(7)
    model = FocalNet(
        embed_dim=8,
        depths=(2, 1),
        focal_levels=(1, 2),
        focal_windows=(3, 3),
        num_classes=5,
        use_layerscale=True,
        layerscale_value=0.25,
    )
    state = model.state_dict()
    for name, module in drawn.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(state.pop(f"{name}.{key}"), tensor), f"{name}.{key}"
    for key, tensor in state.items():
        initial = 0.25 if "gamma" in key else float("norm" in key and key.endswith("weight"))
        assert torch.equal(tensor, torch.full_like(tensor, initial)), key


@pytest.mark.parametrize("size", [(64, 64), (65, 101), (71, 37), (16, 48)], ids=str)
@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_any_size_as_timm(options, size):
    model, theirs = small_model(**options), timm_model(small_config(**options)).double()
    layout = recognise_layout(theirs.state_dict())
    theirs.load_state_dict(convert_state_dict(model.state_dict(), "authors", layout), strict=True)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert relative_error(logits(model, x), logits(theirs, x)) < 1e-9
    with torch.no_grad():
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for ours, expected in zip(model.forward_pyramid(x), maps, strict=True):
            assert relative_error(ours, expected) < 1e-9


def test_isotropic():
    model = small_model(depths=(3,), patch_size=16, focal_levels=(3,), focal_windows=(3,))
    x = torch.randn(2, 3, 50, 33, dtype=torch.float64)
    (features,) = model.forward_pyramid(x)
    assert features.shape == (2, 8, 3, 2)
    assert torch.equal(model(x), model(x[:, :, :48, :32]))  # the rest fills no patch


def test_features_and_pyramid_agree():
    model = small_model()
    x = torch.randn(2, 3, 52, 70, dtype=torch.float64)
    pyramid = model.forward_pyramid(x)
    assert [tuple(m.shape) for m in pyramid] == [(2, 8, 13, 17), (2, 16, 6, 8), (2, 32, 3, 4)]
    tokens = model.norm(pyramid[-1].permute(0, 2, 3, 1)).flatten(1, 2)
    assert torch.equal(model.forward_featuremaps(x), tokens)
    torch.testing.assert_close(model.forward_features(x), tokens.mean(1))
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    for ours, expected in zip(model.forward_pyramid(x, out_indices=(0, 2)), pyramid[::2], strict=True):
        assert torch.equal(ours, expected)
    small = x[:, :, :4, :4]  # enough for the first stage alone
    assert model.forward_pyramid(small, (0,))[0].shape == (2, 8, 1, 1)


@pytest.mark.parametrize("out_indices", [(3,), (-1, 0), ()], ids=str)
def test_pyramid_refuses_unknown_stages(out_indices):
    with pytest.raises(ValueError, match="out_indices: expected stages from 0 to 2"):
        small_model().forward_pyramid(torch.zeros(1, 3, 32, 32, dtype=torch.float64), out_indices)


def test_no_head():
    model = small_model(num_classes=0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(model(x), model.forward_features(x))
    assert not any(key.startswith("head") for key in model.state_dict())


def test_options_change_the_modules():
    model = small_model(patch_norm=False, in_chans=1, norm_layer=nn.Identity, drop_rate=0.5)
    assert model.patch_embed.norm is None
    assert not any("norm" in key for key in model.state_dict())
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_drop_path_grows_with_depth():
    model = FocalNet(**small_config(drop_path_rate=0.3))
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_keeps_nothing_of_an_image():
    model = small_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    first = model(x)
    model(torch.randn(2, 3, 32, 40, dtype=torch.float64))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(copy.deepcopy(model)(x), first)


def test_memory_format_and_empty_batch():
    model = small_model()
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
    assert model(x[:0]).shape == (0, 5)


def test_checkpointing_gives_the_same_gradients():
    """Also while dropout and drop path are random: the recomputation draws the same numbers."""
    options = small_config(drop_path_rate=0.5, drop_rate=0.1, use_layerscale=True, layerscale_value=1.0)
    x = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(5)
        model = FocalNet(**options, use_checkpoint=use_checkpoint).double()
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_compiles_in_one_graph():
    model = small_model()
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_autocast():
    model = small_model().float()
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)], ids=str)
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(B, in_chans=3, H, W\), got .*32"):
        FocalNet(**small_config())(torch.zeros(shape))


@pytest.mark.parametrize("conv, size, stage", [(False, (3, 32), 0), (False, (32, 12), 2), (True, (2, 9), 0)])
def test_refuses_too_small_images(conv, size, stage):
    model = FocalNet(**small_config(use_conv_embed=conv))
    with pytest.raises(ValueError, match=rf"image of {size[0]}x{size[1]} is too small: it gives stage {stage} "):
        model(torch.zeros(1, 3, *size))


def test_overlapping_patches_take_tiny_images():
    assert FocalNet(**small_config(use_conv_embed=True))(torch.zeros(1, 3, 3, 3)).shape == (1, 5)


def test_refuses_unknown_arguments_and_unequal_lists():
    with pytest.raises(TypeError, match="use_post_ln"):
        FocalNet(use_post_ln=True)
    with pytest.raises(ValueError, match="depths, focal_levels, focal_windows: .* got 1, 4 and 4"):
        FocalNet(depths=(12,))
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        FocalNet(depths=(), focal_levels=(), focal_windows=())


def test_uses_the_package_layer():
    layers = [m for m in FocalNet(**small_config()).modules() if isinstance(m, fk.FocalModulation)]
    assert len(layers) == 4


class Pooled(nn.AvgPool2d):
    """No convolution: its stride is one number."""

    def forward(self, x):
        return super().forward(x).repeat(1, 2, 1, 1)


STEMS = {
    "four channels": lambda: nn.Conv2d(4, 8, 4, 4),
    "other patches": lambda: nn.Conv2d(4, 8, 3, 2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 8, 4, 4, dilation=2),
    "wrapped": lambda: nn.Sequential(nn.Conv2d(4, 8, 4, 4)),
    "pooled": lambda: Pooled(4),
}


@pytest.mark.parametrize("pad", [False, True], ids=["cropped", "padded"])
@pytest.mark.parametrize("build", STEMS.values(), ids=STEMS)
def test_replaced_stem(build, pad):
    """Sizes are those of the module that is there."""
    model = fk.FocalNet(embed_dim=8, depths=(1, 1), focal_levels=(1, 1), focal_windows=(3, 3), pad_patches=pad).eval()
    stem = model.patch_embed.proj = build()
    x = torch.randn(1, 4, 32, 36)
    (first, _), expected = model.forward_pyramid(x), stem(x)
    assert first.shape == expected.shape
    assert model(x).shape == (1, 1000)
    if isinstance(stem, nn.Conv2d):  # others do not say
        assert model.patch_embed.output_size((32, 36)) == expected.shape[2:]
        with pytest.raises(ValueError, match=r"^x: expected shape \(B, in_chans=4, H, W\), got \(1, 3, 32, 36\)"):
            model(x[:, :3])


def test_replaced_embedding():
    """A module of one's own, which says nothing about sizes."""
    model = fk.FocalNet(embed_dim=8, depths=(1,), focal_levels=(1,), focal_windows=(3,), num_classes=0)
    model.patch_embed = nn.Sequential(nn.Conv2d(5, 8, 2, 2), nn.Flatten(2), nn.Unflatten(2, (4, 3)), Permuted())
    assert model(torch.randn(2, 5, 8, 6)).shape == (2, 8)


class Permuted(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)
