"""Libraries patched before their models are built, and restored."""

import copy
import functools
import pickle
import sys
import types
import warnings

import pytest
import timm
import torch
from models.foreign import huggingface_model, small_config, timm_model
from ops import golden
from timm.models.focalnet import FocalModulation as TimmModulation
from torch import nn
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

import focalnet_kernels as fk
from focalnet_kernels.integrations import patch_official, patch_timm, patch_transformers, restore
from integrations import foreign_layers, look_alikes
from integrations.foreign_layers import AuthorsClassification, AuthorsDetection

LIBRARIES = {"timm": (patch_timm, timm_model), "transformers": (patch_transformers, huggingface_model)}
CLASSES = [TimmModulation, FocalNetModulation]


@pytest.fixture(autouse=True)
def libraries_are_restored():
    before = [dict(vars(cls)) for cls in CLASSES]
    yield
    assert [dict(vars(cls)) for cls in CLASSES] == before


def accelerated(model):
    return sum("forward" in vars(module) for module in model.modules())


def seeded(build):
    torch.manual_seed(3)
    model = build(small_config())
    return model, torch.rand(1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_are_created_accelerated(library):
    patch, build = LIBRARIES[library]
    plain, next_random = seeded(build)
    with patch():
        model, next_random_patched = seeded(build)
    state, x = model.state_dict(), torch.randn(1, 3, 32, 32)
    assert list(state) == list(plain.state_dict()) and torch.equal(next_random, next_random_patched)
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert (accelerated(model), accelerated(plain)) == (4, 0)
    assert type(model) is type(plain)

    output, expected = (getattr(m(x), "logits", m(x)) for m in (model, plain))
    assert golden.relative_error(output, expected) < 1e-5
    assert accelerated(seeded(build)[0]) == 0  # built after the patch was taken back
    restore(model)
    assert torch.equal(getattr(model(x), "logits", model(x)), expected)


def test_timm_factories():
    with patch_timm():
        model = timm.create_model("focalnet_tiny_srf", features_only=True, out_indices=(0, 1))
    assert accelerated(model) == 4
    assert [features.shape[1] for features in model(torch.randn(1, 3, 32, 32))] == [96, 192]


def test_transformers_from_pretrained(tmp_path):
    plain = huggingface_model(small_config())
    plain.save_pretrained(tmp_path)
    with patch_transformers():
        model = type(plain).from_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert accelerated(model) == 4
    assert golden.relative_error(model(x).logits, plain(x).logits) < 1e-5


def test_nested_and_twice():
    constructor = TimmModulation.__init__
    outer = patch_timm()
    patched = TimmModulation.__init__
    with patch_timm():
        assert TimmModulation.__init__ is patched  # not wrapped twice
    assert accelerated(TimmModulation(8, 3, 2)) == 1
    inner = patch_timm()
    outer.undo()  # in another order than they came
    outer.undo()
    assert accelerated(TimmModulation(8, 3, 2)) == 1
    inner.undo()
    assert TimmModulation.__init__ is constructor and accelerated(TimmModulation(8, 3, 2)) == 0


def test_taken_back_when_the_block_fails():
    with pytest.raises(KeyError), patch_timm():
        raise KeyError


def test_the_last_patch_decides():
    with patch_official(foreign_layers, "reference"):
        with patch_official(foreign_layers, "triton", keep_modulator=True):
            inner = AuthorsClassification(8, 3, 2)
        outer = AuthorsClassification(8, 3, 2)
    x = torch.randn(1, 5, 4, 8)
    with pytest.raises(fk.BackendError, match="'triton'"):
        inner(x)
    outer(x)
    assert not hasattr(outer, "gates")


def test_patched_over_by_others():
    constructor, patch = TimmModulation.__init__, patch_timm()
    ours = TimmModulation.__init__

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        ours(self, *args, **kwargs)

    TimmModulation.__init__ = theirs
    try:
        assert accelerated(TimmModulation(8, 3, 2)) == 1
        patch.undo()
        assert TimmModulation.__init__ is theirs and accelerated(TimmModulation(8, 3, 2)) == 0
        with patch_timm():
            assert accelerated(TimmModulation(8, 3, 2)) == 1
        assert TimmModulation.__init__ is theirs
    finally:
        TimmModulation.__init__ = constructor


def test_every_layer_of_a_module_that_is_given():
    def layers():
        made = [foreign_layers.build(form) for form in ("authors", "detection", "volume", "video", "query_context")]
        return [accelerated(layer) for layer in made]

    with patch_official(foreign_layers):
        assert layers() == [1] * 5
        assert accelerated(fk.FocalModulation(8, 3, 2)) == 0
    assert layers() == [0] * 5


def test_a_subclass_is_not_taken_for_its_base():
    class Doubled(TimmModulation):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = 2

        def forward(self, x):
            return self.scale * super().forward(x)

    class Renamed(TimmModulation):
        pass

    with patch_timm():
        assert accelerated(Doubled(8, 3, 2)) == 0
        assert accelerated(Renamed(8, 3, 2)) == 1


def test_verdicts_are_of_the_objects_that_a_layer_holds(monkeypatch):
    """An object's id may pass to the next one; its verdict must not."""

    class Scaled(AuthorsDetection):
        def __init__(self, dim, scale):
            super().__init__(dim)
            self.scale = types.SimpleNamespace(value=scale)

        def forward(self, x):
            return super().forward(x) * self.scale.value

    monkeypatch.setattr(foreign_layers, "Scaled", Scaled, raising=False)
    with patch_official(foreign_layers), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert [accelerated(Scaled(8, scale)) for scale in (1, 2, 1, 2, 1, 2)] == [1, 0] * 3


def test_look_alikes_are_built_as_they_are():
    with patch_official(look_alikes), pytest.warns(RuntimeWarning, match="SigmoidGates was built as it is: .* else"):
        assert accelerated(look_alikes.SigmoidGates(12)) == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies_of_models_built_under_a_patch(library):
    patch, build = LIBRARIES[library]
    with patch():
        model = build(small_config())
        pickled = pickle.dumps(model)
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert accelerated(twin) == 4
        assert torch.equal(getattr(twin(x), "logits", twin(x)), getattr(expected, "logits", expected))


def test_refusals(monkeypatch):
    with pytest.raises(TypeError, match=r"patch_official\(module\): expected an imported module, got type"):
        patch_official(AuthorsDetection)
    module = types.ModuleType("focalnet")
    module.Ours, module.Linear = fk.FocalModulation, nn.Linear
    with pytest.raises(ValueError, match=r"patch_official\(module\): .* found none in focalnet"):
        patch_official(module)
    with pytest.raises(ValueError, match=r"patch_timm\(backend\): unknown backend 'tritn'"):
        patch_timm("tritn")
    monkeypatch.setitem(sys.modules, "timm.models.focalnet", None)
    with pytest.raises(ImportError, match="timm"):
        patch_timm()
