"""accelerate and restore as operations on live models."""

import copy
import io
import pickle

import pytest
import torch
from models.foreign import small_config, timm_model
from ops.golden import relative_error
from torch import nn
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetLayer

import focalnet_kernels as fk
from focalnet_kernels import _libraries
from focalnet_kernels._calls import forget
from focalnet_kernels.dispatch import requested_backend
from focalnet_kernels.integrations import accelerate, restore
from focalnet_kernels.integrations.equivalence import configuration
from integrations.foreign_layers import BUILD, FORMS, build, example

FORM = "timm"
QUICK = (FORM, "video", "query_context")  # forwards of their own


@pytest.fixture
def model():
    return timm_model(small_config())


@pytest.fixture
def x():
    return torch.randn(1, 3, 32, 32)


def backend_used(layer, form=FORM):
    """By asking for a backend that does not exist here, which raises."""
    try:
        layer(example(form))
    except fk.BackendError as error:
        return str(error).split("'")[1]
    return None


@pytest.mark.parametrize("form", BUILD)
def test_restore_is_bit_identical(form):
    layer, x = build(form), example(form)
    expected, before = layer(x), set(vars(layer))
    accelerate(layer)
    assert "forward" in vars(layer)
    restore(layer)
    stored = {"gates", "modulator", "gates_temporal", "modulator_temporal"}
    assert set(vars(layer)) - stored == before - stored
    assert torch.equal(layer(x), expected)
    restore(layer)  # nothing left to undo


def test_class_forward_stays_the_original():
    layer, x = build(FORM), example(FORM)
    expected = layer(x)
    accelerate(layer)
    assert torch.equal(type(layer).forward(layer, x), expected)


def test_nothing_is_registered(model):
    state = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    parameters, modules = list(model.parameters()), list(model.modules())
    accelerate(model)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_random_state_and_hooks_are_untouched(model):
    calls = []
    for module in model.modules():
        if type(module).__name__ == "FocalModulation":
            module.register_forward_hook(lambda *args: calls.append(args))
    state = torch.get_rng_state()
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == len(report.replaced) > 0  # a hook on the layer itself still fires


def test_generators_of_gpus_are_untouched(model, monkeypatch):
    """A seed that is given before CUDA starts waits for it, so another one would count even where no GPU is in use."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    assert accelerate(model).blocks and not seeds


def test_idempotent(model, x):
    first, expected = accelerate(model), model(x)
    assert accelerate(model) == first
    assert torch.equal(model(x), expected)
    restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_report(model):
    model.ours = fk.FocalModulation(8, 3, 2)
    model.other = build("detection", 8)
    model.other.focal_layers[1].register_forward_hook(lambda *args: None)
    report = accelerate(model)
    assert report.replaced[0] == ("layers.0.blocks.0.modulation", "timm")
    assert dict(report.kept) == {
        "ours": "already ours",
        "other": "focal_layers[1] has hooks, which a fused forward would not fire",
    }
    assert all(name in str(report) for name, _ in report.replaced + report.kept)


@pytest.mark.parametrize("form", BUILD)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_reads_its_own_parameters(form, way):
    layer, x = nn.Sequential(build(form)), example(form)
    accelerate(layer, "reference")
    with torch.no_grad():
        expected = layer(x)
        if way == "deepcopy":
            twin = copy.deepcopy(layer)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert twin[0].forward is not layer[0].forward
        for parameter in layer.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        restore(twin)
        assert "forward" not in vars(twin[0]) and "forward" in vars(layer[0])
        torch.testing.assert_close(twin(x), expected)


def test_deepcopy_after_a_training_forward():
    """The authors' class refuses it, for the graph that it stores."""
    layer, x = build("authors").train(), example("authors")
    layer(x)
    accelerate(layer)
    layer(x)
    copy.deepcopy(layer)


def test_new_weights_are_seen():
    layer, other, x = build(FORM), build(FORM), example(FORM)
    accelerate(layer)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))
    layer.f = copy.deepcopy(build(FORM).f)
    torch.testing.assert_close(layer(x), type(layer).forward(layer, x))


def test_shared_instance():
    layer = build("transformers")
    model = nn.Sequential(layer, nn.Identity(), layer)
    assert accelerate(model).replaced == [("0", "transformers")]
    restore(model[2])
    assert "forward" not in vars(layer)


def test_named_backend_holds_for_these_instances_only(monkeypatch):
    monkeypatch.setattr(_libraries, "cuda_device", "cuda")  # whatever other tests have set: it cannot run here
    forget()
    model = nn.ModuleList([build(FORM), build(FORM)])
    accelerate(model)
    accelerate(model[0], backend="triton")
    assert [backend_used(layer) for layer in model] == ["triton", None]
    with fk.use_backend("cuda"):
        assert [backend_used(layer) for layer in model] == ["triton", "cuda"]
    accelerate(model)  # the last call decides
    assert [backend_used(layer) for layer in model] == [None, None]


@torch.no_grad()
def test_compiles_without_a_break(backend):
    layer, x, before = build(FORM), example(FORM), requested_backend()
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    accelerate(layer, backend)
    torch.testing.assert_close(compiled(x), expected)
    accelerate(layer, "triton")
    with pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(x)  # the choice is seen, no stale code runs
    assert requested_backend() == before


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in BUILD]
)
def test_trains_compiled_without_a_break(form, backend):
    torch.compiler.reset()  # these are more forms and backends than may share one function's compilations
    layer, x = build(form), example(form)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    accelerate(layer, backend)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-5, name


def op_names(graph_module):
    return {str(node.target) for node in graph_module.graph.nodes}


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_original(model, x, strict):
    original = op_names(torch.export.export(model, (x,), strict=strict))
    accelerate(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert op_names(program) == original
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_takes_the_original(model, x):
    accelerate(model)
    expected = model(x)
    traced = torch.jit.trace(model, x)
    assert "focalnet_kernels" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_fx_takes_the_original():
    layer, x = build(FORM), example(FORM)
    accelerate(layer)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("form, name", [("transformers", "hidden_state"), ("timm", "x"), ("query_context", "x")])
def test_calls_by_name(form, name):
    layer, x = build(form).double(), example(form).double()
    expected = layer(x)
    accelerate(layer)
    assert relative_error(layer(**{name: x}), expected) < 1e-12
    accelerate(layer, backend="cpu")  # which takes no float64, so a call that it gets raises
    with pytest.raises(fk.BackendError, match="'cpu'"):
        layer(**{name: x})
    if form == "query_context":
        with pytest.raises(fk.BackendError, match="'cpu'"):
            layer(v=x, x=x)


def test_any_other_call_goes_to_the_class():
    layer, x = build("transformers"), example("transformers")
    accelerate(layer)
    for args, kwargs in (((), {}), ((x,), {"hidden_state": x}), ((x,), {"more": 1})):
        with pytest.raises(TypeError, match=r"forward\(\)"):
            layer(*args, **kwargs)


def test_meta_model_is_recognised_without_numbers():
    with torch.device("meta"):
        model = timm_model(small_config())
        report = accelerate(model)
    assert len(report.replaced) == 4
    model.to_empty(device="cpu")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("form", BUILD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_recognised_in_any_dtype_and_with_zero_weights(form, dtype):
    layer = build(form).to(dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    assert accelerate(layer).replaced == [("", FORMS[form])]


def test_recognised_whatever_the_default_dtype(model):
    torch.set_default_dtype(torch.bfloat16)
    try:
        report = accelerate(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.replaced and report.blocks and not report.kept and not report.kept_blocks


def test_equal_configurations_share_a_verdict():
    """transformers' blocks hold their model's configuration, whatever it was loaded from."""

    def known_by(eps):
        config = FocalNetConfig(layer_norm_eps=eps)
        return configuration(FocalNetLayer(config, 0, 8, (7, 6)))

    assert known_by(1e-5) == known_by(1e-5) != known_by(1e-6)


@pytest.mark.parametrize("function", [accelerate, restore])
def test_no_module(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(model\): expected an nn.Module, got str"):
        function("focalnet_tiny_lrf")


def test_unknown_backend_is_refused_up_front(model):
    with pytest.raises(ValueError, match="unknown backend 'tritn'.*did you mean 'triton'"):
        accelerate(model, backend="tritn")
    assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_found():
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        report = accelerate(nn.Linear(2, 2))
    assert report.replaced == report.kept == []


@pytest.mark.parametrize(
    "layer",
    [
        fk.FocalModulation(8, 3, 2),
        fk.FocalModulation1d(8, 3, 2),
        fk.CrossFocalModulation(8, 3, 2),
        fk.CrossFocalModulation3d(8, 3, 1),
        fk.SimilarityFocalModulation(8, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_ours_need_nothing(layer, recwarn):
    """Not a look-alike, and nothing to warn of."""
    report = accelerate(nn.Sequential(layer))
    assert report.kept == [("0", "already ours")] and not report.replaced
    assert not recwarn and "forward" not in vars(layer)
