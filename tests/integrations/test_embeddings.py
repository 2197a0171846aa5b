"""Accelerated patch embeddings: what their classes compute, in the op where it helps; and when they step back."""

import copy
import io
import pickle

import pytest
import torch
from changed_parts import bound_forward, hooked
from models.foreign import huggingface_model, small_config, timm_model
from ops.golden import relative_error
from timm.layers import LayerNorm2d, PatchEmbed
from timm.layers.norm import LayerNorm2dFp32
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels import _patches
from focalnet_kernels.integrations import patch_official, patch_timm, patch_transformers
from integrations import foreign_embeddings, foreign_layers
from integrations.foreign_embeddings import FORMS, AuthorsPatchEmbed, DetectionPatchEmbed, build

pytestmark = pytest.mark.filterwarnings("ignore:a .* patch embedding.* changed after accelerate:RuntimeWarning")
for_every_form = pytest.mark.parametrize("form", FORMS)
C, N = 5, 12
MODELS = {"timm": (patch_timm, timm_model), "transformers": (patch_transformers, huggingface_model)}


@pytest.fixture
def called(monkeypatch):
    """The backends of the op's calls."""
    calls = []
    monkeypatch.setattr(_patches, "patch_embed", lambda *a, **k: calls.append(k["backend"]) or fk.patch_embed(*a, **k))
    return calls


def with_a_layer(*embeddings):
    """A model that is a FocalNet by its layer."""
    return nn.ModuleList([foreign_layers.build("timm"), *embeddings])


def accelerate(*embeddings, **options):
    return fk.accelerate(with_a_layer(*embeddings), **options)


def eager(embed, x):
    return type(embed).forward(embed, x)


def tensor(y):
    return y[0] if isinstance(y, tuple) else y


def strides(y):
    """Of the axes where they count."""
    return [stride for size, stride in zip(y.shape, y.stride(), strict=True) if size > 1]


def sizes(y):
    return y[1:] if isinstance(y, tuple) else ()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("size", [(16, 8), (17, 10), (13, 19)], ids=str)
@pytest.mark.parametrize("stem", [False, True], ids=["merge", "stem"])
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
@for_every_form
def test_computes_what_its_class_does(form, norm, overlap, stem, size, dtype, tolerance, called):
    embed, given = build(form, C, N, norm, overlap, stem).to(dtype), torch.randn(2, C, *size, dtype=dtype)
    assert accelerate(embed).embeddings == [("1", FORMS[form])]
    called.clear()  # of comparing
    for x in (given, given.contiguous(memory_format=torch.channels_last), given[:1], given[:0], given[..., 1:]):
        with torch.no_grad():
            found, expected = embed(x), eager(embed, x)
        assert called.pop() == "auto" and not called
        assert type(found) is type(expected) and sizes(found) == sizes(expected)
        found, expected = tensor(found), tensor(expected)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if norm and x.numel():
            assert strides(found) == strides(expected)
        assert (found.movedim(1, -1) if found.ndim == 4 else found).is_contiguous()
        assert not x.numel() or relative_error(found, expected) < tolerance


@for_every_form
def test_named_backends(form, called, cpu_kernels):
    embed, x = build(form), torch.randn(2, C, 9, 7)
    for backend, expected in {"cpu": "cpu", "reference": "reference", "triton": "reference", None: "auto"}.items():
        accelerate(embed, backend=backend)
        called.clear()
        with torch.no_grad():
            assert relative_error(tensor(embed(x)), tensor(eager(embed, x))) < 1e-5
        assert called == [expected]


@for_every_form
def test_training_is_the_class_s(form, called):
    embed = build(form).double().train()
    accelerate(embed)
    called.clear()
    x = torch.randn(2, C, 9, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *embed.parameters()]
    found, expected = (torch.autograd.grad(tensor(y).square().sum(), inputs) for y in (embed(x), eager(embed, x)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) and not called
    with torch.no_grad():
        assert torch.equal(tensor(embed(x)), tensor(eager(embed, x)))  # checkpointing computes it again with gradients
    embed.eval().requires_grad_(False)
    embed(x)
    assert not called
    embed(x.detach())  # frozen: nobody asks for a gradient
    assert called == ["auto"]


@for_every_form
def test_the_result_is_no_view(form):
    """As with its class it may be changed in place later, where gradients are on again."""
    embed = build(form)
    accelerate(embed)
    with torch.no_grad():
        y = tensor(embed(torch.randn(2, C, 9, 7)))
    assert not y._is_view()
    y += torch.ones_like(y, requires_grad=True)


def replaced(part, make):
    def change(embed):
        torch.manual_seed(1)
        setattr(embed, "projection" if part == "proj" and hasattr(embed, "projection") else part, make().double())

    return change


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledNorm2d(LayerNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "hook on norm": hooked("norm"),
    "bound forward of norm": bound_forward("norm"),
    "another class": replaced("proj", lambda: Doubled(C, N, 2, 2)),
    "wider": replaced("proj", lambda: nn.Conv2d(C, 2 * N, 2, 2)),
    "more channels": replaced("proj", lambda: nn.Conv2d(C + 1, N, 2, 2)),
    "another kernel": replaced("proj", lambda: nn.Conv2d(C, N, 3, 2, 1)),
    "groups": replaced("proj", lambda: nn.Sequential(nn.Conv2d(C, N, 1), nn.Conv2d(N, N, 2, 2, groups=4))),
    "dilation": replaced("proj", lambda: nn.Conv2d(C, N, 2, 2, dilation=2)),
    "reflected borders": replaced("proj", lambda: nn.Conv2d(C, N, 3, 2, 1, padding_mode="reflect")),
    "padding in words": replaced("proj", lambda: nn.Conv2d(C, N, 3, 1, "same")),
    "another activation": replaced("norm", nn.Tanh),
    "no norm": replaced("norm", nn.Identity),
    "LayerNorm": replaced("norm", lambda: nn.LayerNorm(N)),
    "LayerNorm2d": replaced("norm", lambda: LayerNorm2d(N)),
    "LayerNorm of more": replaced("norm", lambda: DoubledNorm(N)),
    "LayerNorm2d of more": replaced("norm", lambda: DoubledNorm2d(N)),
    "no weight": replaced("norm", lambda: nn.LayerNorm(N, elementwise_affine=False)),
    "eps": lambda embed: setattr(embed.norm, "eps", 1.0),
    "parametrised": lambda embed: nn.utils.parametrizations.weight_norm(
        embed.projection if hasattr(embed, "projection") else embed.proj
    ),
    "patches' size": lambda embed: setattr(embed, "patch_size", (4, 7)),
    "number of channels": lambda embed: setattr(embed, "num_channels", C + 1),
}


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@for_every_form
def test_changed_parts_act(form, change, when):
    """Whatever somebody does to a part, also where the class then refuses."""
    embed, x = build(form).double(), torch.randn(2, C, 2 * N, 2 * N, dtype=torch.float64)  # N tokens per row, too
    if when == "before":
        change(embed)
    accelerate(embed)
    with torch.no_grad():
        if when == "after a call":
            embed(x)
        if when != "before":
            change(embed)
        for _ in range(2):
            try:
                expected = eager(embed, x)
            except Exception as error:
                with pytest.raises(type(error)) as raised:
                    embed(x)
                assert str(raised.value) == str(error)
                continue
            found = embed(x)
            assert sizes(found) == sizes(expected)
            assert relative_error(tensor(found), tensor(expected)) < 1e-12


@pytest.mark.parametrize("part", ["proj", "norm"])
def test_hooks_fire_and_the_user_is_told(part, called):
    embed, x = build("timm"), torch.randn(2, C, 8, 8)
    accelerate(embed)
    called.clear()
    handle = hooked(part)(embed)
    with torch.no_grad():
        assert torch.equal(embed(x), eager(embed, x)) and not called
        handle.remove()
        embed(x)
    assert called


@pytest.mark.parametrize("form", ["timm", "authors", "detection"])
def test_a_norm_that_is_put_in_acts(form, called):
    embed, x = build(form, norm=False), torch.randn(2, C, 2 * N, 2 * N)
    accelerate(embed)
    called.clear()
    with torch.no_grad():
        before = tensor(embed(x))
        assert called.pop()
        embed.norm = nn.LayerNorm(N)
        nn.init.normal_(embed.norm.weight)
        found, expected = tensor(embed(x)), tensor(eager(embed, x))
        assert torch.equal(found, expected) and not torch.allclose(found, before) and not called
        embed.norm = nn.Identity()
        embed.norm.register_forward_hook(lambda module, args, y: 2 * y)
        assert torch.equal(tensor(embed(x)), tensor(eager(embed, x))) and not called


@pytest.mark.parametrize("shape", [(2, C + 1, 8, 8), (2, C, 1, 8), (C, 8, 8), (8, 8)], ids=str)
@for_every_form
def test_refusals_are_the_class_s(form, shape):
    embed, x = build(form), torch.randn(shape)
    accelerate(embed)
    with torch.no_grad():
        try:
            expected = tensor(eager(embed, x))
        except Exception as error:
            with pytest.raises(type(error)) as raised:
                embed(x)
            assert str(raised.value) == str(error)
        else:
            assert relative_error(tensor(embed(x)), expected) < 1e-5


@for_every_form
def test_autocast_and_transforms_are_the_class_s(form, called):
    embed, x = build(form).requires_grad_(False), torch.randn(2, C, 9, 8)
    accelerate(embed)
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = tensor(embed(x)), tensor(eager(embed, x))
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    found, expected = (
        torch.func.vmap(lambda x, f=f: tensor(f(x[None]))[0])(x) for f in (embed, lambda x: eager(embed, x))
    )
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found, expected = (torch.autograd.forward_ad.unpack_dual(tensor(y)) for y in (embed(dual), eager(embed, dual)))
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert not called


@for_every_form
def test_what_leaves_the_process_is_the_class_s(form, called):
    embed, x = build(form).requires_grad_(False), torch.randn(2, C, 9, 8)
    accelerate(embed)
    called.clear()
    traced = torch.jit.trace(embed, x, check_trace=False)  # the check would run the embedding itself
    program = torch.export.export(embed, (x,))
    assert not called and "focalnet_kernels" not in f"{program.graph}{traced.graph}"
    expected = tensor(eager(embed, x))
    for y in (traced(x), program.module()(x)):
        assert relative_error(tensor(y), expected) < 1e-5
    if form != "transformers":  # which cannot be scripted
        assert relative_error(tensor(torch.jit.script(embed)(x)), expected) < 1e-5


@for_every_form
def test_compiled(form, called):
    torch.compiler.reset()
    embed = build(form)
    accelerate(embed)
    called.clear()
    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for x in (torch.randn(2, C, 9, 8), torch.randn(3, C, 11, 10)):
            found, expected = compiled(x), eager(embed, x)
            assert sizes(found) == sizes(expected) and relative_error(tensor(found), tensor(expected)) < 1e-5
    assert called


def test_layers_alone_and_modulators(called):
    embed, x = build("authors"), torch.randn(2, C, 8, 8)
    model = with_a_layer(embed)
    assert fk.accelerate(model, keep_modulator=True).embeddings
    report = fk.accelerate(model, level="layer")
    assert report.replaced and not report.embeddings and "forward" not in vars(embed)
    called.clear()
    with torch.no_grad():
        embed(x)
    assert not called


@for_every_form
def test_restored_and_copied(form, called):
    embed, x = build(form), torch.randn(2, C, 9, 8)
    model = with_a_layer(embed)
    with torch.no_grad():
        expected = tensor(embed(x))
        first = fk.accelerate(model)
        assert fk.accelerate(model) == first
        twins = [copy.deepcopy(embed), copy.copy(embed), pickle.loads(pickle.dumps(embed))]
        buffer = io.BytesIO()
        torch.save(embed, buffer)
        buffer.seek(0)
        twins.append(torch.load(buffer, weights_only=False))
        called.clear()
        for i, twin in enumerate(twins):
            torch.testing.assert_close(tensor(twin(x)), expected, rtol=1e-4, atol=1e-4)
            assert len(called) == i + 1 and vars(twin)["forward"].module is twin
        fk.restore(model)
        assert not [module for module in model.modules() if "forward" in vars(module)]
        assert torch.equal(tensor(embed(x)), expected)


class Halved(AuthorsPatchEmbed):
    def forward(self, x):
        x, H, W = super().forward(x)
        return 0.5 * x, H, W


class Transposed(AuthorsPatchEmbed):
    def forward(self, x):
        x, H, W = super().forward(x)
        return x, W, H


class Listed(AuthorsPatchEmbed):
    def forward(self, x):
        return list(super().forward(x))


class TokensAlone(AuthorsPatchEmbed):
    def forward(self, x):
        return super().forward(x)[0]


class KeepsItsSize(AuthorsPatchEmbed):
    """Which somebody may read there."""

    def forward(self, x):
        x, self.H, self.W = super().forward(x)
        return x, self.H, self.W


class PadsAlways(DetectionPatchEmbed):
    def forward(self, x):
        height, width = (step - n % step for n, step in zip(x.shape[2:], self.patch_size, strict=True))
        return super().forward(nn.functional.pad(x, (0, width, 0, height)))


class PadsInFront(DetectionPatchEmbed):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (-x.shape[3] % 2, 0, -x.shape[2] % 2, 0)))


class NoiseInTraining(AuthorsPatchEmbed):
    def forward(self, x):
        x, H, W = super().forward(x)
        return x + self.training, H, W


class Positioned(AuthorsPatchEmbed):
    def __init__(self, *args):
        super().__init__(*args)
        self.position = nn.Parameter(torch.zeros(self.embed_dim))

    def forward(self, x):
        x, H, W = super().forward(x)
        return x + self.position, H, W


class PositionedByABuffer(AuthorsPatchEmbed):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("position", torch.zeros(()))

    def forward(self, x):
        return super().forward(x + self.position)


LOOK_ALIKES = [
    *(
        cls((2, 2), C, N, False, nn.LayerNorm)
        for cls in (
            Halved, Transposed, Listed, TokensAlone, KeepsItsSize, PadsAlways, PadsInFront, NoiseInTraining, Positioned,
            PositionedByABuffer,
        )
    ),
    AuthorsPatchEmbed((2, 2), C, N, norm_layer=nn.BatchNorm1d),
    AuthorsPatchEmbed((2, 2), C, N, norm_layer=DoubledNorm),
    foreign_embeddings.Downsample(C, N, 2, norm_layer=LayerNorm2dFp32),
    foreign_embeddings.Downsample(C, N, 2, norm_layer=nn.BatchNorm2d),
    PatchEmbed(8, 2, C, N),  # a vision transformer's
    fk.PatchEmbed(2, C, N, norm_layer=nn.LayerNorm),
]  # fmt: skip


@pytest.mark.parametrize("embed", LOOK_ALIKES, ids=lambda embed: f"{type(embed).__name__} {type(embed.norm).__name__}")
def test_look_alikes_are_left_alone_without_a_word(embed):
    report = accelerate(embed)
    assert report.replaced and not report.embeddings and "forward" not in vars(embed)
    assert str(report).count("\n") == 1  # the layer's


def test_models_without_layers_are_left_alone():
    embed = build("timm")
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        assert not fk.accelerate(nn.Sequential(embed)).embeddings
    assert "forward" not in vars(embed)


def test_a_forward_of_its_own_is_left_alone():
    embed = build("timm")
    embed.forward = lambda x: x
    assert not accelerate(embed).embeddings and embed(1) == 1


@pytest.mark.parametrize("options", [{}, {"use_conv_embed": True}], ids=["apart", "overlapping"])
@pytest.mark.parametrize("library", MODELS)
def test_whole_models(library, options, called):
    patch, build_model = MODELS[library]
    config, x = small_config(**options), torch.randn(2, 3, 45, 58)
    torch.manual_seed(3)
    plain = build_model(config)
    expected = getattr(plain(x), "logits", plain(x))
    torch.manual_seed(3)
    with patch():
        patched = build_model(config)
    model = copy.deepcopy(plain)
    report = fk.accelerate(model)
    assert [form for _, form in report.embeddings] == 3 * [FORMS[library]]
    assert "3 patch embeddings accelerated" in str(report)
    for m in (model, patched):
        called.clear()
        with torch.no_grad():
            y = m(x)
        assert relative_error(getattr(y, "logits", y), expected) < 1e-5
        assert called == 3 * ["auto"]


def test_embeddings_of_a_module_that_is_given(called):
    with patch_official(foreign_layers), pytest.raises(ValueError, match="focal_layers"):
        patch_official(foreign_embeddings)
    foreign_embeddings.Layer = foreign_layers.AuthorsClassification
    try:
        with patch_official(foreign_embeddings):
            embeddings = [build("authors"), build("detection")]
        with patch_official(foreign_embeddings, level="layer"):
            plain = build("authors")
    finally:
        del foreign_embeddings.Layer
    called.clear()
    with torch.no_grad():
        for embed in embeddings:
            embed(torch.randn(1, C, 8, 8))
    assert len(called) == 2 and "forward" not in vars(plain)
