"""The published variants: their table, their sizes, and the way to build them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from focalnet_kernels.models import create_model, list_models
from focalnet_kernels.models.variants import VARIANTS, recognise_variant

ZOO = json.loads((Path(__file__).parents[1] / "data" / "zoo.json").read_text())


def test_the_table_lists_what_was_published():
    assert list_models() == list(ZOO)
    assert len(ZOO) == 15


@pytest.mark.parametrize("name", ZOO)
def test_published_configuration_and_size(name):
    entry = ZOO[name]
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["config"].items()}
    assert VARIANTS[name] == config | {k: entry[k] for k in ("img_size", "num_classes")}
    with torch.device("meta"):
        model = create_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameters"]
    assert len(model.state_dict()) == entry["state_dict_keys"]


@pytest.mark.parametrize("name", ZOO)
def test_variants_are_known_by_their_weights(name):
    with torch.device("meta"):
        state = create_model(name, num_classes=7).state_dict()
    assert recognise_variant(state) == name
    del state["norm.bias"]
    assert recognise_variant(state) is None
    assert recognise_variant({"head.bias": torch.zeros(7)}) is None


def test_list_models_takes_a_pattern():
    assert list_models("*_iso") == ["focalnet_tiny_iso", "focalnet_small_iso", "focalnet_base_iso"]
    assert list_models("swin*") == []


def test_overrides():
    model = create_model("focalnet_tiny_iso", num_classes=3, embed_dim=16, depths=[2])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert len(model.layers[0].blocks) == 2
    with pytest.raises(TypeError, match="num_clases"):
        create_model("focalnet_tiny_iso", num_clases=3)


def test_pretrained(tmp_path):
    options = {"embed_dim": 16, "num_classes": 3}
    saved = create_model("focalnet_tiny_iso", **options)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.safetensors", str(tmp_path / "weights.safetensors")):
        loaded = create_model("focalnet_tiny_iso", path, **options)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    with pytest.raises(TypeError, match="pretrained: expected a path or None"):
        create_model("focalnet_tiny_iso", pretrained=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("focalnet_tiny_slf", "unknown model 'focalnet_tiny_slf'; did you mean focalnet_tiny_srf"),
        ("resnet50", "unknown model 'resnet50'; expected one of focalnet_tiny_srf, "),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)
