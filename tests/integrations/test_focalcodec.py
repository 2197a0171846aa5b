"""FocalCodec's layers and blocks, retold in short: recognised, equal, and left alone where they are something else."""

import copy
import pickle

import pytest
import torch
from ops.golden import relative_error
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.testing import assert_accurate

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same'", "ignore:a FocalCodec.* changed after accelerate:RuntimeWarning"
)


class FocalModulation(nn.Module):
    def __init__(self, dim, window=4, levels=2, factor=3, dropout=0.0, post=False, normalize=False, causal=False):
        super().__init__()
        self.dim, self.focal_level, self.use_post_norm, self.normalize_modulator = dim, levels, post, normalize
        self.causal, self.window_size, self.store_hidden = causal, 12, False
        self.in_proj = nn.Linear(dim, 2 * dim + levels + 1)
        self.context_proj = nn.Conv1d(dim, dim, 1)
        self.out_proj = nn.Linear(dim, dim)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim) if post else nn.Identity()
        kernels = [window + factor * level for level in range(levels)] + ([self.window_size] if causal else [])
        padding = 0 if causal else "same"
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, dim, k, padding=padding, groups=dim), nn.GELU()) for k in kernels
        )

    def forward(self, input, left_contexts=None):
        q, ctx, gates = self.in_proj(input).mT.split((self.dim, self.dim, self.focal_level + 1), 1)
        contexts, total = [], 0.0
        for level, layer in enumerate(self.layers):
            if self.causal:
                reach = layer[0].kernel_size[0] - 1
                if left_contexts is None:
                    ctx = nn.functional.pad(ctx, (reach, 0), mode="replicate")
                else:
                    ctx = torch.cat((left_contexts[level].mT, ctx), 2)
                contexts.append(ctx[..., -reach:].mT)
            else:
                contexts.append(None)
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        if not self.causal:
            contexts.append(None)
            total = total + self.activation(ctx.mean(2))[..., None] * gates[:, self.focal_level :]
        if self.normalize_modulator:
            total = total / (self.focal_level + 1)
        modulator = self.context_proj(total)
        if self.store_hidden:
            self.gates, self.modulator = gates, modulator
        y = (q * modulator).mT
        return self.dropout(self.out_proj(self.norm(y))), contexts


class FeedForward(nn.Module):
    def __init__(self, dim, dropout):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.out_proj(self.dropout(self.activation(self.in_proj(x)))))


class FocalBlock(nn.Module):
    def __init__(self, dim, dropout=0.0, post=False, scale=False, normalize=False, causal=False):
        super().__init__()
        self.use_post_norm, self.use_layerscale, self.causal = post, scale, causal
        self.modulation_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.modulation = FocalModulation(dim, dropout=dropout, post=post, normalize=normalize, causal=causal)
        self.feed_forward = FeedForward(dim, dropout)
        gammas = (nn.Parameter(torch.rand(dim)) for _ in range(2)) if scale else (1.0, 1.0)
        self.modulation_gamma, self.feed_forward_gamma = gammas

    def forward(self, input, left_contexts=None):
        y = input if self.use_post_norm else self.modulation_norm(input)
        y, left_contexts = self.modulation(y, left_contexts)
        if self.use_post_norm:
            y = self.modulation_norm(y)
        if self.use_layerscale:
            y *= self.modulation_gamma
        y += input
        z = self.feed_forward(y if self.use_post_norm else self.feed_forward_norm(y))
        if self.use_post_norm:
            z = self.feed_forward_norm(z)
        if self.use_layerscale:
            z *= self.feed_forward_gamma
        z += y
        return z, left_contexts


MAKE = {"layer": (FocalModulation, "FocalCodec"), "block": (FocalBlock, "FocalCodec's block")}
OPTIONS = [
    ("layer", {}),
    ("layer", {"window": 14, "factor": 4, "post": True, "normalize": True}),
    ("layer", {"window": 3, "levels": 3, "factor": 2}),
    ("block", {}),
    ("block", {"post": True, "scale": True, "normalize": True}),
]
either = pytest.mark.parametrize("which", MAKE)


def build(which, seed, dim=40, **options):
    torch.manual_seed(seed)
    module = MAKE[which][0](dim, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return module


def accelerated(module, which, backend=None):
    report = fk.accelerate(module, backend)
    found = report.replaced if which == "layer" else report.blocks
    assert found == [("", MAKE[which][1])] and not report.kept and not report.kept_blocks, report
    return module


def answers(module, x):
    x = x.clone().requires_grad_()
    y, contexts = module(x)
    assert contexts == [None] * len(contexts)
    grad_y = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad_y)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which, options", OPTIONS)
def test_computes_what_its_class_does(which, options, dtype, backend, cpu_kernels, seed):
    module = build(which, seed, **options).to(dtype)
    x = torch.randn(2, 37, 40).to(dtype)
    expected, exact = answers(module, x), answers(copy.deepcopy(module).double(), x.double())
    nearby = [x * (1 + torch.rand_like(x) / 64) for _ in range(3)]
    double = copy.deepcopy(module).double()
    others = [(answers(module, z), answers(double, z.double())) for z in nearby]
    contexts = module(x)[1]
    accelerated(module, which, backend)
    assert module(x)[1] == contexts
    for i, (ours, eager, value) in enumerate(zip(answers(module, x), expected, exact, strict=True)):
        assert ours.dtype == eager.dtype
        neighbours = [(e[i], v[i]) for e, v in others]
        assert_accurate(f"result {i}", ours, eager, value, 3 if i else 2, neighbours)
    with torch.no_grad():
        assert_accurate("inference", module(x)[0], expected[0], exact[0], 2, [(e[0], v[0]) for e, v in others])


@either
def test_the_causal_form_is_its_class_s(which, seed):
    module, x = build(which, seed, causal=True), torch.randn(2, 37, 40)
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        report = fk.accelerate(module)
    assert "its causal form repeats what was first on the left" in report.kept[0][1]
    y, contexts = module(x)
    assert module(x, contexts)[0].shape == y.shape and "forward" not in vars(module)


@either
def test_flags_that_change_later(which, seed):
    """`store_hidden`, and a block's `use_layerscale`."""
    module, x = build(which, seed, **({"scale": True} if which == "block" else {})), torch.randn(2, 37, 40)
    layer = module if which == "layer" else module.modulation
    accelerated(module, which)
    layer.store_hidden = True
    expected = type(module).forward(module, x)[0]
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert layer.gates.shape == (2, 3, 37) and layer.modulator.shape == (2, 40, 37)
    with pytest.warns(RuntimeWarning, match="nothing was replaced"):
        report = fk.accelerate(module)
    assert "store_hidden is on" in report.kept[0][1]
    if which == "block":
        layer.store_hidden = False
        accelerated(module, which)
        module.use_layerscale = False
        torch.testing.assert_close(module(x)[0], type(module).forward(module, x)[0], rtol=1e-4, atol=1e-5)
        module.use_layerscale = True
        torch.testing.assert_close(module(x)[0], type(module).forward(module, x)[0], rtol=1e-4, atol=1e-5)


@either
def test_calls_of_any_form(which, seed):
    module, x = build(which, seed), torch.randn(2, 37, 40)
    calls = [((x,), {}), ((x, None), {}), ((), {"input": x}), ((x,), {"left_contexts": None}), ((x, [None] * 3), {})]
    expected = [module(*args, **kwargs)[0] for args, kwargs in calls]
    accelerated(module, which)
    for (args, kwargs), y in zip(calls, expected, strict=True):
        torch.testing.assert_close(module(*args, **kwargs)[0], y, rtol=1e-4, atol=1e-5)


@either
def test_steps_back_from_hooks(which, seed):
    module, x = build(which, seed), torch.randn(2, 37, 40)
    expected = module(x)[0]
    accelerated(module, which)
    layer = module if which == "layer" else module.modulation
    seen = []
    layer.layers[1][0].register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(module(x)[0], expected) or which == "block"
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


@either
def test_restored_copied_and_pickled(which, seed):
    module, x = build(which, seed), torch.randn(2, 37, 40)
    expected, keys = module(x)[0], list(module.state_dict())
    accelerated(module, which)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x))
        other.double()
        assert other(x.double())[0].dtype == torch.float64
    assert list(module.state_dict()) == keys
    fk.restore(module)
    assert torch.equal(module(x)[0], expected)


@either
def test_dropout_and_autocast(which, seed):
    """Dropout of a block is its class's business; its in-place sums answer in autocast's dtype, and so it runs then."""
    module, x = build(which, seed, dropout=0.5), torch.randn(2, 37, 40)
    module.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)[0]
    accelerated(module, which)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_error(found.float(), expected.float()) < 0.02
    module.train()
    torch.manual_seed(3)
    y = module(x)[0]
    torch.manual_seed(3)
    fk.restore(module)
    torch.testing.assert_close(y, module(x)[0], rtol=1e-4, atol=1e-4)


@either
def test_trains_compiled(which, seed):
    module, x = build(which, seed, normalize=True), torch.randn(2, 37, 40)
    accelerated(module, which)
    expected = answers(module, x)
    torch._dynamo.reset()
    for one, other in zip(answers(torch.compile(module, fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
