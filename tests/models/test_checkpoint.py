"""load_checkpoint: any layout and wrapping into any model, and nothing loaded where it does not fit."""

import argparse
import pathlib
import pickle
import sys
import types

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from focalnet_kernels.models import FocalNet, load_checkpoint
from focalnet_kernels.models.checkpoint import read_checkpoint
from models.foreign import SMALL, huggingface_model, small_config, small_model, timm_backbone, timm_model

OPTIONS = SMALL["postln_in_modulation"]
BUILD = {"ours": lambda config: FocalNet(**config), "timm": timm_model, "huggingface": huggingface_model}


def save(state_dict, path):
    save_file(state_dict, path) if path.suffix == ".safetensors" else torch.save(state_dict, path)
    return path


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("target", BUILD)
@pytest.mark.parametrize("source", BUILD)
@pytest.mark.parametrize("options", [SMALL["plain"], OPTIONS], ids=["plain", "postln"])
def test_from_any_to_any(options, source, target, suffix, tmp_path):
    original, config = small_model(**options), small_config(**options)
    # through `source`, whose own names are saved, to `target`, and back to the authors' names
    saved = BUILD[source](config).double()
    load_checkpoint(saved, save(original.state_dict(), tmp_path / "authors.pth"))
    path = save(saved.state_dict(), tmp_path / f"saved{suffix}")
    loaded = BUILD[target](config).double()
    assert load_checkpoint(loaded, path) is loaded
    last = load_checkpoint(FocalNet(**config).double(), save(loaded.state_dict(), tmp_path / "loaded.pth"))
    assert states_equal(last, original)


@pytest.mark.parametrize(
    "wrap",
    {
        "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
        "state_dict": lambda state: {"state_dict": state},
        "both": lambda state: {"model": {"state_dict": state}},
        "parallel": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        "compiled": lambda state: {"model": {f"module._orig_mod.{key}": t for key, t in state.items()}},
    }.values(),
)
def test_unwraps(wrap, tmp_path):
    original = small_model()
    torch.save(wrap(original.state_dict()), tmp_path / "wrapped.pth")
    loaded = load_checkpoint(FocalNet(**small_config()).double(), tmp_path / "wrapped.pth")
    assert states_equal(loaded, original)


def test_reads_what_the_authors_training_script_saves(tmp_path, monkeypatch):
    """It stores its configuration, an object of a package that need not be installed here."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="focalnet"))
    config.__dict__["__immutable__"] = True
    original = small_model()
    torch.save({"model": original.state_dict(), "epoch": 1, "config": config}, tmp_path / "ckpt_epoch_1.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    loaded = load_checkpoint(FocalNet(**small_config()).double(), tmp_path / "ckpt_epoch_1.pth")
    assert states_equal(loaded, original)


BESIDE = {
    "Namespace": argparse.Namespace(lr=1e-3, data=pathlib.Path("/data"), nested=argparse.Namespace(seed=1)),
    "paths": [pathlib.Path("a/b"), pathlib.PureWindowsPath("c:/a")],
    "NumPy scalars": {name: numpy.ones((), name)[()] for name in ("f8", "f4", "i8", "u1", "?", "c16", "U3", "M8[s]")},
    "NumPy dtypes": [numpy.dtype("float32"), numpy.dtype("int64"), numpy.dtype("U5")],
    "NumPy arrays": {"rng": numpy.random.get_state(), "losses": numpy.ones((2, 3))},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_training_scripts_store_beside_the_weights(beside, zipped, tmp_path):
    original, path = small_model(), tmp_path / "last.pth"
    content, allowed = {"args": beside, "model": original.state_dict()}, set(torch.serialization.get_safe_globals())
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert states_equal(load_checkpoint(FocalNet(**small_config()).double(), path), original)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_what_numpy_1_and_python_3_13_wrote(tmp_path):
    """They have other names for the same things."""
    original, path = small_model(), tmp_path / "last.pth"
    content = {"args": [numpy.float64(1), pathlib.Path("a")], "model": original.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    for theirs, other in ((b"numpy._core", b"numpy.core"), (b"cpathlib\n", b"cpathlib._local\n")):
        assert theirs in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(theirs, other))
    assert states_equal(load_checkpoint(FocalNet(**small_config()).double(), path), original)


class Mine:
    """Somebody's own class: not even a harmless one is known to be that."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_another_class_is_named_with_what_to_do(zipped, tmp_path):
    original, path = small_model(), tmp_path / "last.pth"
    torch.save({"model": original.state_dict(), "x": Mine()}, path, _use_new_zipfile_serialization=zipped)
    model = FocalNet(**small_config()).double()
    name = f"{Mine.__module__}.Mine"
    check_refused(model, path, f"it holds {name}, which torch.load(weights_only=True) refuses")
    check_refused(model, path, "torch.serialization.add_safe_globals")
    with torch.serialization.safe_globals([Mine]):
        assert states_equal(load_checkpoint(model, path), original)


def test_keeps_the_dtype_and_the_layout_of_the_model(tmp_path):
    original = small_model().half()
    model = FocalNet(**small_config()).to(memory_format=torch.channels_last)
    weight = model.patch_embed.proj.weight
    load_checkpoint(model, save(original.state_dict(), tmp_path / "half.safetensors"))
    assert model.patch_embed.proj.weight is weight and weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, original.patch_embed.proj.weight.float())


def check_refused(model, path, *messages):
    """A ValueError that names the path and says all of `messages`; the model stays as it is."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_another_variant(tmp_path):
    wider = save(small_model(embed_dim=16).state_dict(), tmp_path / "wider.safetensors")
    check_refused(
        FocalNet(**small_config()),
        wider,
        "of another shape: 'patch_embed.proj.weight' (expected shape (8, 3, 4, 4), got (16, 3, 4, 4))",
        "...",
    )
    deeper = save(small_model(depths=(1, 3, 1)).state_dict(), tmp_path / "deeper.pth")
    check_refused(FocalNet(**small_config()), deeper, "unexpected: 'layers.1.blocks.2.norm1.weight'")
    srf = save(small_model().state_dict(), tmp_path / "srf.pth")
    model = FocalNet(**small_config(focal_levels=(3, 3, 3)))
    check_refused(model, srf, "4 missing: 'layers.0.blocks.0.modulation.focal_layers.2.0.weight'")


def test_another_variant_under_foreign_names(tmp_path):
    """Compared under the names of the checkpoint: only there it shows where the norms stand."""
    prenorm = save(timm_model(small_config()).state_dict(), tmp_path / "timm.safetensors")
    model = FocalNet(**small_config(use_postln=True))
    check_refused(model, prenorm, "16 missing: 'layers.0.blocks.0.norm1_post.weight'", "16 unexpected")
    theirs = save(huggingface_model(small_config(use_layerscale=True)).state_dict(), tmp_path / "hf.pth")
    check_refused(timm_model(small_config()), theirs, "8 unexpected: 'focalnet.encoder.stages.0.layers.0.gamma_1'")


@pytest.mark.parametrize("options", [SMALL["plain"], OPTIONS], ids=["plain", "postln"])
def test_of_a_feature_extractor(options, tmp_path):
    source, target = (timm_backbone(small_config(**options), (0, 1, 2)) for _ in range(2))
    path = save(source.state_dict(), tmp_path / "features.pth")
    assert states_equal(load_checkpoint(target, path), source)
    check_refused(FocalNet(**small_config(**options)), path, "of a backbone", "'norm.weight': no such parameter")


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_only_the_head_differs(build, tmp_path):
    path = save(build(small_config(num_classes=4)).state_dict(), tmp_path / "head.pth")
    check_refused(FocalNet(**small_config()), path, "(5, 32), got (4, 32)", "only the head differs")


def test_other_files(tmp_path):
    model = FocalNet(**small_config())
    whole = save(small_model().state_dict(), tmp_path / "whole.pth").read_bytes()
    safe = save(small_model().state_dict(), tmp_path / "whole.safetensors").read_bytes()
    contents = {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "noise.pth": bytes(range(256)) * 8,
        "noise.safetensors": bytes(range(256)) * 8,
        "text.pth": b"not a checkpoint",
        "cut.pth": whole[: len(whole) // 2],
        "cut.safetensors": safe[: len(safe) // 2],
        "page.safetensors": b"<html>404</html>",
        "renamed.pth": safe,
        "renamed.safetensors": whole,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        check_refused(model, tmp_path / name, "not a readable checkpoint")


class Trap:
    """Unpickling this would call `sys.exit`."""

    def __reduce__(self):
        return sys.exit, ("the checkpoint ran code",)


def test_runs_no_code(tmp_path):
    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    check_refused(FocalNet(**small_config()), tmp_path / "trap.pth", "not a readable checkpoint")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(), protocol=2))
    check_refused(FocalNet(**small_config()), tmp_path / "trap.pkl", "not a readable checkpoint")


def test_other_contents(tmp_path):
    model = FocalNet(**small_config())
    for name, content, message in [
        ("tensor.pth", torch.zeros(2), "expected tensors by name, got Tensor"),
        ("list.pth", [torch.zeros(2)], "expected tensors by name, got list"),
        ("nothing.pth", {}, "expected tensors by name, got dict"),
        (
            "mixed.pth",
            {"epoch": 3, "weights": torch.zeros(2)},
            "expected tensors by name, got int under 'epoch'",
        ),
        ("numbered.pth", {3: torch.zeros(2)}, "expected tensors by name, got Tensor under 3"),
        ("resnet.pth", {"conv1.weight": torch.zeros(2)}, "expected a FocalNet's keys"),
    ]:
        torch.save(content, tmp_path / name)
        check_refused(model, tmp_path / name, message)


def test_missing_files(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
            read_checkpoint(path)


def test_other_models(tmp_path):
    path = save(small_model().state_dict(), tmp_path / "ours.pth")
    with pytest.raises(ValueError, match="model: expected a FocalNet's keys .* got 'weight', 'bias'"):
        load_checkpoint(nn.Linear(2, 2), path)
    with torch.device("meta"):
        model = FocalNet(**small_config())
    with pytest.raises(ValueError, match="model: expected one with memory"):
        load_checkpoint(model, path)
