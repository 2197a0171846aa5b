"""What is left alone, and the reason that is given."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from focalnet_kernels.integrations import accelerate
from integrations import foreign_layers, look_alikes
from integrations.foreign_layers import BUILD, build, example

DIFFERENT = "its forward computes something else"


def refusal(layer, x=None):
    """The reason, after making sure that the layer is as it was."""
    x = example("detection") if x is None else x
    before = layer.eval()(x)
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        report = accelerate(layer)
    assert "forward" not in vars(layer)
    assert torch.equal(layer(x), before)
    ((name, reason),) = report.kept
    assert name == "" and report.replaced == []
    return reason


FAILS = "its forward fails on input for the {} form"
OTHER = "not a known form: nearest is"


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("SigmoidGates", (12,), DIFFERENT),
        ("ParallelLevels", (12,), DIFFERENT),
        ("NoiseInTraining", (12,), DIFFERENT),
        ("KeepsItsSize", (12,), "its forward also stores height on the module"),
        ("FocalModulation", (12,), DIFFERENT),
        ("BatchNormLevels", (12,), "focal_layers[0][1] is a BatchNorm2d"),
        ("ParallelVolume", (12, 3, 2), FAILS.format("3-D volumes")),
        ("CausalSpeech", (12,), OTHER),
        ("FocalModulation1d", (12,), OTHER),
        ("ScrambledSigmoid", (12, 3, 2), FAILS.format("authors' classification")),
        ("FocalNetModulation", (12,), OTHER),
        ("FocalModulate", (12,), OTHER),
    ],
)
def test_look_alikes(name, arguments, reason):
    layer = getattr(look_alikes, name)(*arguments)
    assert reason in refusal(layer, look_alikes.layout(layer))


def test_post_norm_of_yolo_forks():
    """Right only where the map is as wide as it has channels, and then not the formula."""
    layer = build("yolo", postln=True)
    assert "the width, for channels" in refusal(layer, torch.randn(2, 12, 5, 12))


@pytest.mark.parametrize(
    ("form", "spoil", "reason"),
    [
        ("query_context", lambda layer: setattr(layer, "q", nn.Identity()), "q is a Identity"),
        ("query_context", lambda layer: setattr(layer, "q", nn.Linear(12, 12, bias=False)), "as f, bias=True"),
        ("query_context", lambda layer: layer.q.register_forward_hook(lambda *a: None), "q has hooks"),
        (
            "video",
            lambda layer: layer.focal_layers_temporal[1][0].register_forward_hook(lambda *a: None),
            "focal_layers_temporal.1.0 has hooks",
        ),
        ("video", lambda layer: setattr(layer, "f_temporal", Wrapped(12, 15)), "f_temporal is a Wrapped"),
        ("volume", lambda layer: setattr(layer.h, "groups", 3), "h is not a plain 1x1 convolution"),
        ("yolo", lambda layer: setattr(layer, "f_linear", nn.Linear(12, 27)), "f is a Linear, expected a Conv2d"),
    ],
)
def test_changed_parts_of_further_forms(form, spoil, reason):
    layer = build(form)
    spoil(layer)
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        report = accelerate(layer)
    assert reason in report.kept[0][1] and "forward" not in vars(layer)


def test_verdicts_are_not_shared_among_configurations():
    """One class, two formulas, told apart by an attribute that we know nothing of."""

    class Scaled(foreign_layers.AuthorsDetection):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = nn.ModuleList([Scaled(8), Scaled(8)])
    model[1].scale = 2.0
    report = accelerate(model)
    assert [name for name, _ in report.replaced] == ["0"]
    assert [name for name, _ in report.kept] == ["1"]


def _replace(path, new):
    def spoil(layer):
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, new())

    return spoil


def _conv(k=3, **options):
    return lambda: nn.Conv2d(12, 12, k, **{"padding": k // 2, "groups": 12, "bias": False} | options)


class Wrapped(nn.Linear):
    """As a LoRA or quantized layer would be."""


SPOILED = {
    "wrapped": (_replace("f", lambda: Wrapped(12, 27)), "f is a Wrapped"),
    "channels": (_replace("proj", lambda: nn.Linear(12, 9)), "proj has 9 output and 12 input channels, expected 12"),
    "activation": (_replace("act", nn.SiLU), "act is a SiLU"),
    "tanh": (_replace("act", lambda: nn.GELU("tanh")), "expected the exact GELU"),
    "tanh level": (_replace("focal_layers.1.1", lambda: nn.GELU("tanh")), "focal_layers[1][1] is GELU"),
    "dense": (_replace("focal_layers.0.0", _conv(groups=1)), "not depthwise over 12 channels"),
    "dilation": (_replace("focal_layers.0.0", _conv(dilation=2, padding=2)), "dilation 1"),
    "padding": (_replace("focal_layers.0.0", _conv(padding_mode="reflect")), "zero padding"),
    "level": (_replace("focal_layers.0", lambda: nn.Sequential(_conv()())), "not Sequential(Conv2d, GELU)"),
    "layer norm": (_replace("ln", lambda: nn.LayerNorm(12, elementwise_affine=False)), "expected an affine"),
    "norm": (_replace("ln", lambda: nn.RMSNorm(12)), "norm is a RMSNorm"),
    "parameter": (lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))), "parameter scale"),
    "buffer": (lambda layer: layer.register_buffer("scale", torch.ones(1)), "buffer scale"),
    "member": (_replace("extra", nn.ReLU), "extra (ReLU) is no part of the form"),
    "parametrized": (lambda layer: parametrizations.weight_norm(layer.f), "f is a ParametrizedLinear"),
    "hook": (lambda layer: layer.h.register_forward_hook(lambda *a: None), "h has hooks"),
    "pre-hook": (
        lambda layer: layer.focal_layers[1][0].register_forward_pre_hook(lambda *a: None),
        "focal_layers[1][0] has hooks",
    ),
    "backward hook": (lambda layer: layer.proj.register_full_backward_hook(lambda *a: None), "proj has hooks"),
    "old weight norm": (lambda layer: nn.utils.weight_norm(layer.f), "f has hooks"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SPOILED)
def test_changed_parts(name):
    spoil, reason = SPOILED[name]
    layer = build("detection", postln=True)
    spoil(layer)
    assert reason in refusal(layer)


@pytest.mark.parametrize("make", [lambda: look_alikes.FocalModulateAsAuthors(12), lambda: build("detection")])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_levels_with_biases_and_even_kernels_are_taken(make):
    layer, x = make(), torch.randn(2, 6, 5, 12)
    _replace("focal_layers.1.0", _conv(4, padding="same", bias=True))(layer)
    expected = layer(x)
    assert len(accelerate(layer).replaced) == 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_even_kernel():
    layer = build("timm")
    layer.focal_layers[0][0] = nn.Conv2d(12, 12, 4, padding=2, groups=12, bias=False)
    with pytest.warns(RuntimeWarning):
        report = accelerate(layer)
    assert "even kernel (4, 4)" in report.kept[0][1]


def test_forward_bound_by_others():
    layer = build("timm")
    layer.forward = lambda x: x
    with pytest.warns(RuntimeWarning):
        report = accelerate(layer)
    assert "already bound to something else" in report.kept[0][1]
    assert layer(1) == 1


def test_unknown_class_of_that_name():
    class SpatioTemporalFocalModulation(nn.Module):
        f = h = None

    with pytest.warns(RuntimeWarning):
        report = accelerate(nn.Sequential(SpatioTemporalFocalModulation()))
    ((name, reason),) = report.kept
    assert name == "0" and reason.startswith("not a known form: nearest is") and "focal_layers" in reason


def test_a_forward_that_fails_is_left_alone():
    class Broken(foreign_layers.AuthorsDetection):
        def forward(self, x):
            raise KeyError("only on Tuesdays")

    with pytest.warns(RuntimeWarning):
        report = accelerate(Broken(8))
    reason = "its forward fails on input for the authors' detection and segmentation form: KeyError: 'only on Tuesdays'"
    assert report.kept == [("", reason)]


@pytest.mark.parametrize(("form", "norm"), [("detection", "ln"), ("timm", "norm")])
def test_a_norm_under_another_name(form, norm):
    layer = build(form, postln=True)
    layer.other, _ = getattr(layer, norm), delattr(layer, norm)
    with pytest.warns(RuntimeWarning):
        report = accelerate(layer)
    assert report.replaced == [] and len(report.kept) == 1


def test_further_side_effects():
    class Storing(foreign_layers.AuthorsDetection):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    assert "also stores seen" in refusal(Storing(12))


@pytest.mark.parametrize(
    "form", [form for form in BUILD if form not in ("detrex", "scaled")]
)  # the authors', to a warning
def test_changed_after_acceleration(form):
    """Wrapped or hooked later: the layer's own forward runs, and says so once."""
    layer, x = build(form), example(form)
    accelerate(layer)
    seen = []
    conv = layer.focal_layers[0][0]
    conv.register_forward_hook(lambda module, args, output: seen.append(module))
    with pytest.warns(RuntimeWarning, match=r"changed after accelerate\(\).*focal_layers\[0\]\[0\] has hooks"):
        layer(x)
    layer(x)
    assert seen == [conv, conv]


def test_another_dtype_in_autocast():
    """In float64, where layers are compared, nobody sees it."""

    class InFloat(foreign_layers.AuthorsDetection):
        def forward(self, x):
            return super().forward(x).to(x.dtype)

    assert "answers with torch.float32 in autocast, ours with torch.bfloat16" in refusal(InFloat(12))


@pytest.mark.parametrize("fails", [False, True])
def test_compared_on_one_thread(fails):
    """Threads that share a core wait at every barrier for one another."""
    seen = []

    class Counting(foreign_layers.AuthorsDetection):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            if fails:
                raise KeyError
            return super().forward(x)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            accelerate(Counting(8))
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
