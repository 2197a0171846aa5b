"""PatchEmbed reads its modules' weights where they are plain, and calls them where somebody changed one."""

import pytest
import torch
import torch.nn.functional as F
from changed_parts import bound_forward, hooked
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels import _patches

C, N = 5, 12


def build(norm=True, **options):
    embed = fk.PatchEmbed(2, C, N, norm_layer=nn.LayerNorm if norm else None, **options)
    for parameter in embed.parameters():
        nn.init.normal_(parameter)
    return embed.double().eval()


def eager(embed, x):
    """The formula, with the modules called."""
    if embed.pad:
        x = F.pad(x, (0, -x.shape[3] % 2, 0, -x.shape[2] % 2))
    y = embed.proj(x).permute(0, 2, 3, 1)
    return y if embed.norm is None else embed.norm(y)


@pytest.fixture
def called(monkeypatch):
    """Calls of the op."""
    calls = []
    monkeypatch.setattr(_patches, "patch_embed", lambda *a, **k: calls.append(k["backend"]) or fk.patch_embed(*a, **k))
    return calls


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"use_conv_embed": True}, {"pad": True}], ids=str)
def test_is_the_formula(options, called):
    embed, x = build(**options), torch.randn(2, C, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(embed(x), eager(embed, x))
    assert called == ["auto"]


def replaced(part, make):
    return lambda embed: setattr(embed, part, make().double())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "hook on proj": hooked("proj"),
    "hook on norm": hooked("norm"),
    "bound forward of proj": bound_forward("proj"),
    "bound forward of norm": bound_forward("norm"),
    "another class": replaced("proj", lambda: Doubled(C, N, 2, 2)),
    "groups": replaced("proj", lambda: nn.Sequential(nn.Conv2d(C, N, 1), nn.Conv2d(N, N, 2, 2, groups=4))),
    "dilation": replaced("proj", lambda: nn.Conv2d(C, N, 2, 2, dilation=2)),
    "reflected borders": replaced("proj", lambda: nn.Conv2d(C, N, 3, 2, 1, padding_mode="reflect")),
    "padding in words": replaced("proj", lambda: nn.Conv2d(C, N, 3, 1, "same")),
    "another norm": replaced("norm", nn.Tanh),
    "no weight": replaced("norm", lambda: nn.LayerNorm(N, elementwise_affine=False)),
    "parametrised": lambda embed: nn.utils.parametrizations.weight_norm(embed.proj),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_modules_are_called(change, called):
    embed, x = build(), torch.randn(2, C, 8, 10, dtype=torch.float64)
    embed(x)
    assert called
    called.clear()
    change(embed)
    torch.testing.assert_close(embed(x), eager(embed, x))
    assert not called


def test_hooks_on_all_modules_fire():
    embed, x, seen = build(), torch.randn(2, C, 8, 10, dtype=torch.float64), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        embed(x)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.LayerNorm, fk.PatchEmbed]


def test_autocast_calls_the_modules(called):
    embed, x = build().float(), torch.randn(2, C, 8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = embed(x), eager(embed, x)
    assert not called and y.dtype == expected.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_backends_without_a_kernel(backend, called):
    """A model runs on any backend: what a GPU's has no kernel for is PyTorch's."""
    embed, x = build(), torch.randn(2, C, 8, 10, dtype=torch.float64)
    with fk.use_backend(backend):
        torch.testing.assert_close(embed(x), eager(embed, x))
    assert called == ["reference"]


def test_named_cpu(cpu_kernels, called):
    embed, x = build().float(), torch.randn(2, C, 8, 10)
    with fk.use_backend("cpu"), torch.no_grad():
        torch.testing.assert_close(embed(x), eager(embed, x), rtol=1e-4, atol=1e-4)
    assert called == ["cpu"]


def test_training_mode_calls_the_modules(called):
    """Reentrant checkpointing runs it without gradients first, and counts on the same bits with them."""
    embed, x = build().float().train(), torch.randn(2, C, 8, 10)
    with torch.no_grad():
        y = embed(x)
    assert torch.equal(y, embed(x)) and not called


def test_trains(called):
    embed, x = build(), torch.randn(2, C, 8, 10, dtype=torch.float64, requires_grad=True)
    inputs = [x, *embed.parameters()]
    found, expected = (torch.autograd.grad(f(x).square().sum(), inputs) for f in (embed, lambda x: eager(embed, x)))
    assert called
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(embed, (x[:1, :, :4, :4],))
