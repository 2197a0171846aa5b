"""Key maps, both ways, against the classes whose keys they are."""

import json
from pathlib import Path

import pytest
import timm
import torch
from ops.golden import relative_error
from transformers import FocalNetModel

from focalnet_kernels.models import FocalNet, create_model
from focalnet_kernels.models.key_maps import DETECTORS, LAYOUTS, convert_state_dict, recognise_layout, rename_key
from focalnet_kernels.models.variants import VARIANTS
from models.foreign import (
    SMALL,
    huggingface_backbone,
    huggingface_config,
    huggingface_model,
    logits,
    randomized,
    small_config,
    small_model,
    timm_backbone,
    timm_model,
)

DETECTION = json.loads((Path(__file__).parents[1] / "data" / "detection_backbones.json").read_text())


def shapes(state_dict):
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def check_both_ways(ours, theirs, layout):
    """Strict loads each way, and there and back again."""
    assert recognise_layout(theirs.state_dict()) == layout
    converted = convert_state_dict(ours.state_dict(), "authors", layout)
    theirs.load_state_dict(converted, strict=True)
    back = convert_state_dict(theirs.state_dict(), layout, "authors")
    ours.load_state_dict(back, strict=True)
    assert shapes(convert_state_dict(converted, layout, "authors")) == shapes(ours.state_dict())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    config = VARIANTS[name]
    timm_layout = "timm_postln" if config.get("use_postln") else "timm"
    with torch.device("meta"):
        ours = create_model(name)
        published = not name.endswith("_iso")  # those timm does not have
        theirs = timm.create_model(name, num_classes=config["num_classes"]) if published else timm_model(config)
        check_both_ways(ours, theirs, timm_layout)
        huggingface = huggingface_model(config)
        check_both_ways(ours, huggingface, "huggingface")
        huggingface.load_state_dict(convert_state_dict(theirs.state_dict(), timm_layout, "huggingface"), strict=True)
        theirs.load_state_dict(convert_state_dict(huggingface.state_dict(), "huggingface", timm_layout), strict=True)


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("build", [timm_model, huggingface_model])
def test_same_logits(build, options):
    ours, theirs = small_model(**options), build(small_config(**options)).double()
    check_both_ways(ours, theirs, recognise_layout(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert relative_error(logits(ours, x), logits(theirs, x)) < 1e-9


def test_without_a_head():
    config = small_config(num_classes=0)
    check_both_ways(FocalNet(**config), timm_model(config), "timm")
    check_both_ways(FocalNet(**config), FocalNetModel(huggingface_config(config)), "huggingface_bare")


def of_stages(state_dict):
    """A backbone's weights without the norm of each map, which only detection has."""
    return {key: value for key, value in state_dict.items() if not key.startswith("norm")}


@pytest.mark.parametrize("name", DETECTION)
def test_detection_backbones(name):
    config = dict(DETECTION[name]["config"])
    out_indices = tuple(config.pop("out_indices"))
    detector = {
        f"backbone.{key}": torch.randn(shape, dtype=torch.float64) for key, shape in DETECTION[name]["shapes"].items()
    }
    assert recognise_layout(detector) == "detection"
    backbone = convert_state_dict(detector, "detection", "authors")
    assert {key: list(shape) for key, shape in shapes(backbone).items()} == DETECTION[name]["shapes"]
    assert convert_state_dict(backbone, "authors", "detection").keys() == detector.keys()
    joined = convert_state_dict(detector, "detection", "detr")
    assert recognise_layout(joined) == "detr" and "backbone.0.patch_embed.proj.weight" in joined
    assert convert_state_dict(joined, "detr", "authors").keys() == backbone.keys()

    ours = randomized(FocalNet(**config, num_classes=0))
    last = {f"norm.{key}": value for key, value in ours.norm.state_dict().items()}
    ours.load_state_dict(of_stages(backbone) | last, strict=True)
    config["num_classes"] = 0
    huggingface, features = huggingface_backbone(config, out_indices), timm_backbone(config, out_indices)
    huggingface.double().load_state_dict(
        convert_state_dict(of_stages(backbone) | last, "authors", "huggingface"), strict=True
    )
    layout = recognise_layout(features.state_dict())
    assert layout == ("timm_features_postln" if config.get("use_postln") else "timm_features")
    features.double().load_state_dict(convert_state_dict(of_stages(backbone), "authors", layout), strict=True)
    for model, source in ((ours, "authors"), (huggingface, "huggingface"), (features, layout)):
        back = of_stages(convert_state_dict(model.state_dict(), source, "authors"))
        assert back.keys() == of_stages(backbone).keys()
        assert all(torch.equal(back[key], backbone[key]) for key in back)

    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = ours.forward_pyramid(x, out_indices)
        for features_of_stage, exact in zip(features(x), expected, strict=True):
            assert relative_error(features_of_stage, exact) < 1e-9
        # its other maps are those after downsampling
        assert relative_error(huggingface(x).feature_maps[-1], expected[-1]) < 1e-9


BACKBONES = [layout for layout in LAYOUTS if layout in DETECTORS or layout.startswith("timm_features")]


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_to_any_other(source, target):
    with torch.device("meta"):
        authors = FocalNet(**small_config(**SMALL["postln_in_modulation"])).state_dict()
    if source in BACKBONES or target in BACKBONES:
        authors = {key: value for key, value in authors.items() if not key.startswith(("norm.", "head."))}
    there = convert_state_dict(authors, "authors", source)
    assert shapes(convert_state_dict(there, source, target)) == shapes(convert_state_dict(authors, "authors", target))


@pytest.mark.parametrize("layout", BACKBONES)
def test_backbones_have_no_head(layout):
    for key in ("norm.weight", "head.bias"):
        with pytest.raises(ValueError, match=f"'{key}': no such parameter in the {layout} layout"):
            rename_key(key, "authors", layout)


def test_names_are_those_of_the_libraries():
    key = "layers.2.blocks.11.modulation.ln.bias"
    assert rename_key(key, "authors", "timm") == "layers.2.blocks.11.modulation.norm.bias"
    assert rename_key(key, "authors", "huggingface") == "focalnet.encoder.stages.2.layers.11.modulation.layernorm.bias"
    assert rename_key("layers.1.downsample.norm.bias", "timm", "authors") == "layers.0.downsample.norm.bias"
    assert rename_key("layers.0.blocks.0.norm2.bias", "authors", "timm_postln") == ("layers.0.blocks.0.norm2_post.bias")


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'blocks.0.attn.qkv.weight': no such parameter in the timm layout"):
        rename_key("blocks.0.attn.qkv.weight", "timm", "authors")
    with pytest.raises(ValueError, match="'layers.0.downsample.norm.bias': no such parameter in the timm layout"):
        # timm's first stage has no downsampling, but its rules know no model: the name would be of stage -1
        rename_key("layers.0.downsample.norm.bias", "timm", "huggingface")
    with pytest.raises(ValueError, match="'backbone.norm0.bias': no such parameter in the timm layout"):
        rename_key("backbone.norm0.bias", "detection", "timm")  # only detection has a norm for each map
    with pytest.raises(ValueError, match="'neck.conv.bias': no such parameter in the detection layout"):
        rename_key("neck.conv.bias", "detection", "authors")
    with pytest.raises(ValueError, match="a FocalNet's keys .* got 'conv1.weight'"):
        recognise_layout(["conv1.weight", "bn1.weight"])
    with pytest.raises(ValueError, match="got none"):
        recognise_layout([])
    both = {f"layers.0.blocks.0.{norm}.bias": torch.zeros(1) for norm in ("norm1", "norm1_post")}
    with pytest.raises(ValueError, match="a second parameter"):
        convert_state_dict(both, "timm_postln", "authors")
