"""`convert`: what it writes loads strictly into the classes whose names it has, and nothing is lost on the way."""

import os

import pytest
import torch
from click.testing import CliRunner
from models.foreign import SMALL, huggingface_model, logits, small_config, small_model, timm_model
from ops.golden import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from focalnet_kernels.cli import main
from focalnet_kernels.models import FocalNet, create_model
from focalnet_kernels.models.checkpoint import read_checkpoint

BUILD = {"official": lambda config: FocalNet(**config), "timm": timm_model, "hf": huggingface_model}
SUFFIXES = [".safetensors", ".pth", ".pt", ".bin"]
# from "official", each to each and to itself
ROUND_TRIP = ["official", "timm", "timm", "hf", "hf", "official", "hf", "timm", "official"]
OPTIONS = {"plain": "--no-postln", "postln_in_modulation": "--postln"}


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def convert(source, target, *arguments):
    result = run(source, target, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("layout", ["official", "timm", "hf"])
def test_another_model_with_the_same_stem_is_no_focalnet(layout, tmp_path):
    """Swin's checkpoints have the authors' stem, stages, norms and head."""
    state = {k: t for k, t in BUILD[layout](small_config()).state_dict().items() if ".modulation." not in k}
    torch.save({"model": state}, tmp_path / "swin.pth")
    for library in BUILD:
        refused(tmp_path / "swin.pth", tmp_path / "out.pth", "--to", library, words=["focal modulation", "swin.pth"])
    assert not (tmp_path / "out.pth").exists()


def refused(*arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    said = " ".join(result.output.replace("│", " ").split())
    assert all(word in said for word in words), said


@pytest.fixture
def checkpoint(tmp_path):
    """A small model of ours, and its file."""
    model = small_model()
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    return model, tmp_path / "ours.safetensors"


def load_strictly(library, config, path):
    model = BUILD[library](config).double()
    model.load_state_dict(read_checkpoint(path), strict=True)
    return model


@pytest.mark.parametrize("options", OPTIONS)
def test_through_every_library_and_back(options, tmp_path):
    config, original = small_config(**SMALL[options]), small_model(**SMALL[options])
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    path = tmp_path / "0.pth"
    torch.save({"model": original.state_dict(), "epoch": 3}, path)
    for number, library in enumerate(ROUND_TRIP, 1):
        path, before = tmp_path / f"{number}{SUFFIXES[number % 4]}", path
        convert(before, path, "--to", library, OPTIONS[options] if library == "timm" else "--partial")
        model = load_strictly(library, config, path)
        if library not in ROUND_TRIP[: number - 1]:
            assert relative_error(logits(model, x), logits(original, x)) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_a_published_variant_needs_no_more_words(tmp_path):
    model = create_model("focalnet_tiny_iso", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    output = convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "--to", "timm")
    assert "from the authors to the timm layout" in output
    assert "layers.0.blocks.0.norm1.weight" in load_file(tmp_path / "out.safetensors")


def test_transformers_opens_it(checkpoint, tmp_path):
    original, source = checkpoint
    model = huggingface_model(small_config())
    model.config.save_pretrained(tmp_path / "model")
    convert(source, tmp_path / "model" / "model.safetensors", "--to", "hf")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert relative_error(logits(loaded, x), logits(original, x)) < 1e-9


def test_official_is_what_the_authors_code_reads(checkpoint, tmp_path):
    original, source = checkpoint
    convert(source, tmp_path / "official.pth", "--to", "official")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert list(content) == ["model"] and content["model"].keys() == original.state_dict().keys()


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.0."], ids=["mmdetection", "FocalNet-DINO"])
def test_a_detector_s_backbone(prefix, checkpoint, tmp_path):
    original, _ = checkpoint
    backbone = {k: v for k, v in original.state_dict().items() if not k.startswith(("norm.", "head."))}
    detector = {f"{prefix}{key}": value for key, value in backbone.items()}
    detector |= {f"{prefix}norm0.weight": torch.ones(8), "neck.fpn.weight": torch.ones(2), "bbox_head.w": torch.ones(1)}
    torch.save({"state_dict": detector, "meta": {"epoch": 12}}, tmp_path / "detector.pth")

    arguments = (tmp_path / "detector.pth", tmp_path / "out.pth", "--to")
    words = [f"'{prefix}norm0.weight', 'neck.fpn.weight', 'bbox_head.w' (3) have no name in the hf layout", "--partial"]
    refused(*arguments, "hf", words=words)
    refused(*arguments, "official", words=["'neck.fpn.weight', 'bbox_head.w' (2) have no name"])
    refused(*arguments, "timm", "--partial", words=["no published variant", "--postln", "--no-postln"])
    assert not (tmp_path / "out.pth").exists()

    assert "left out: 'neck.fpn.weight', 'bbox_head.w' (2)" in convert(*arguments, "official", "--partial")
    assert read_checkpoint(tmp_path / "out.pth").keys() == {*backbone, "norm0.weight"}
    convert(*arguments, "timm", "--partial", "--no-postln", "--force")
    model = timm_model(small_config(num_classes=0)).double()
    missing, unexpected = model.load_state_dict(read_checkpoint(tmp_path / "out.pth"), strict=False)
    assert missing == ["norm.weight", "norm.bias"] and unexpected == []


def test_norms_that_stand_elsewhere(tmp_path):
    source = tmp_path / "timm.pth"
    torch.save(timm_model(small_config(use_postln=True)).state_dict(), source)
    words = ["--postln", "its names say use_postln=True"]
    refused(source, tmp_path / "out.pth", "--to", "timm", "--no-postln", words=words)


def test_slices_of_a_larger_storage(checkpoint, tmp_path):
    original, _ = checkpoint
    flat = torch.cat([tensor.flatten() for tensor in original.state_dict().values()])
    pieces = flat.split([tensor.numel() for tensor in original.state_dict().values()])
    state = {k: piece.view_as(v) for (k, v), piece in zip(original.state_dict().items(), pieces, strict=True)}
    torch.save(state, tmp_path / "flat.pth")
    for name in ("out.safetensors", "out.pth"):
        convert(tmp_path / "flat.pth", tmp_path / name, "--to", "official")
        assert (tmp_path / name).stat().st_size < 1.5 * flat.nbytes
        load_strictly("official", small_config(), tmp_path / name)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_overwrites_only_by_force(checkpoint, tmp_path):
    _, source = checkpoint
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    refused(source, target, "--to", "hf", words=["OUT", "out.safetensors: exists; --force overwrites it"])
    refused(source, source, "--to", "hf", words=["exists"])
    assert target.read_text() == "precious"
    convert(source, target, "--to", "hf", "--force")
    convert(source, source, "--to", "hf", "--force")
    assert source.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full"), KeyboardInterrupt()])
def test_all_or_nothing(error, checkpoint, tmp_path, monkeypatch):
    _, source = checkpoint
    target = tmp_path / "out.pth"
    target.write_text("precious")

    def interrupted(state, path):
        path.write_text("half of")
        raise error

    monkeypatch.setattr(torch, "save", interrupted)
    result = run(source, target, "--to", "hf", "--force")
    assert result.exit_code != 0 and ("disk full" in result.output or isinstance(error, KeyboardInterrupt))
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "out.pth"]


def test_what_came_in_the_meantime_is_kept(checkpoint, tmp_path, monkeypatch):
    _, source = checkpoint
    target = tmp_path / "out.pth"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), target.write_text("precious")))
    refused(source, target, "--to", "hf", words=["exists"])
    assert target.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_bad_input(tmp_path):
    out = tmp_path / "out.pth"
    refused(tmp_path / "none.pth", out, "--to", "hf", words=["IN", "none.pth: no such file"])
    (tmp_path / "text.pth").write_text("no checkpoint")
    refused(tmp_path / "text.pth", out, "--to", "hf", words=["text.pth: not a readable checkpoint"])
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    refused(tmp_path / "resnet.pth", out, "--to", "hf", words=["expected a FocalNet's keys", "'conv1.weight'"])
    both = {f"layers.0.blocks.0.{part}.bias": torch.zeros(1) for part in ("norm1", "norm1_post", "modulation.f")}
    torch.save(both | {"stem.proj.weight": torch.zeros(1)}, tmp_path / "both.pth")
    refused(tmp_path / "both.pth", out, "--to", "hf", words=["a second parameter"])
    refused(tmp_path / "both.pth", out, "--to", "keras", words=["--to", "'keras'"])
    refused(tmp_path / "both.pth", out, words=["--to"])
    assert not out.exists()


def test_bad_output(checkpoint, tmp_path):
    _, source = checkpoint
    refused(source, tmp_path / "out.onnx", "--to", "hf", words=["OUT", "out.onnx: expected a name that ends in .safe"])
    refused(source, tmp_path / "no" / "out.pth", "--to", "hf", words=["expected a file in a folder that exists"])
    (tmp_path / "folder.pth").mkdir()
    refused(source, tmp_path / "folder.pth", "--to", "hf", "--force", words=["expected a file in a folder"])
