"""Launches that a second call replays: of the same kernels, over its own tensors; and what is not replayed."""

import pytest
import torch

from focalnet_kernels.ops.focal_context import triton_launch as context
from focalnet_kernels.ops.focal_modulation import triton_launch as layer
from focalnet_kernels.ops.modulate import triton_launch as modulation
from focalnet_kernels.ops.triton import launch as launching
from focalnet_kernels.ops.triton import replay
from focalnet_kernels.testing import layer_tensors, make_context_inputs, make_layer_inputs, make_modulate_inputs

pytest.importorskip("triton", reason="its kernels are compiled here")

from absent_gpu import absent_gpu

if launching.LOOKS_ANEW:
    pytest.skip("Triton's interpreter looks at every launch anew", allow_module_level=True)

DTYPE = torch.bfloat16


def context_call(seed, shape=(2, 8, 6, 16), kernels=(3, 5), **options):
    """The implementation and the tensors of a call that has fresh ones."""
    inputs = make_context_inputs(shape, kernels, dtype=DTYPE, seed=seed, **options)
    return context.focal_context_fwd_impl, (inputs["ctx"], inputs["gates"], inputs["weights"], True)


def context_bwd_call(seed, needed=-1):
    _, (ctx, gates, weights, normalize) = context_call(seed)
    arguments = torch.ones_like(ctx), ctx, gates, weights, torch.zeros(ctx.shape[:2]), normalize, needed
    return context.focal_context_bwd_impl, arguments


def shared_call(seed):
    """Both inputs are parts of one tensor, as the authors' layer splits them."""
    implementation, (ctx, gates, weights, normalize) = context_call(seed)
    parts = torch.cat([ctx, gates], 1).split((ctx.shape[1], gates.shape[1]), 1)
    return implementation, (*parts, weights, normalize)


def layer_call(seed, save, **options):
    x, parameters = layer_tensors(make_layer_inputs((2, 6, 8, 32), (3, 5), dtype=DTYPE, seed=seed, **options))
    return layer.focal_modulation_fwd_impl, (x, parameters, False, 1e-5, save)


def modulate_call(seed):
    inputs = make_modulate_inputs((2, 40, 5, 6), dtype=DTYPE, seed=seed)
    return modulation.modulate_fwd_impl, tuple(inputs.values())


CALLS = {
    "context": context_call,
    "context of a strip": lambda seed: context_call(seed, (1, 16, 70, 20)),
    "context, channels last": lambda seed: context_call(seed, layout="channels_last"),
    "context, backward": context_bwd_call,
    "context of parts": shared_call,
    "layer": lambda seed: layer_call(seed, save=False),
    "layer that trains": lambda seed: layer_call(seed, save=True),
    "layer with a norm": lambda seed: layer_call(seed, save=True, postln=True),
    "layer without biases": lambda seed: layer_call(seed, save=False, bias=False),
    "modulate": modulate_call,
}


def flat(value):
    if isinstance(value, (tuple, list)):
        return [v for inner in value for v in flat(inner)]
    return [value]


def named_addresses(launched, arguments, made, outputs):
    """What launches were handed, with pointers as (whose memory, its bytes, how far behind its beginning), where memory
    that was made is numbered as it comes; and what came out."""
    tensors = [t for t in flat(arguments) if isinstance(t, torch.Tensor)]
    begins = {t.untyped_storage().data_ptr(): ("made", t.untyped_storage().nbytes()) for t in made}
    begins |= {t.untyped_storage().data_ptr(): (f"input {i}", None) for i, t in enumerate(tensors)}
    numbers = {}

    def place(address):
        begin = max(begin for begin in begins if begin <= address)
        kind, size = begins[begin]
        assert size is None or address - begin < max(size, 1)
        return kind, size, address - begin, None if size is None else numbers.setdefault(begin, len(numbers))

    found = []
    for one in launched:
        for value in flat(one.args):
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            is_pointer = isinstance(address, int) and address > 1 << 24
            found.append((one.kernel, one.grid, place(address) if is_pointer else address))
    return found, [(t.shape, t.stride(), t.dtype, t.numel() and place(t.data_ptr())) for t in flat(outputs)]


class Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the tensors that are allocated, so that no two have the same memory."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if "empty" in str(function):
            self.tensors.append(result)
        return result


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_later_call_launches_the_same_over_its_own_tensors(call, seed):
    """Against the implementation itself, on the same tensors."""
    launched: list = []

    def run(function, arguments):
        launched.clear()
        with Made() as made:
            outputs = function(*arguments)
        return named_addresses(launched, arguments, made.tensors, outputs)

    with absent_gpu(launched):
        implementation, arguments = call(seed)
        kept = [arguments, implementation(*arguments)]  # whose memory is taken, so that no other has its addresses
        (recipe,) = replay._recipes.values()
        assert recipe is not None
        implementation, arguments = call(seed + 1)
        replayed = run(implementation, arguments)
        expected = run(implementation.__wrapped__, arguments)
        assert len(replay._recipes) == 1
    assert kept and len(replayed[0]) > 20 and replayed == expected


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_are_no_views(call, seed):
    """Which may not be changed in place where gradients are wanted."""
    implementation, arguments = call(seed)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, first):
            return flat(implementation(first, *arguments[1:]))[0]

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    with absent_gpu():
        for _ in range(2):
            y = Op.apply(arguments[0].detach().clone().requires_grad_())
            assert not y._is_view()
            y.add_(1)
        assert None not in replay._recipes.values()


def test_memory_is_taken_when_it_is_needed_and_no_longer(seed):
    """What an implementation only looked at is not made again; scratch memory is free for what comes after it."""
    with absent_gpu():
        implementation, arguments = context_bwd_call(seed)
        implementation(*arguments)
        numbers = []
        for function in (implementation, implementation.__wrapped__):
            with Made() as made:
                function(*arguments)
            numbers.append(len(made.tensors))
        assert numbers[0] < numbers[1]
        implementation, arguments = layer_call(seed, save=True)
        implementation(*arguments)
        *_, recipe = replay._recipes.values()
    assert [len(step.made) for step in recipe.steps] == [1, 3, 2]
    assert [len(step.dropped) for step in recipe.steps] == [0, 1, 1], "scratch memory; then ctx_all"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2, 8, 6, 15)}, {"kernels": (3, 7)}, {"layout": "channels_last"}, {"layout": "offset"},
    ],
    ids=str,
)  # fmt: skip
def test_another_kind_has_a_recipe_of_its_own(change, seed):
    with absent_gpu():
        for options in ({}, change):
            implementation, arguments = context_call(seed, **options)
            implementation(*arguments)
            implementation(*arguments)
        ctx, gates, weights, normalize = arguments
        implementation(ctx, gates, weights, not normalize)
        implementation(ctx.half(), gates.half(), [w.half() for w in weights], normalize)
        assert len(replay._recipes) == 4


def test_a_tensor_elsewhere_is_of_another_kind(seed):
    """Triton says so of a CPU's tensor; its address alone would be taken for a GPU's."""
    implementation, (ctx, gates, weights, normalize) = context_call(seed)
    elsewhere = [weights[0], weights[1].to("meta")]
    kinds = [replay._told_apart(implementation, (ctx, gates, w, normalize))[1] for w in (weights, elsewhere)]
    assert kinds[0] != kinds[1]


def views_of_what_is_shared(seed):
    implementation, arguments = shared_call(seed)
    return replay.replayed(lambda ctx, *others: implementation(ctx.view_as(ctx), *others)), arguments


def writes(seed):
    implementation, arguments = context_call(seed)
    return replay.replayed(lambda *args: [t.mul_(2) for t in implementation(*args)]), arguments


def copies(seed):
    implementation, (ctx, gates, weights, normalize) = context_call(seed)
    spread = [w.expand(*w.shape[:-2], *w.shape[-2:]).transpose(-1, -2) for w in weights]
    return implementation, (ctx, gates, spread, normalize)


def multiplies(seed):
    x, parameters = layer_tensors(make_layer_inputs((2, 6, 8, 136), (3,), dtype=DTYPE, seed=seed))
    return layer.focal_modulation_fwd_impl, (x, parameters, False, 1e-5, False)


def in_float32(seed):
    inputs = make_modulate_inputs((2, 40, 5, 6), dtype=torch.float32, seed=seed)
    return modulation.modulate_fwd_impl, tuple(inputs.values())


@pytest.mark.parametrize("call", [views_of_what_is_shared, writes, copies, multiplies, in_float32])
def test_what_is_more_than_launches_runs_as_it_is(call, seed):
    """And where it cannot be told whose memory a pointer points into."""
    with absent_gpu():
        implementation, arguments = call(seed)
        implementation(*arguments)
        assert list(replay._recipes.values()) == [None]


def test_one_tensor_twice_says_nothing_of_two(seed):
    implementation, (grad_out, ctx, *others) = context_bwd_call(seed)
    with absent_gpu():
        implementation(ctx, ctx, *others)
        assert not replay._recipes
        implementation(grad_out, ctx, *others)
        assert len(replay._recipes) == 1


def test_a_failed_call_leaves_nothing(seed, monkeypatch):
    implementation, arguments = context_call(seed)
    with absent_gpu(), monkeypatch.context() as patch:
        patch.setattr(context, "launch", lambda *args, **constants: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            implementation(*arguments)
        assert not replay._recipes and not launching.is_looked_at()


def test_a_hook_of_somebody_s_is_called(seed):
    from focalnet_kernels.ops.focal_context.triton_fwd import context_fwd_kernel

    implementation, arguments = context_call(seed)
    seen = []

    def hook(*args, **kwargs):
        seen.append(args)

    with absent_gpu():
        try:
            context_fwd_kernel.pre_run_hooks.append(hook)
            implementation(*arguments)
            assert len(seen) == 1 and not replay._recipes, "there will be launches without the hook"
            context_fwd_kernel.pre_run_hooks.remove(hook)
            implementation(*arguments)
            context_fwd_kernel.pre_run_hooks.append(hook)
            implementation(*arguments)
            assert len(seen) == 2 and len(replay._recipes) == 1
        finally:
            context_fwd_kernel.pre_run_hooks.clear()


def test_one_within_another_is_told_to_whom_watches(seed):
    """The outer's recipe has the inner's launches, though the inner has one of its own."""
    implementation, arguments = context_call(seed)
    outer = replay.replayed(lambda *args: implementation(*args))
    launched: list = []
    with absent_gpu(launched):
        for _ in range(2):
            implementation(*arguments)
        for _ in range(3):
            outer(*arguments)
        assert len(launched) == 5
        assert [len(recipe.steps) for recipe in replay._recipes.values()] == [1, 1]
