"""The demo command: a small run of it, and what it says to bad input."""

import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from focalnet_kernels.bench.records import read
from focalnet_kernels.cli import main
from focalnet_kernels.models import create_model

SMALL = ["--size", "32", "--batch", "1"]


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def test_bundled_photographs(tmp_path):
    output = tmp_path / "new" / "folder"
    result = run("--size", 32, "--batch", 2, "--output", output)
    assert result.exit_code == 0, result.output
    assert "12 layers accelerated, 0 kept" in result.output
    assert "bit for bit" in result.output
    assert "%" not in result.output  # random weights have no top 5
    with Image.open(output / "demo.png") as image:
        assert image.format == "PNG"
    rows = read(output / "demo.csv")
    things = {row["what"] for row in rows}
    assert things == {*(f"stage {i} layer" for i in (1, 2, 3, 4)), "whole model"}
    assert {row["provider"] for row in rows} == {"timm", "timm accelerated", "focalnet_kernels"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["cpu"] and row["torch"] == torch.__version__ and row["backend"] in ("cpu", "reference")


def test_own_photograph_and_weights(tmp_path, photograph):
    weights = tmp_path / "weights.pth"
    torch.save(create_model("focalnet_tiny_lrf").state_dict(), weights)
    result = run(*SMALL, "--image", photograph, "--weights", weights, "--dtype", "bfloat16", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "photograph.png" in result.output and result.output.count("%") == 5


def check_refusal(result, *words):
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert all(word in " ".join(result.output.split()) for word in words), result.output


def test_missing_image(tmp_path):
    check_refusal(run("--image", tmp_path / "none.png"), "--image", "none.png", "does not exist")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_no_image(tmp_path, content):
    path = tmp_path / "corrupt.png"
    path.write_bytes(content)
    check_refusal(run(*SMALL, "--image", path), "--image", "corrupt.png", "expected an image")


def test_cut_off_image(tmp_path, photograph):
    photograph.write_bytes(photograph.read_bytes()[:1500])
    check_refusal(run(*SMALL, "--image", photograph), "--image", "photograph.png", "expected an image")


def test_weights_of_another_variant(tmp_path, photograph):
    weights = tmp_path / "weights.pth"
    torch.save(create_model("focalnet_tiny_srf", embed_dim=8).state_dict(), weights)
    result = run(*SMALL, "--image", photograph, "--weights", weights)
    check_refusal(result, "--weights", "expected weights of focalnet_tiny_lrf", "weights.pth")


@pytest.mark.parametrize("arguments", [("--batch", 0), ("--size", 8), ("--dtype", "int8")])
def test_bad_numbers(arguments):
    check_refusal(run(*arguments), arguments[0], str(arguments[1]))


def test_output_that_is_a_file(tmp_path, photograph):
    check_refusal(run(*SMALL, "--output", photograph), "--output", "photograph.png")


def test_missing_dependency(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run()
    assert result.exit_code == 1
    assert 'pip install "focalnet_kernels[demo]"' in result.output and "timm" in result.output
    assert len(result.output.splitlines()) == 1
