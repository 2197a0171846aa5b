"""Key maps, both ways, against the classes whose keys they are."""

import pytest
import timm
import torch
from ops.golden import relative_error
from transformers import FocalNetModel

from focalnet_kernels.models import FocalNet, create_model
from focalnet_kernels.models.key_maps import LAYOUTS, convert_state_dict, recognise_layout, rename_key
from focalnet_kernels.models.variants import VARIANTS
from models.foreign import (
    SMALL,
    huggingface_config,
    huggingface_model,
    logits,
    small_config,
    small_model,
    timm_model,
)


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
        check_both_ways(ours, huggingface_model(config), "huggingface")


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


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_to_any_other(source, target):
    with torch.device("meta"):
        authors = FocalNet(**small_config(**SMALL["postln_in_modulation"])).state_dict()
    there = convert_state_dict(authors, "authors", source)
    assert shapes(convert_state_dict(there, source, target)) == shapes(convert_state_dict(authors, "authors", target))


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
    with pytest.raises(ValueError, match="a FocalNet's keys .* got 'conv1.weight'"):
        recognise_layout(["conv1.weight", "bn1.weight"])
    with pytest.raises(ValueError, match="got none"):
        recognise_layout([])
    both = {f"layers.0.blocks.0.{norm}.bias": torch.zeros(1) for norm in ("norm1", "norm1_post")}
    with pytest.raises(ValueError, match="a second parameter"):
        convert_state_dict(both, "timm_postln", "authors")
