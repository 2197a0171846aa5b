"""The visualize command: its maps against what timm's layers compute, and what it says to bad input."""

import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models.foreign import SMALL, small_config, small_model, timm_model
from ops.golden import relative_error
from PIL import Image

from focalnet_kernels.cli import main
from focalnet_kernels.cli.visualize import stage_maps
from focalnet_kernels.models import create_model
from focalnet_kernels.models.key_maps import convert_state_dict, recognise_layout


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["visualize", *map(str, arguments)])


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_maps(options):
    """timm's f answers with the gates among its channels, its h with the modulator."""
    ours, theirs = small_model(**options), timm_model(small_config(**options)).double()
    layout = recognise_layout(theirs.state_dict())
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), "authors", layout), strict=True)
    seen = []
    for stage in theirs.layers:
        for part in (stage.blocks[-1].modulation.f, stage.blocks[-1].modulation.h):
            part.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    x = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        theirs(x)
    found = stage_maps(ours, x)
    assert len(found) == 3 and not any(module._forward_pre_hooks for module in ours.modules())
    for stage, (f, modulator) in zip(found, zip(seen[::2], seen[1::2], strict=True), strict=True):
        assert len(stage.gates) == len(stage.kernels) + 1
        assert relative_error(stage.gates, f[-len(stage.gates) :]) < 1e-9
        assert relative_error(stage.modulator, modulator.square().sum(0).sqrt()) < 1e-9


@pytest.fixture
def small_variant(monkeypatch):
    """A published name for a model that takes no time."""
    from focalnet_kernels.models import variants

    config = small_config(img_size=32, focal_levels=(1, 2, 3))
    monkeypatch.setitem(variants.VARIANTS, "focalnet_tiny_lrf", config)
    return config


def test_picture(small_variant, photograph, tmp_path):
    """Of the weights that are given, in a detector's file too; the image keeps its shape."""
    weights, output = tmp_path / "weights.pth", tmp_path / "picture.png"
    pictures = []
    for checkpoint in ((), (), ("--checkpoint", weights)):
        backbone = {
            f"backbone.{k}": v for k, v in create_model("focalnet_tiny_lrf", out_indices=None).state_dict().items()
        }
        torch.save(backbone | {"neck.weight": torch.ones(1)}, weights)
        result = run(photograph, *checkpoint, "--output", output)
        assert result.exit_code == 0 and result.output == f"wrote {output}\n", result.output
        with Image.open(output) as picture:
            assert picture.format == "PNG"
            pictures.append(np.asarray(picture.convert("RGB"), dtype=int))
    height, width, _ = pictures[0].shape
    assert width > 1.5 * height  # 3 stages below each other; side by side the image, up to 4 gates, the modulator
    assert np.array_equal(pictures[0], pictures[1])  # random weights have one seed
    assert (abs(pictures[2] - pictures[0]).max(-1) > 30).mean() > 0.05


def test_a_published_variant(photograph, tmp_path):
    result = run(photograph, "--variant", "focalnet_tiny_iso", "--size", 64, "--output", tmp_path / "picture.pdf")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")


def refused(result, *words):
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    said = " ".join(result.output.replace("│", " ").split())
    assert all(word in said for word in words), said


def test_bad_arguments(small_variant, photograph, tmp_path):
    refused(run(tmp_path / "none.png"), "IMAGE", "none.png", "does not exist")
    (tmp_path / "text.png").write_text("no image")
    refused(run(tmp_path / "text.png"), "IMAGE", "text.png", "expected an image")
    refused(run(photograph, "--size", 8), "--size", "8")
    torch.save(small_model(embed_dim=4).state_dict(), tmp_path / "other.pth")
    refused(run(photograph, "--checkpoint", tmp_path / "other.pth"), "--checkpoint", "expected weights of", "other.pth")
    refused(run(photograph, "--output", tmp_path / "picture.docx"), "--output", "cannot be written")
    refused(run(photograph, "--output", tmp_path / "none" / "picture.png"), "--output", "cannot be written")


@pytest.mark.parametrize("package", ["matplotlib.figure", "PIL.Image"])
def test_missing_package(package, photograph, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = run(photograph)
    assert result.exit_code == 1 and 'pip install "focalnet_kernels[demo]"' in result.output
