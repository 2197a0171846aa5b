"""An accelerated layer that somebody changes computes what its class computes with the changed parts."""

import copy
import functools
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
from changed_parts import CHANGES, C
from models.foreign import small_config, timm_model
from ops.golden import relative_error
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import focalnet_kernels as fk
from focalnet_kernels.integrations import accelerate, restore
from integrations.foreign_layers import AuthorsClassification, build, example

pytestmark = pytest.mark.filterwarnings("ignore:a .* layer changed after accelerate:RuntimeWarning")


def run(layer, x):
    """What it answers, and what its class does."""
    return layer(x), type(layer).forward(layer, x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:accelerate. nothing:RuntimeWarning")
@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_parts_act(change, when):
    layer, x = build("authors", C, postln=True).double(), example("authors", C, dtype=torch.float64)
    layer.ndim = 2
    if when == "before":
        change(layer)
    accelerate(layer)
    if when == "after a call":
        layer(x)
    if when != "before":
        assert "forward" in vars(layer)
        change(layer)
    for _ in range(2):
        y, expected = run(layer, x)
        assert relative_error(y, expected) < 1e-12
        y.sum().backward()


@pytest.mark.parametrize("form", ["timm", "transformers", "volume", "yolo", "video", "query_context"])
@pytest.mark.parametrize("role", ["f", "h", "proj"])
def test_projections_act(form, role):
    names = {"transformers": dict(f="projection_in", h="projection_context", proj="projection_out")}
    name = names.get(form, {"f": "f_linear"} if form == "yolo" else {}).get(role, role)
    layer, x = build(form).double(), example(form, dtype=torch.float64)
    accelerate(layer)
    part = getattr(layer, name)
    part.forward = lambda t: 2 * type(part).forward(part, t)
    y, expected = run(layer, x)
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("change", ["hook", "forward", "another"])
def test_the_identity_in_a_norm_s_place_acts(change):
    """timm calls its norm whatever it is."""
    layer, x = build("timm").double(), example("timm", dtype=torch.float64)
    accelerate(layer)
    if change == "hook":
        layer.norm.register_forward_hook(lambda module, args, y: y.tanh())
    elif change == "forward":
        layer.norm.forward = torch.tanh
    else:
        layer.norm = nn.Tanh()
    y, expected = run(layer, x)
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("form, name", [("authors", "ln"), ("timm", "norm")])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_a_function_in_a_norm_s_place_acts(form, name, called):
    """Which is no module, so that the layer's table of modules does not name it."""
    layer = build(form, C, postln=form == "authors").double()
    x = example(form, C, dtype=torch.float64)
    accelerate(layer)
    if called:
        layer(x)
    delattr(layer, name)
    setattr(layer, name, torch.tanh)
    y, expected = run(layer, x)
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("form", ["authors", "timm", "yolo"])
def test_a_function_in_the_dropout_s_place_acts(form):
    layer, x = build(form).double(), example(form, dtype=torch.float64)
    accelerate(layer)
    delattr(layer, "proj_drop")
    layer.proj_drop = torch.tanh
    y, expected = run(layer, x)
    assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("on", [False, True])
def test_a_norm_given_to_a_yolo_layer(on):
    """Its class calls it where the flag is on, and over the width, which here is C."""
    layer, x = build("yolo", C=6).double(), example("yolo", C=6, dtype=torch.float64)
    accelerate(layer)
    layer.ln, layer.use_postln_in_modulation = nn.LayerNorm(6).double(), on
    y, expected = run(layer, x)
    assert relative_error(y, expected) < 1e-12


def test_offloaded_weights():
    """As accelerate's offload has it: weights on meta, and a forward bound to the instance that fetches them."""
    layer, x = build("timm"), example("timm")
    accelerate(layer)
    expected = layer(x)
    for part in [module for module in layer.modules() if module._parameters]:
        weights = {name: p.data for name, p in part.named_parameters(recurse=False)}
        original = part.forward
        part.forward = functools.partial(_fetched, original, part, weights)
        part.to("meta")
    assert relative_error(layer(x), expected) < 1e-5


def _fetched(forward, part, weights, x):
    for name, value in weights.items():
        setattr(part, name, nn.Parameter(value, requires_grad=False))
    y = forward(x)
    part.to("meta")
    return y


@pytest.mark.parametrize("way", ["itself", "deepcopy", "copy"])
def test_the_class_is_patched_afterwards(way, monkeypatch):
    layer, x = build("authors"), example("authors")
    accelerate(layer)
    original = AuthorsClassification.forward
    monkeypatch.setattr(AuthorsClassification, "forward", lambda self, x: 2 * original(self, x))
    layer = layer if way == "itself" else getattr(copy, way)(layer)
    torch.testing.assert_close(layer(x), 2 * original(layer, x))


def test_a_norm_s_class_is_patched_afterwards(monkeypatch):
    model = timm_model(small_config(use_postln_in_modulation=True))
    layer = model.layers[0].blocks[0].modulation
    x = torch.randn(1, layer.f.weight.shape[1], 6, 5)
    accelerate(layer)
    assert type(layer.norm) is LayerNorm2d
    original = LayerNorm2d.forward
    monkeypatch.setattr(LayerNorm2d, "forward", lambda self, x: 2 * original(self, x))
    y, expected = run(layer, x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("form", ["timm", "authors", "ours"])
def test_dropout_that_is_off_need_not_be_called(form):
    """Unless somebody sees the call, or it is on."""
    layer = fk.FocalModulation(8, 3, 2) if form == "ours" else build(form)
    x = torch.randn(2, 5, 4, 8) if form == "ours" else example(form)
    layer.eval().proj_drop.p = 0.5
    if form != "ours":
        accelerate(layer)
    before = layer(x)
    layer.proj_drop.train()
    assert (layer(x) == 0).any()
    layer.proj_drop.p = 1.0
    assert not layer(x).any()
    layer.proj_drop.eval()
    assert torch.equal(layer(x), before)
    handle = layer.proj_drop.register_forward_hook(lambda module, args, y: 2 * y)
    assert torch.equal(layer(x), 2 * before)
    handle.remove()
    layer.proj_drop.forward = torch.neg
    assert torch.equal(layer(x), -before)


def test_hooks_on_all_modules_fire():
    layer, seen = build("timm"), []
    accelerate(layer)
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        layer(example("timm"))
    finally:
        handle.remove()
    assert {layer.f, layer.h, layer.proj, *layer.focal_layers} <= set(seen)


@pytest.mark.parametrize("form", ["timm", "query_context"])
def test_compiled_layers_see_changes(form):
    """The warning must not break the graph; forwards and padding are guarded by every torch, hooks by some."""
    torch.compiler.reset()
    layer, x = build(form), example(form)
    accelerate(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), type(layer).forward(layer, x))
    layer.h.forward = lambda t: 2 * nn.Conv2d.forward(layer.h, t)
    torch.testing.assert_close(compiled(x), type(layer).forward(layer, x))
    del layer.h.forward
    conv = layer.focal_layers[0][0]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1] * 4
    torch.testing.assert_close(compiled(x), type(layer).forward(layer, x))


def test_a_shallow_copy_reads_its_own_modules():
    layer, x = build("timm"), example("timm")
    accelerate(layer, "reference")
    expected, twin = layer(x), copy.copy(layer)
    assert torch.equal(twin(x), expected)
    twin._modules = dict(layer._modules)
    twin.h = build("timm").h
    torch.testing.assert_close(*run(twin, x))
    assert torch.equal(layer(x), expected)
    restore(twin)
    assert "forward" not in vars(twin) and "forward" in vars(layer)
    twin = copy.copy(layer)
    del layer
    assert torch.equal(twin(x), expected)


def test_freed_with_the_last_name():
    """By reference counts: weights of gigabytes must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        layer = build("timm")
        accelerate(layer)
        layer(example("timm"))
        twin = copy.deepcopy(layer)
        parameters = [weakref.ref(p) for module in (layer, twin) for p in module.parameters()]
        forward = layer.forward
        del layer, twin
        assert [r() for r in parameters] == [None] * len(parameters)
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="has outlived its layer"):
        forward(example("timm"))
    with pytest.raises(RuntimeError, match="has outlived its layer"):
        pickle.loads(pickle.dumps(forward))(example("timm"))


def wrapped(layer, old, *args):
    return 2 * old(*args)


def wrap(layer):
    """As Hugging Face's accelerate does it."""
    layer._old_forward = layer.forward
    layer.forward = functools.partial(wrapped, layer, layer.forward)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_wrapped_layers(way):
    layer, x = build("timm"), example("timm")
    accelerate(layer, "reference")
    wrap(layer)
    expected = layer(x)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert twin._old_forward.module is twin
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    del layer
    assert torch.equal(twin(x), expected)


def test_restore_says_what_it_cannot():
    model, x = nn.Sequential(build("timm"), build("timm")), example("timm")
    accelerate(model)
    wrap(model[0])
    with pytest.warns(RuntimeWarning, match=r"^restore: 0 stays accelerated: its forward was wrapped.*partial") as said:
        restore(model)
    assert len(said) == 1 and "forward" not in vars(model[1])
    model[0].forward = model[0]._old_forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model)
        restore(model)
    assert set(vars(model[1])) == set(vars(model[0])) - {"_old_forward"}
    torch.testing.assert_close(*run(model[0], x))


def test_two_threads_with_backends_of_their_own(cpu_kernels):
    """Each layer keeps its backend, and the process its own."""
    double, single = build("timm").double(), build("timm")
    accelerate(double, backend="reference")
    accelerate(single, backend="cpu")
    failed = []

    def serve(layer, x):
        try:
            with torch.no_grad():
                for _ in range(300):
                    layer(x)
        except fk.BackendError as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        calls = [(double, example("timm", dtype=torch.float64)), (single, example("timm"))]
        threads = [threading.Thread(target=serve, args=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == [] and fk.dispatch.requested_backend() == "auto"
