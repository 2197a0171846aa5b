"""Accelerated blocks: what their classes compute, drop path's numbers too; and when they step back."""

import copy
import io
import itertools
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from changed_parts import bound_forward, hooked
from ops.golden import relative_error
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.functional import focal_block
from focalnet_kernels.testing import assert_accurate
from integrations.foreign_blocks import FORMS, AuthorsBlock, build, example
from integrations.foreign_layers import AuthorsClassification

pytestmark = pytest.mark.filterwarnings("ignore:a .* block changed after accelerate:RuntimeWarning")
OPTIONS = {
    "plain": {},
    "post": {"postln": True},
    "scaled": {"scale": True, "drop_path": 0.5},
    "all": {"postln": True, "scale": True, "drop_path": 0.5},
}
for_every_form = pytest.mark.parametrize("form", FORMS)


def answers(block, args, training=False):
    """The output and all gradients, drop path drawn from one seed; and the next random number."""
    block.train(training)
    x = args[0].clone().requires_grad_()
    torch.manual_seed(5)
    y = block(x, *args[1:])
    following = torch.rand(1)
    inputs = [x, *block.parameters()]
    return y, *torch.autograd.grad(y, inputs, torch.linspace(0, 1, y.numel()).reshape(y.shape).to(y)), following


def twin_of(block):
    """A copy, without the activations that the authors' layer keeps."""
    for name in ("gates", "modulator", "gates_temporal", "modulator_temporal"):
        vars(block.modulation).pop(name, None)
    return copy.deepcopy(block)


def is_fused(block, monkeypatch):
    """Whether a call of the block goes through the op of both branches, or of its MLP branch."""
    called = []
    for op in (focal_block, fk.mlp_branch):
        monkeypatch.setattr(
            f"focalnet_kernels._blocks.{op.__name__}", lambda *a, op=op, **k: called.append(1) or op(*a, **k)
        )
    return called


@for_every_form
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_computes_what_its_class_does(form, options, training, monkeypatch):
    block, args = build(form, **options), example(form)
    expected = answers(block, args, training)
    exact = answers(twin_of(block).double(), (args[0].double(), *args[1:]), training)
    report = fk.accelerate(block)
    assert [found for _, found in report.blocks] == [FORMS[form]] and not report.kept_blocks, report
    called = is_fused(block, monkeypatch)
    found = answers(block, args, training)
    assert called
    assert torch.equal(found[-1], expected[-1]), "another number of random numbers was drawn"
    for i, (ours, eager, value) in enumerate(zip(found[:-1], expected[:-1], exact[:-1], strict=True)):
        assert ours.stride() == eager.stride() or i > 0
        assert not ours._is_view() or i > 0
        assert_accurate(f"result {i}", ours, eager, value, 3 if i else 2)


@for_every_form
def test_drop_path_draws_in_the_same_order(form):
    """Of many samples, those that the class drops."""
    block = build(form, drop_path=0.5)
    args = example(form)
    args = (args[0].repeat(16, *[1] * (args[0].ndim - 1)), *args[1:])
    expected = answers(block, args, True)[0]
    fk.accelerate(block)
    torch.testing.assert_close(answers(block, args, True)[0], expected, rtol=1e-4, atol=1e-4)


@for_every_form
def test_hidden_values_are_kept_where_asked(form, cpu_kernels):
    block, args = build(form), example(form)
    sizes, gradients = [], []
    for keep_hidden in (False, True):
        fk.accelerate(block, "cpu", keep_hidden=keep_hidden)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            y = block(*args)
        sizes.append(sum(kept))
        gradients.append(torch.autograd.grad(y.square().sum(), list(block.parameters())))
    assert sizes[1] - sizes[0] == 4 * args[0].numel()
    torch.testing.assert_close(*gradients)
    assert copy.deepcopy(block).forward.adapter.keep_hidden and pickle.loads(pickle.dumps(block)) is not block


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """As adapters wrap a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean()


def replaced(parent, name, make):
    def change(block):
        owner = block.get_submodule(parent) if parent else block
        setattr(owner, name, make(getattr(owner, name)).double())

    return change


CHANGES = {
    "hook on norm1": hooked("norm1"),
    "hook on the layer": hooked("modulation"),
    "hook on a level": hooked("modulation.focal_layers.0"),
    "hook on norm2": hooked("norm2"),
    "hook on mlp": hooked("mlp"),
    "hook on fc1": hooked("mlp.fc1"),
    "hook on fc2": hooked("mlp.fc2"),
    "hook on act": hooked("mlp.act"),
    "hook on drop_path": hooked("drop_path"),
    "wrapped fc1": replaced("mlp", "fc1", Wrapped),
    "wrapped fc2": replaced("mlp", "fc2", Wrapped),
    "wrapped f": replaced("modulation", "f", Wrapped),
    "wrapped mlp": replaced("", "mlp", Wrapped),
    "subclass": replaced("mlp", "fc1", lambda fc1: Doubled(fc1.in_features, fc1.out_features)),
    "wider": replaced("mlp", "fc2", lambda fc2: nn.Linear(fc2.in_features, 2 * fc2.out_features)),
    "activation": replaced("mlp", "act", lambda act: nn.ReLU()),
    "rough activation": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "another norm": replaced("", "norm2", lambda norm: nn.RMSNorm(norm.normalized_shape)),
    "norm of its own": bound_forward("norm1"),
    "forward of the layer": bound_forward("modulation"),
    "forward of the mlp": bound_forward("mlp"),
    "dropout in the mlp": lambda block: (setattr(block.mlp.drop, "p", 0.5), block.train()),
    "dropout in the layer": lambda block: (setattr(block.modulation.proj_drop, "p", 0.5), block.train()),
    "scaled": lambda block: setattr(block, "gamma_1", nn.Parameter(torch.full((12,), 3.0).double())),
    "one factor for all": lambda block: setattr(block, "gamma_1", nn.Parameter(torch.full((1,), 3.0).double())),
    "a number for a scale": lambda block: setattr(block, "gamma_2", 3.0),
    "post norm": lambda block: setattr(block, "use_postln", True),
    "another size": lambda block: (setattr(block, "H", 6), setattr(block, "W", 7)),
}


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_parts_act(change, when):
    """Whatever somebody does to a part: the block computes what its class would."""
    block, args = build("authors", drop_path=0.5).double(), example("authors", dtype=torch.float64)
    if change is CHANGES["wider"]:
        block.norm2 = nn.Identity()
    if when == "before":
        change(block)
    twin = twin_of(block)
    fk.accelerate(block)
    if when == "after a call":
        block(*args)
    if when != "before":
        change(block)
        change(twin)
    twin.load_state_dict(block.state_dict())
    for _ in range(2):
        torch.manual_seed(0)
        try:
            expected = twin(*args)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                block(*args)
            return
        torch.manual_seed(0)
        assert relative_error(block(*args), expected) < 1e-12


def test_a_scale_of_another_shape_acts():
    block, args = build("authors", scale=True).double(), example("authors", dtype=torch.float64)
    fk.accelerate(block)
    block(*args)
    block.gamma_1 = nn.Parameter(torch.full((1,), 3.0).double())
    assert relative_error(block(*args), AuthorsBlock.forward(block, *args)) < 1e-12


@pytest.mark.parametrize("name", ["norm1_post", "ls1", "mlp.norm"])
def test_what_is_put_in_an_identity_s_place_acts(name):
    block, args = build("timm").double(), example("timm", dtype=torch.float64)
    fk.accelerate(block)
    block(*args)
    block.get_submodule(name).register_forward_hook(lambda module, args, y: 3 * y)
    assert relative_error(block(*args), type(block).forward(block, *args)) < 1e-12
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, nn.Sequential(nn.Identity(), nn.Tanh()))
    assert relative_error(block(*args), type(block).forward(block, *args)) < 1e-12


CHANGED_WEIGHTS = {
    "in place": lambda block, p: p.add_(1),
    "through .data": lambda block, p: p.data.view(-1)[:1].add_(1),
    "another .data": lambda block, p: setattr(p, "data", p.data + 1),
    "through NumPy": lambda block, p: p.detach().numpy().__iadd__(1),
    "state_dict": lambda block, p: block.load_state_dict({name: t + 1 for name, t in block.state_dict().items()}),
    "assigned": lambda block, p: block.load_state_dict(
        {name: t + 1 for name, t in block.state_dict().items()}, assign=True
    ),
    "swapped": lambda block, p: torch.utils.swap_tensors(p, nn.Parameter(p.detach() + 1)),
}


@pytest.mark.parametrize("rows", [6, 40], ids=["few", "many"])
@pytest.mark.parametrize("name", ["mlp.fc1.weight", "mlp.fc2.weight", "modulation.f.weight", "norm1.weight"])
@pytest.mark.parametrize("change", CHANGED_WEIGHTS.values(), ids=CHANGED_WEIGHTS)
def test_changed_weights_act_at_once(change, name, rows, cpu_kernels):
    """No call keeps anything of a weight for the next one: whoever changes a weight, in whatever way."""
    block = build("authors", 32)
    block.H, block.W = rows, rows
    x = torch.randn(1, rows * rows, 32)
    fk.accelerate(block, "cpu")
    with torch.no_grad():
        for _ in range(2):
            before = block(x)
        change(block, block.get_parameter(name))
        y, expected = block(x), type(block).forward(block, x)
    assert not torch.allclose(before, y)
    assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("change", CHANGED_WEIGHTS.values(), ids=CHANGED_WEIGHTS)
def test_changed_weights_act_at_once_in_every_thread(change, cpu_kernels):
    """Threads share the block, and one of them changes it between their calls."""
    block = build("authors", 32)
    block.H = block.W = 6
    x = torch.randn(1, 36, 32)
    fk.accelerate(block, "cpu")
    workers, rounds = 3, 4
    expected: list[torch.Tensor] = []

    def prepare():
        """The last thread to arrive runs it, while the others wait."""
        with torch.no_grad():
            change(block, block.get_parameter("mlp.fc1.weight"))
            expected.append(type(block).forward(block, x))

    before, after = threading.Barrier(workers, action=prepare, timeout=60), threading.Barrier(workers, timeout=60)

    def work(_):
        found = []
        with torch.no_grad():
            for _ in range(rounds):
                before.wait()
                found.append(block(x))
                after.wait()
        return found

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(work, range(workers)))
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(expected))
    for found in results:
        for y, value in zip(found, expected, strict=True):
            assert relative_error(y, value) < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_sees_its_own_weights(cpu_kernels, one_thread):
    """What parent and child change is their own. (OpenMP's threads do not survive a fork.)"""
    block = build("authors", 32)
    block.H = block.W = 6
    x = torch.randn(1, 36, 32)
    fk.accelerate(block, "cpu")
    with torch.no_grad():
        block(x)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()

        def child():
            block.mlp.fc1.weight.add_(1)
            answers.put(relative_error(block(x), type(block).forward(block, x)))

        process = context.Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0 and answers.get() < 1e-5
        assert relative_error(block(x), type(block).forward(block, x)) < 1e-5


def test_a_training_step_acts_at_once(cpu_kernels):
    block, args = build("authors"), example("authors")
    fk.accelerate(block, "cpu")
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    for _ in range(3):
        block(*args).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            y, expected = block(*args), AuthorsBlock.forward(block, *args)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_layers_alone(monkeypatch):
    block, args = build("authors"), example("authors")
    assert fk.accelerate(block).blocks
    called = is_fused(block, monkeypatch)
    report = fk.accelerate(block, level="layer")
    assert report.replaced and not report.blocks and not report.kept_blocks
    assert "forward" not in vars(block) and "forward" in vars(block.modulation)
    block(*args)
    assert not called
    with pytest.raises(ValueError, match=r"^accelerate\(level\): expected one of block, layer, got 'net'"):
        fk.accelerate(block, level="net")


def test_restored_and_copied(monkeypatch):
    block, args = build("transformers", drop_path=0.5), example("transformers")
    expected = block(*args)
    fk.accelerate(block)
    twin_of(block)
    twins = [copy.deepcopy(block), copy.copy(block), pickle.loads(pickle.dumps(block))]
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    called = is_fused(block, monkeypatch)
    for i, twin in enumerate(twins):
        torch.testing.assert_close(twin(*args), expected, rtol=1e-4, atol=1e-4)
        assert len(called) == i + 1 and vars(twin)["forward"].module is twin
    fk.restore(block)
    assert "forward" not in vars(block) and "forward" not in vars(block.modulation)
    assert torch.equal(block(*args), expected)


class Parallel(AuthorsBlock):
    """Both branches of the same input."""

    def forward(self, x):
        B, L, C = x.shape
        y = self.modulation(self.norm1(x).view(B, self.H, self.W, C)).view(B, L, C)
        return x + y + self.mlp(self.norm2(x))


class Halved(AuthorsBlock):
    def after(self, x, y, gamma):
        return x + 0.5 * self.drop_path(gamma * y)


class DropsTokens(AuthorsBlock):
    """Drop path per token: right in evaluation alone."""

    def after(self, x, y, gamma):
        return x + y * torch.rand(*y.shape[:2], 1).round().to(y) if self.training else super().after(x, y, gamma)


class Positioned(AuthorsBlock):
    """By what is zero until it is loaded."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("position", torch.zeros(()))

    def forward(self, x):
        return super().forward(x + self.position)


def test_a_block_with_a_buffer_is_left_alone():
    block = Positioned(AuthorsClassification(12, 3, 2), 12)
    report = fk.accelerate(block)
    assert report.kept_blocks == [("", "buffer position is no part of the form")] and not report.blocks


@pytest.mark.parametrize("cls", [Parallel, Halved, DropsTokens])
def test_look_alikes_are_left_alone(cls):
    block = cls(AuthorsClassification(12, 3, 2), 12)
    block.H, block.W = 7, 6
    report = fk.accelerate(block)
    assert report.replaced and not report.blocks
    ((_, reason),) = report.kept_blocks
    assert "computes something else" in reason
    assert "its layer alone, (the model itself): its forward computes something else" in str(report)


def test_modulators_are_kept_by_layers(monkeypatch):
    block, args = build("authors"), example("authors")
    called = is_fused(block, monkeypatch)
    report = fk.accelerate(block, keep_modulator=True)
    block(*args)
    assert not called and block.modulation.modulator is not None
    assert [reason for _, reason in report.kept_blocks] == ["keep_modulator=True was asked for"]


@for_every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast(form, options, dtype, monkeypatch):
    """Of a float32 block. Norms keep the dtype of their input on a CPU, so blocks after a convolution get 16 bits."""
    block, args = build(form, **options), example(form)
    args = (args[0].to(dtype), *args[1:])
    exact = answers(twin_of(block).double(), (args[0].double(), *args[1:]), True)
    near = [(args[0] * (1 + torch.rand(args[0].shape) / 64), *args[1:]) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = answers(block, args, True)
        eager = [answers(block, (x.to(dtype), *rest), True) for x, *rest in near]
    others = [answers(twin_of(block).double(), (x.to(dtype).double(), *rest), True) for x, *rest in near]
    fk.accelerate(block)
    called = is_fused(block, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(block, args, True)
    # a float32 scale makes the sum float32, which no op answers 16 bits with
    assert bool(called) == (dtype == torch.float32 or "scale" not in options)
    assert torch.equal(found[-1], expected[-1])
    for i, (ours, theirs, value) in enumerate(zip(found[:-1], expected[:-1], exact[:-1], strict=True)):
        assert ours.dtype == theirs.dtype
        pairs = [(e[i].bfloat16(), x[i]) for e, x in zip(eager, others, strict=True)]
        assert_accurate(f"result {i}", ours.bfloat16(), theirs.bfloat16(), value, 3 if i else 2, pairs)


def test_norms_of_more_bits(monkeypatch):
    block, args = build("authors").bfloat16(), example("authors", dtype=torch.bfloat16)
    block.norm1.float()
    fk.accelerate(block)
    called = is_fused(block, monkeypatch)
    assert relative_error(block(*args), type(block).forward(block, *args)) < 2e-2
    assert called
