"""An accelerated layer computes what the layer computed: values, gradients, strides, dropout, side effects."""

import copy

import pytest
import torch
from models.foreign import SMALL, huggingface_model, randomized, small_config, timm_model
from ops import golden
from torch.func import functional_call

from focalnet_kernels.integrations import accelerate, restore
from focalnet_kernels.testing import BACKWARD_FACTOR, FORWARD_FACTOR, assert_accurate
from integrations.foreign_layers import (
    BUILD,
    CHANNELS_FIRST,
    FORMS,
    AuthorsClassification,
    AuthorsDetection,
    DetrexLayer,
    build,
    example,
)

CASES = {
    "plain": {},
    "no_levels": {"levels": 0},
    "three_levels_postln": {"levels": 3, "postln": True},
    "odd_channels": {"C": 7, "levels": 1},
}


def every_form(*cases):
    """With each of the cases that our forward takes."""
    return [(form, case) for form in BUILD for case in cases if form != "yolo" or not CASES[case].get("postln")]


def output_and_gradients(layer, x, grad_output):
    """Of the parameters and of x, by name."""
    x = x.detach().requires_grad_()
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    y = functional_call(layer, parameters, x)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], grad_output)
    names = ["output", "grad x", *(f"grad {name}" for name in parameters)]
    return dict(zip(names, [y.detach(), *gradients], strict=True))


def nearby(tensor):
    """Numbers of about the same size, whose roundings fall anew."""
    return tensor * (1 + torch.rand_like(tensor) / 64)


@pytest.mark.parametrize("name", golden.NAMES)
def test_authors_form_of_these_tests_is_the_authors(name):
    config, tensors = golden.load(golden.FILES[golden.NAMES.index(name)])
    layer = AuthorsClassification(**config).double().eval()
    layer.load_state_dict({key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")})
    for accelerated in (False, True):
        if accelerated:
            assert len(accelerate(layer, keep_modulator=True).replaced) == 1
        with torch.no_grad():
            results = {"output": layer(tensors["input"]), "gates": layer.gates, "modulator": layer.modulator}
        for what, result in results.items():
            assert golden.relative_error(result, tensors[what]) < 1e-12


@pytest.mark.parametrize(("form", "case"), every_form(*CASES))
def test_float32(form, case, backend):
    layer = build(form, **CASES[case])
    x = example(form, C=CASES[case].get("C", 12))
    grad_output = torch.randn_like(x)
    expected = output_and_gradients(layer, x, grad_output)
    assert accelerate(layer, backend).replaced == [("", FORMS[form])]
    with torch.no_grad():
        assert golden.relative_error(layer(x), expected["output"]) < 1e-5
    results = output_and_gradients(layer, x, grad_output)
    for name, result in results.items():
        assert golden.relative_error(result, expected[name]) < 1e-5, name


@pytest.mark.parametrize("form", ["authors", "detrex", "scaled", "timm", "transformers", "volume", "yolo", "video"])
def test_normalized_modulator_without_bias(form, backend):
    options = {"normalize_modulator": True} | ({} if form in ("detrex", "scaled", "transformers") else {"bias": False})
    layer, x = build(form, **options), example(form)
    expected = layer(x)
    accelerate(layer, backend)
    assert golden.relative_error(layer(x), expected) < 1e-5


@pytest.mark.parametrize(("form", "case"), every_form("plain", "three_levels_postln"))
def test_bfloat16(form, case, backend):
    layer = build(form, **CASES[case]).bfloat16()
    x = example(form, dtype=torch.bfloat16)
    grad_output = torch.randn_like(x)
    double = copy.deepcopy(layer).double()
    calls = [(x, grad_output), *((nearby(x), nearby(grad_output)) for _ in range(3))]
    eager = [output_and_gradients(layer, *call) for call in calls]
    exact = [output_and_gradients(double, *(t.double() for t in call)) for call in calls]
    accelerate(layer, backend)
    for name, result in output_and_gradients(layer, x, grad_output).items():
        (e, x64), *neighbours = [(e[name], x64[name]) for e, x64 in zip(eager, exact, strict=True)]
        factor = FORWARD_FACTOR if name == "output" else BACKWARD_FACTOR
        assert_accurate(name, result, e, x64, factor, neighbours)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("options", SMALL)
def test_whole_model(library, options, backend):
    config = small_config(img_size=64, **SMALL[options])
    model = {"timm": timm_model, "transformers": huggingface_model}[library](config)
    model = randomized(model).float().train()
    x = torch.randn(2, 3, 64, 64)

    def run():
        model.zero_grad()
        output = model(x)
        logits = getattr(output, "logits", output)
        logits.square().sum().backward()
        return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, keys = run(), list(model.state_dict())
    report = accelerate(model, backend)
    assert (len(report.replaced), report.kept, report.notes) == (sum(config["depths"]), [], [])
    assert list(model.state_dict()) == keys
    scale = max(value.abs().max() for name, value in expected.items() if name != "logits")
    for name, result in run().items():
        size = expected[name].abs().max() if name == "logits" else scale
        assert (result - expected[name]).abs().max() <= 1e-4 * size, name
    restore(model)
    for name, result in run().items():
        assert torch.equal(result, expected[name]), name


LAYOUTS = {
    "contiguous": lambda B, C, H, W: torch.randn(B, C, H, W),
    "channels_last": lambda B, C, H, W: torch.randn(B, H, W, C).permute(0, 3, 1, 2),
    "slice": lambda B, C, H, W: torch.randn(B, C, 2 * H, 2 * W)[:, :, ::2, ::2],
    "slice of channels_last": lambda B, C, H, W: torch.randn(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)[:, :, ::2, ::2],
    "permuted": lambda B, C, H, W: torch.randn(B, W, C, H).permute(0, 2, 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("form", "case"), [pair for pair in every_form("plain", "three_levels_postln") if pair[0] != "volume"]
)
def test_output_strides(form, case, memory_format, backend):
    layer = build(form, **CASES[case]).to(memory_format=memory_format)
    accelerate(layer, backend)
    for name, layout in LAYOUTS.items():
        x = layout(3, 12, 7, 6)
        check_output(layer, x if form in CHANNELS_FIRST else x.permute(0, 2, 3, 1), name)


def test_output_strides_of_a_volume(backend):
    layer = build("volume")
    accelerate(layer, backend)
    check_output(layer, example("volume"), "contiguous")
    check_output(layer, torch.randn(2, 12, 7, 4, 6).movedim(1, -1), "channels first")


def check_output(layer, x, name):
    """Values and strides are those of the layer's class."""
    y, expected = layer(x), type(layer).forward(layer, x)
    assert y.stride() == expected.stride(), name
    assert golden.relative_error(y, expected) < 1e-5, name


@pytest.mark.parametrize("form", BUILD)
def test_dropout(form, backend):
    layer, x = build(form, dropout=0.4).train(), example(form)
    torch.manual_seed(1)
    expected = layer(x)
    accelerate(layer, backend)
    torch.manual_seed(1)
    y = layer(x)
    assert torch.equal(y == 0, expected == 0) and (y == 0).any()
    assert golden.relative_error(y, expected) < 1e-5
    assert not (layer.eval()(x) == 0).any()


STORED = {
    "authors": ["gates", "modulator"],
    "volume": ["gates", "modulator"],
    "video": ["gates", "gates_temporal", "modulator", "modulator_temporal"],
    "query_context": ["gates"],
}


def stored_on(layer):
    """What a forward leaves on the layer, taken off it."""
    return {name: vars(layer).pop(name) for name in sorted(vars(layer)) if isinstance(vars(layer)[name], torch.Tensor)}


@pytest.mark.parametrize("form", STORED)
def test_gates_and_modulator_on_request(form):
    layer, x = build(form), example(form)
    layer(x)
    expected = stored_on(layer)
    assert list(expected) == STORED[form]
    assert accelerate(layer, keep_modulator=True).notes == []
    layer(x)
    kept = stored_on(layer)
    assert list(kept) == STORED[form]
    for name, value in kept.items():
        assert golden.relative_error(value, expected[name]) < 1e-5, name

    layer(x)
    assert "keep_modulator" in str(accelerate(layer))
    layer(x)
    assert stored_on(layer) == {}
    restore(layer)
    layer(x)
    assert torch.equal(layer.gates, expected["gates"])


@pytest.mark.parametrize("form", [form for form in BUILD if form not in STORED])
def test_no_gates_where_the_class_stores_none(form):
    layer = build(form)
    accelerate(layer, keep_modulator=True)
    layer(example(form))
    assert not hasattr(layer, "gates") and not hasattr(layer, "modulator")


@pytest.mark.parametrize("form", ["timm", "video", "query_context"])
def test_autocast_gives_the_dtype_of_eager(form, backend):
    layer, x = build(form, postln=True), example(form)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        accelerate(layer, backend)
        y = layer(x)
    assert y.dtype == expected.dtype
    assert golden.relative_error(y, expected) < 0.05


@pytest.mark.parametrize(("form", "layer"), [("detection", AuthorsDetection), ("detrex", DetrexLayer)])
def test_detection_takes_dropout_second(form, layer):
    """The authors' two classes differ in the order of their arguments: a layer is known by what it holds."""
    layer = layer(12, 0.25, 2, 3)
    assert accelerate(layer).replaced == [("", FORMS[form])]
    y = layer.train()(example(form, B=32))
    assert 0.2 < (y == 0).float().mean() < 0.3


def query_and_context(dtype=torch.float32):
    return torch.randn(2, 2, 12, 7, 6, dtype=dtype).unbind()


@pytest.mark.parametrize("options", [{}, {"levels": 3, "postln": True}, {"levels": 0, "bias": False}])
def test_context_from_another_map(options, backend):
    layer = build("query_context", **options)
    x, v = (t.requires_grad_() for t in query_and_context())

    def run():
        y = layer(x, v)
        names = ["output", "grad x", "grad v", *dict(layer.named_parameters())]
        return dict(zip(names, [y, *torch.autograd.grad(y.square().sum(), [x, v, *layer.parameters()])], strict=True))

    expected = run()
    accelerate(layer, backend, keep_modulator=True)
    for name, result in run().items():
        assert golden.relative_error(result, expected[name]) < 1e-5, name
    gates = layer.gates
    assert layer(x, v).stride() == expected["output"].stride()
    assert torch.equal(layer(x, v=v), layer(x, v)) and torch.equal(layer(x, None), layer(x))
    type(layer).forward(layer, x, v)
    assert golden.relative_error(gates, layer.gates) < 1e-5


def test_broadcast_context_is_left_to_the_class():
    layer = build("query_context")
    x, v = query_and_context()
    expected = layer(x, v[..., :1, :1])
    accelerate(layer)
    assert torch.equal(layer(x, v[..., :1, :1]), expected)
    with pytest.raises(TypeError, match="positional"):
        layer(x, v, x)


def test_frames_that_make_no_clip_are_left_to_the_class():
    layer = build("video")
    with pytest.raises(RuntimeError) as expected:
        layer(torch.randn(4, 7, 6, 12))
    accelerate(layer)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 7, 6, 12))
    assert str(caught.value) == str(expected.value)


def test_context_from_another_map_in_bfloat16(backend):
    layer = build("query_context").bfloat16()
    x, v = query_and_context(torch.bfloat16)
    double = copy.deepcopy(layer).double()
    calls = [(x, v), *((nearby(x), nearby(v)) for _ in range(3))]
    with torch.no_grad():
        eager, exact = [layer(*call) for call in calls], [double(*(t.double() for t in call)) for call in calls]
        accelerate(layer, backend)
        neighbours = list(zip(eager[1:], exact[1:], strict=True))
        assert_accurate("output", layer(x, v), eager[0], exact[0], FORWARD_FACTOR, neighbours)
