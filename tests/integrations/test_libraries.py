"""Libraries patched before their models are built, and restored."""

import copy
import functools
import pickle
import sys
import types
import warnings
from collections import Counter

import pytest
import timm
import torch
from models.foreign import huggingface_model, small_config, timm_model
from ops import golden
from timm.models.focalnet import Downsample
from timm.models.focalnet import FocalModulation as TimmModulation
from timm.models.focalnet import FocalNetBlock as TimmBlock
from torch import nn
from transformers.models.focalnet.modeling_focalnet import FocalNetLayer, FocalNetModulation, FocalNetPatchEmbeddings

import focalnet_kernels as fk
from focalnet_kernels.integrations import patch_official, patch_timm, patch_transformers, patching, restore
from integrations import foreign_blocks, foreign_layers, look_alikes
from integrations.foreign_blocks import AuthorsBlock, DetectionBlock
from integrations.foreign_layers import AuthorsClassification, AuthorsDetection
from integrations.test_blocks import Parallel, answers, is_fused

LIBRARIES = {"timm": (patch_timm, timm_model), "transformers": (patch_transformers, huggingface_model)}
AUTHORS = ("authors", "detection", "video")
CLASSES = [
    TimmModulation, TimmBlock, Downsample, FocalNetModulation, FocalNetLayer, FocalNetPatchEmbeddings,
    AuthorsClassification, AuthorsBlock, DetectionBlock,
]  # fmt: skip


@pytest.fixture(autouse=True)
def libraries_are_restored():
    before = [dict(vars(cls)) for cls in CLASSES]
    yield
    assert [dict(vars(cls)) for cls in CLASSES] == before


def accelerated(model):
    return sum("forward" in vars(module) for module in model.modules())


def accelerated_blocks(model):
    return sum("forward" in vars(module) for module in model.modules() if "modulation" in module._modules)


def accelerated_embeddings(model):
    return accelerated(
        nn.ModuleList(m for m in model.modules() if isinstance(m, (Downsample, FocalNetPatchEmbeddings)))
    )


def seeded(build, *args, **options):
    torch.manual_seed(3)
    return build(*args, **options), torch.rand(1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_are_created_accelerated(library):
    patch, build = LIBRARIES[library]
    plain, next_random = seeded(build, small_config())
    with patch():
        model, next_random_patched = seeded(build, small_config())
    state, x = model.state_dict(), torch.randn(1, 3, 32, 32)
    assert list(state) == list(plain.state_dict()) and torch.equal(next_random, next_random_patched)
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert (accelerated(model), accelerated_blocks(model), accelerated_embeddings(model)) == (11, 4, 3)
    assert accelerated(plain) == 0
    assert type(model) is type(plain)

    output, expected = (getattr(m(x), "logits", m(x)) for m in (model, plain))
    assert golden.relative_error(output, expected) < 1e-5
    assert accelerated(seeded(build, small_config())[0]) == 0  # built after the patch was taken back
    restore(model)
    assert torch.equal(getattr(model(x), "logits", model(x)), expected)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("postln", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_of_models_run_as_ops(library, postln, training, monkeypatch):
    patch, build = LIBRARIES[library]
    config = small_config(drop_path_rate=0.5, use_layerscale=True, layerscale_value=0.5, use_postln=postln)
    plain, _ = seeded(build, config)
    with patch():
        model, _ = seeded(build, config)
    x, called, found = torch.randn(8, 3, 32, 32, dtype=torch.float64), is_fused(model, monkeypatch), []
    for m in (plain, model):
        m.double().train(training)
        torch.manual_seed(5)
        y = m(x)
        found.append((getattr(y, "logits", y), torch.rand(1), len(called)))
    (expected, next_random, before), (output, next_random_patched, after) = found
    assert (before, after) == (0, 4)
    assert golden.relative_error(output, expected) < 1e-12
    assert torch.equal(next_random, next_random_patched), "drop path drew other numbers"


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("form", AUTHORS)
def test_blocks_of_a_module_that_is_given_run_as_ops(form, training, monkeypatch):
    options = {"scale": True, "drop_path": 0.5}
    plain, _ = seeded(foreign_blocks.build, form, **options)
    with patch_official(foreign_blocks):
        block, _ = seeded(foreign_blocks.build, form, **options)
    args, called = foreign_blocks.example(form, dtype=torch.float64), is_fused(block, monkeypatch)
    expected = answers(plain.double(), args, training)
    assert not called
    found = answers(block.double(), args, training)
    assert called and accelerated(block) == 2
    assert torch.equal(found[-1], expected[-1]), "drop path drew other numbers"
    assert all(golden.relative_error(*pair) < 1e-10 for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{"level": "layer"}, {"keep_modulator": True}], ids=str)
def test_layers_alone(options, recwarn):
    for patch, build in LIBRARIES.values():
        with patch(**options):
            model = build(small_config())
        assert (accelerated(model) - accelerated_embeddings(model), accelerated_blocks(model)) == (4, 0)
        assert accelerated_embeddings(model) == (0 if "level" in options else 3)
    with patch_official(foreign_blocks, **options):
        blocks = nn.ModuleList(foreign_blocks.build(form) for form in AUTHORS)
    assert (accelerated(blocks), accelerated_blocks(blocks)) == (3, 0)
    blocks[0](*foreign_blocks.example("authors"))
    assert hasattr(blocks[0].modulation, "modulator") == ("keep_modulator" in options)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]  # it was asked for


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_keep_hidden_values_where_asked(library):
    patch, build = LIBRARIES[library]
    for keep_hidden in (False, True):
        with patch(keep_hidden=keep_hidden):
            model = build(small_config())
        blocks = [module for module in model.modules() if "modulation" in module._modules]
        assert [block.forward.adapter.keep_hidden for block in blocks] == 4 * [keep_hidden]


def test_the_last_patch_decides_on_blocks():
    def blocks():
        return accelerated_blocks(foreign_blocks.build("authors"))

    outer = patch_official(foreign_blocks)
    inner = patch_official(foreign_blocks, level="layer")
    assert blocks() == 0
    inner.undo()
    assert blocks() == 1
    inner = patch_official(foreign_blocks, level="layer")
    outer.undo()
    assert blocks() == 0
    inner.undo()


def test_a_layer_that_keeps_its_modulator_is_called():
    """The layers' class may be known to another patch than the blocks'."""
    with patch_official(foreign_blocks), patch_official(foreign_layers, keep_modulator=True):
        with pytest.warns(RuntimeWarning, match="its layer alone accelerated: keep_modulator=True was asked for"):
            block = foreign_blocks.build("authors")
    assert (accelerated(block), accelerated_blocks(block)) == (1, 0)
    block(*foreign_blocks.example("authors"))
    assert block.modulation.modulator is not None


def test_look_alike_blocks_say_once_why():
    module = types.ModuleType("focalnet")
    module.Layer, module.Block = AuthorsClassification, Parallel
    with patch_official(module):
        with pytest.warns(RuntimeWarning, match="Parallel was built with its layer alone accelerated: .* else"):
            block = Parallel(AuthorsClassification(12, 3, 2), 12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Parallel(AuthorsClassification(12, 3, 2), 12)
    assert (accelerated(block), accelerated_blocks(block)) == (1, 0)


def test_a_subclass_of_a_block_is_not_taken_for_its_base():
    class Doubled(TimmBlock):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = 2

        def forward(self, x):
            return self.scale * super().forward(x)

    class Renamed(TimmBlock):
        pass

    with patch_timm():
        assert (accelerated(Doubled(8)), accelerated(Renamed(8))) == (1, 2)


@pytest.mark.parametrize("library", LIBRARIES)
def test_built_without_numbers(library, monkeypatch):
    patch, build = LIBRARIES[library]
    plain, x = build(small_config()), torch.randn(1, 3, 32, 32)
    with patch(), torch.device("meta"):
        model = build(small_config())
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    called = is_fused(model, monkeypatch)
    output, expected = (getattr(y, "logits", y) for y in (model(x), plain(x)))
    assert len(called) == 4 and golden.relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_configuration_is_compared_once(library, monkeypatch):
    patch, build = LIBRARIES[library]
    compared, compare = [], patching.compare
    monkeypatch.setattr(patching, "compare", lambda *args: compared.append(type(args[1])) or compare(*args))
    with patch():
        build(small_config(drop_path_rate=0.3))
        forms = {"timm": 2, "transformers": 1}[library]  # of patch embeddings with such members
        assert sorted(Counter(compared).values()) == sorted([3, 3, 3 * forms])  # three widths
        count = len(compared)
        build(small_config(drop_path_rate=0.3))
    assert len(compared) == count


def test_timm_factories():
    with patch_timm():
        model = timm.create_model("focalnet_tiny_srf", features_only=True, out_indices=(0, 1))
    assert accelerated(model) == 8 + 2
    assert [features.shape[1] for features in model(torch.randn(1, 3, 32, 32))] == [96, 192]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_transformers_from_pretrained(dtype, tolerance, tmp_path):
    plain = huggingface_model(small_config(use_layerscale=True))
    plain.save_pretrained(tmp_path)
    with patch_transformers():
        model = type(plain).from_pretrained(tmp_path, dtype=dtype)  # with no numbers at first, and as torch's default
    x = torch.randn(1, 3, 32, 32, dtype=dtype)
    assert accelerated(model) == 11
    assert golden.relative_error(model(x).logits, plain.to(dtype)(x).logits) < tolerance


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
        assert accelerated(twin) == 11
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
    for patch in (patch_timm, patch_transformers, functools.partial(patch_official, foreign_blocks)):
        name = getattr(patch, "func", patch).__name__
        with pytest.raises(ValueError, match=rf"^{name}\(level\): expected one of block, layer, got 'net'$"):
            patch(level="net")
    monkeypatch.setitem(sys.modules, "timm.models.focalnet", None)
    with pytest.raises(ImportError, match="timm"):
        patch_timm()
