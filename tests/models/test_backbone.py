"""The backbone against the authors' detection code, transformers and timm; and what is frozen."""

from pathlib import Path

import pytest
import torch
from ops.golden import load, relative_error
from safetensors.torch import save_file

import focalnet_kernels as fk
from focalnet_kernels.models.key_maps import convert_state_dict, recognise_layout
from models.foreign import SMALL, huggingface_model, randomized, small_config, small_model, timm_backbone

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("detection_*.safetensors"))
assert len(GOLDEN) == 2


def small_backbone(**options):
    config = small_config(**options)
    del config["num_classes"]
    return randomized(fk.FocalNetBackbone(**config))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 5e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_authors_numbers(path, dtype, tolerance):
    """Sizes that no patch divides, stages left out, frozen ones; maps and gradients of what trains."""
    config, tensors = load(path)
    backbone = fk.FocalNetBackbone(**config, drop_path_rate=0.0).to(dtype)
    backbone.load_state_dict({k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")})
    if config.get("use_conv_embed"):
        backbone.patch_embed.proj.padding = (3, 3)
    maps = backbone(tensors["input"].to(dtype))
    torch.autograd.backward(maps, [tensors[f"grad_map.{i}"].to(dtype) for i in backbone.out_indices])
    for i, features in zip(backbone.out_indices, maps, strict=True):
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(features.detach(), tensors[f"map.{i}"]) <= tolerance, i
    gradients = {f"grad.{key}": p.grad for key, p in backbone.named_parameters() if p.grad is not None}
    assert gradients.keys() == {key for key in tensors if key.startswith("grad.")}
    for name, gradient in gradients.items():
        assert relative_error(gradient, tensors[name]) <= tolerance, name


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_padded_as_transformers(options):
    """Whole models of sizes that no patch divides; and a backbone's maps, as far as its library gives them."""
    config = small_config(**options)
    ours, theirs = randomized(fk.FocalNet(**config, pad_patches=True)), huggingface_model(config).double()
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), "authors", "huggingface"), strict=True)
    x = torch.randn(2, 3, 37, 50, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x).logits) < 1e-9
        stages = theirs.focalnet.encoder.stages
        seen = []
        hooks = [stage.layers[-1].register_forward_hook(lambda *a: seen.append(a[2])) for stage in stages]
        theirs(x)
        for hook in hooks:
            hook.remove()
        for features, tokens in zip(ours.forward_pyramid(x), seen, strict=True):
            assert relative_error(features.flatten(2).mT, tokens) < 1e-9


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_maps_are_timm_s_normalised(options):
    backbone, features = small_backbone(**options), timm_backbone(small_config(**options), (0, 1, 2)).double()
    stages = {key: tensor for key, tensor in backbone.state_dict().items() if not key.startswith("norm")}
    features.load_state_dict(
        convert_state_dict(stages, "authors", recognise_layout(features.state_dict())), strict=True
    )
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(zip(backbone(x), features(x), strict=True)):
            norm = backbone.get_submodule(f"norm{i}")
            assert relative_error(ours, norm(theirs.movedim(1, -1)).movedim(-1, 1)) < 1e-9


@pytest.mark.parametrize("frozen_stages, still", [(-1, 0), (0, 1), (1, 1), (2, 2), (4, 4)])
def test_frozen_stages(frozen_stages, still):
    """In the authors' count: the embedding first, a stage from 2 on. Nothing is kept of them for the backward."""
    config = small_config(drop_path_rate=0.5, drop_rate=0.5)
    backbone = fk.FocalNetBackbone(**config, frozen_stages=frozen_stages)
    parts = [backbone.patch_embed, *backbone.layers]
    for training in (True, False, True):
        assert backbone.train(training) is backbone
        assert [part.training for part in parts] == [False] * still + [training] * (4 - still)
    assert [all(p.requires_grad for p in part.parameters()) for part in parts] == [False] * still + [True] * (4 - still)
    backbone.pos_drop.eval()
    maps = backbone.run_stages(torch.randn(2, 3, 32, 32), range(3))
    assert [y.requires_grad for y in maps] == [stage + 1 >= still for stage in range(3)]


def test_by_a_variant_s_name():
    with torch.device("meta"):
        backbone = fk.create_model("focalnet_large_fl4", out_indices=(1, 3), frozen_stages=1)
        whole = fk.create_model("focalnet_large_fl4")
    assert type(backbone) is fk.FocalNetBackbone and type(whole) is fk.FocalNet
    classifier = {key for key in whole.state_dict() if key.startswith(("norm.", "head."))}
    norms = {f"norm{i}.{name}" for i in (1, 3) for name in ("weight", "bias")}
    assert backbone.state_dict().keys() == (whole.state_dict().keys() - classifier) | norms


DETECTOR = {"neck.lateral.weight": torch.ones(2), "bbox_head.bias": torch.ones(1)}


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.0.", "module.backbone.0."])
def test_loads_a_detector_s_file(prefix, tmp_path):
    """mmdetection's and detrex's names, and those of FocalNet-DINO."""
    source, target = small_backbone(), small_backbone()
    others = {("module." if prefix.startswith("module.") else "") + key: t for key, t in DETECTOR.items()}
    state = {f"{prefix}{key}": tensor for key, tensor in source.state_dict().items()}
    torch.save({"model": state | others, "epoch": 11}, tmp_path / "detector.pth")
    fk.load_checkpoint(target, tmp_path / "detector.pth")
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key

    with pytest.raises(ValueError, match="2 unexpected: .*norm2"):
        fk.load_checkpoint(
            randomized(fk.FocalNetBackbone(**small_config(), out_indices=(0, 1))), tmp_path / "detector.pth"
        )


@pytest.mark.parametrize("library", ["authors", "timm", "huggingface"])
def test_loads_a_classifier_s_file(library, tmp_path):
    source, target = small_model(), small_backbone()
    save_file(convert_state_dict(source.state_dict(), "authors", library), tmp_path / "classifier.safetensors")
    norms = {key: tensor.clone() for key, tensor in target.state_dict().items() if key.startswith("norm")}
    fk.load_checkpoint(target, tmp_path / "classifier.safetensors")
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, norms[key] if key in norms else source.state_dict()[key]), key

    with pytest.raises(ValueError, match="missing"):
        fk.load_checkpoint(small_backbone(focal_levels=(3, 3, 3)), tmp_path / "classifier.safetensors")


@pytest.mark.parametrize("options", [{"out_indices": (3,)}, {"out_indices": ()}, {"out_indices": (-1, 0)}], ids=str)
def test_refuses_other_stages(options):
    with pytest.raises(ValueError, match="out_indices: expected stages from 0 to 2"):
        fk.FocalNetBackbone(**small_config(), **options)


@pytest.mark.parametrize("frozen_stages", [-2, 5])
def test_refuses_to_freeze_what_is_not_there(frozen_stages):
    with pytest.raises(ValueError, match="frozen_stages: expected -1 to 4"):
        fk.FocalNetBackbone(**small_config(), frozen_stages=frozen_stages)


@pytest.mark.slow
def test_a_detection_image(cpu_kernels):
    """800 x 1333 pixels through FocalNet-T with the published detection windows, against the reference."""
    config = {"focal_levels": (3,) * 4, "focal_windows": (9,) * 4, "frozen_stages": 2}
    backbone = fk.create_model("focalnet_tiny_lrf", **config, drop_path_rate=0.0)
    x = torch.randn(1, 3, 800, 1333)
    maps = backbone(x)
    assert [tuple(y.shape) for y in maps] == [
        (1, 96, 200, 334), (1, 192, 100, 167), (1, 384, 50, 84), (1, 768, 25, 42)
    ]  # fmt: skip
    torch.autograd.backward(maps, [torch.randn_like(y) / y.numel() for y in maps])
    gradients = {key: p.grad for key, p in backbone.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert not any(key.startswith(("patch_embed.", "layers.0.")) for key in gradients)
    with fk.use_backend("reference"), torch.no_grad():
        for ours, eager in zip(maps, backbone(x), strict=True):
            torch.testing.assert_close(ours.detach(), eager, rtol=1e-3, atol=1e-3)
