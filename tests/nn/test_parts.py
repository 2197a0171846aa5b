"""Inner modules that somebody hooked, wrapped, replaced or parametrised act in our own layers as in any module."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from changed_parts import CHANGES, C, OnTop, bound_forward, hooked, padded_in_place
from integrations.foreign_layers import AuthorsClassification
from ops.golden import relative_error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import focalnet_kernels as fk
from focalnet_kernels._parts import _snapshots
from focalnet_kernels.nn.block import FocalNetBlock, Mlp

MODULES = {1: fk.FocalModulation1d, 2: fk.FocalModulation, 3: fk.FocalModulation3d}
CROSS = {1: fk.CrossFocalModulation1d, 2: fk.CrossFocalModulation, 3: fk.CrossFocalModulation3d}


for_every_change = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES),
]


def marked(function):
    for mark in for_every_change:
        function = mark(function)
    return function


def build(cls, seed):
    torch.manual_seed(seed)
    return cls(C, 3, 2, use_postln_in_modulation=True).double()


class Eager(AuthorsClassification):
    """The authors' forward over somebody's inner modules."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.dim, self.focal_level = layer.dim, len(layer.focal_layers)
        self.f, self.h, self.proj, self.focal_layers = layer.f, layer.h, layer.proj, layer.focal_layers
        self.ln, self.act, self.proj_drop = layer.ln, nn.GELU(), nn.Identity()

    def forward(self, x, target=None):
        q = self.f(x)[..., : self.dim].movedim(-1, 1)
        projected = self.f(x if target is None else target)[..., self.dim :].movedim(-1, 1)
        ctx, gates = projected.split((self.dim, self.focal_level + 1), 1)
        modulator = self.modulator_of(ctx, gates, False)
        return self.finish(q * modulator, True), gates, modulator


def gradients(y, layer):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)


@marked
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("ndim", MODULES)
def test_changed_parts_act(ndim, called, change, seed):
    """Also after a call, which remembers that it found nothing changed."""
    layer, x = build(MODULES[ndim], seed), torch.randn(2, *(5, 4, 3)[:ndim], C, dtype=torch.float64)
    if called:
        layer(x)
    change(layer)
    assert (layer.why_by_parts() is None) == (change is CHANGES["biased"])  # which the ops take
    for _ in range(2):  # some weights are made anew for every step
        expected = Eager(layer)(x)
        for result, value in zip(layer(x, return_gates=True), expected, strict=True):
            assert relative_error(result, value) <= 1e-12
        y = layer(x)
        assert relative_error(y, expected[0]) <= 1e-12
        for found, value in zip(gradients(y, layer), gradients(expected[0], layer), strict=True):
            assert (found is None) == (value is None) and (value is None or relative_error(found, value) <= 1e-10)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.25)


@marked
def test_changed_parts_act_in_the_cross_form(change, seed):
    layer = build(CROSS[2], seed)
    x, target = torch.randn(2, 2, 5, 4, C, dtype=torch.float64).unbind()
    change(layer)
    assert relative_error(layer(x, target), Eager(layer)(x, target)[0]) <= 1e-12


def test_cross_form_of_another_size(seed):
    """Called part by part the target is resampled as in the fused form."""
    layer = build(CROSS[2], seed)
    x, target = torch.randn(2, 5, 4, C, dtype=torch.float64), torch.randn(2, 3, 7, C, dtype=torch.float64)
    expected = layer(x, target)
    layer.f.register_forward_hook(lambda *args: None)
    assert relative_error(layer(x, target), expected) <= 1e-12


@torch.no_grad()
def test_weights_of_another_kind_act(backend, seed):
    torch.manual_seed(seed)
    layer, x = fk.FocalModulation(C, 3, 2, use_postln_in_modulation=True), torch.randn(2, 5, 4, C)
    layer.proj.weight = nn.Parameter(layer.proj.weight.as_subclass(OnTop))
    with fk.use_backend(backend):
        assert relative_error(layer(x), Eager(layer)(x)[0]) <= 1e-5


PATCHED = [(nn.Linear, "forward"), (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.LayerNorm, "forward")]
PATCHED += [(nn.GELU, "forward"), (nn.Sequential, "forward"), (nn.Module, "__call__")]
PATCHED += [(nn.Module, "_call_impl"), (nn.Linear, "__call__"), (nn.Conv2d, "_call_impl")]


@pytest.mark.parametrize("cls, name", PATCHED, ids=lambda value: getattr(value, "__name__", value))
def test_patched_classes_act(cls, name, seed, monkeypatch):
    layer, x = build(fk.FocalModulation, seed), torch.randn(2, 5, 4, C, dtype=torch.float64)
    called, original = [], getattr(cls, name)

    def patched(self, *args, **kwargs):
        called.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, patched)
    layer(x)
    inner = {part for part in layer.modules() if isinstance(part, cls)} - {layer.focal_layers, layer.proj_drop}
    assert inner <= set(called)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
@pytest.mark.parametrize("build", [lambda: fk.FocalModulation(C, 3, 2), lambda: Mlp(C, 8)], ids=["layer", "mlp"])
def test_hooks_on_all_modules_fire(register, build):
    layer, seen = build(), []
    handle = register(lambda module, *args: seen.append(module) or None)
    try:
        layer(torch.randn(2, 5, 4, C, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert {type(part) for part in layer.modules()} - {nn.ModuleList} == {type(part) for part in seen}


def in_place(layer):
    with torch.no_grad():
        layer.h.weight.mul_(3)


def another_parameter(layer):
    layer.h.weight = nn.Parameter(3 * layer.h.weight.detach())


def other_data(layer):
    layer.focal_layers[0][0].weight.data = layer.focal_layers[0][0].weight.data * 3


def loaded(layer):
    layer.load_state_dict({name: 3 * value for name, value in layer.state_dict().items()}, assign=True)


def hooked_through_a_new_table(layer):
    layer.f._forward_hooks = type(layer.f._forward_hooks)()
    assert layer.why_by_parts() is None
    layer.f.register_forward_hook(lambda module, args, y: 3 * y)


@pytest.mark.parametrize("change", [in_place, another_parameter, other_data, loaded, hooked_through_a_new_table])
def test_changes_between_calls_act(change, seed):
    layer, x = build(fk.FocalModulation, seed), torch.randn(2, 5, 4, C, dtype=torch.float64)
    before = layer(x)
    change(layer)
    assert relative_error(layer(x), Eager(layer)(x)[0]) <= 1e-12
    assert relative_error(layer(x), before) > 1e-3


def test_weights_of_a_call_alone(seed):
    """functional_call puts tensors in the parameters' place, and takes them back."""
    layer, x = build(fk.FocalModulation, seed), torch.randn(2, 5, 4, C, dtype=torch.float64)
    before = layer(x)
    changed = {name: 2 * value for name, value in layer.named_parameters()}
    y = torch.func.functional_call(layer, changed, (x,))
    assert relative_error(y, torch.func.functional_call(Eager(layer), changed, (x,))[0]) <= 1e-12
    assert torch.equal(layer(x), before)


def test_what_is_remembered_goes_with_the_layer(seed):
    layer = build(fk.FocalModulation, seed)
    layer(torch.randn(2, 5, 4, C, dtype=torch.float64))
    assert layer in _snapshots
    parts = [weakref.ref(part) for part in layer.modules()]
    del layer
    assert not any(part() for part in parts)


def test_plain_levels_stay_one_op(seed):
    """Where only a projection is wrapped, the kernels still gather the context: here one that takes no float64."""
    layer, x = build(fk.FocalModulation, seed), torch.randn(2, 5, 4, C, dtype=torch.float64)
    layer.f.register_forward_hook(lambda *args: None)
    with fk.use_backend("cpu"):
        with pytest.raises(fk.BackendError, match="focal_context: backend 'cpu' cannot run this call"):
            layer(x)
        layer.focal_layers[0].register_forward_hook(lambda *args: None)
        layer(x)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # else hooks put on later may act on no compiled module
def test_compiled_layers_see_changes(seed):
    torch.compiler.reset()
    layer, x = build(fk.FocalModulation, seed), torch.randn(2, 5, 4, C, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    handle = layer.h.register_forward_hook(lambda module, args, y: 2 * y)
    assert relative_error(compiled(x), Eager(layer)(x)[0]) <= 1e-12
    handle.remove()
    assert torch.equal(compiled(x), before)
    bound_forward("proj")(layer)
    assert relative_error(compiled(x), Eager(layer)(x)[0]) <= 1e-12
    del layer.proj.forward
    padded_in_place(layer)
    assert relative_error(compiled(x), Eager(layer)(x)[0]) <= 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linears():
    """Every Linear of a model, those of the MLPs too."""
    block = FocalNetBlock(16, focal_level=2).eval()
    quantised = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    x = torch.randn(1, 5, 4, 16)
    assert relative_error(quantised(x), block(x)) < 0.05


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_changed_parts_of_the_mlp_act(part, seed):
    torch.manual_seed(seed)
    mlp, x = Mlp(C, 8), torch.randn(2, 5, 4, C)
    for change in (hooked(part), bound_forward(part)):
        change(mlp)
    expected = F.linear(x, mlp.fc1.weight, mlp.fc1.bias) * (4 if part == "fc1" else 1)
    expected = F.linear(F.gelu(expected), mlp.fc2.weight, mlp.fc2.bias) * (4 if part == "fc2" else 1)
    torch.testing.assert_close(mlp(x), expected)
