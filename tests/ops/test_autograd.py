"""What every op owes to autograd, whichever backend runs it."""

import contextlib
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import focalnet_kernels as fk
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import (
    LAYOUTS,
    assert_op_accurate,
    draw,
    make_context_inputs,
    make_layer_inputs,
    make_modulate_inputs,
    map_tensors,
    named_tensors,
    run,
)
from ops.strategies import seeds, skip_what_cannot_run


def context_inputs(seed, levels=2, shape=(2, 10, 5, 6), **options):
    return make_context_inputs(shape, [3, 5, 7][:levels], seed=seed, **options)


def modulate_inputs(seed, shape=(2, 10, 5, 6), **options):
    return make_modulate_inputs(shape, seed=seed, **options)


def layer_inputs(seed, levels=2, shape=(2, 5, 6, 10), **options):
    return make_layer_inputs(shape, [3, 5, 7][:levels], postln=True, seed=seed, **options)


OPS = {
    "focal_context": (fk.focal_context, context_inputs),
    "modulate": (fk.modulate, modulate_inputs),
    "focal_modulation": (fk.focal_modulation, layer_inputs),
}
for_every_op = pytest.mark.parametrize("op, make_inputs", OPS.values(), ids=OPS)


def grad_output_for(inputs, seed):
    x = next(iter(inputs.values()))
    return draw(x.shape, "contiguous", torch.Generator().manual_seed(seed + 1), dtype=x.dtype)


def then(op, function):
    """`op` followed by `function`."""

    def combined(**inputs):
        return function(op(**inputs))

    combined.__name__ = f"{op.__name__} then {function.__name__}"
    return combined


# ------------------------------------------------------------------- gradients of the output from everywhere


def summed(y):
    return y.sum()


def averaged(y):
    return y.mean()


def concatenated(y):
    return torch.cat([y.flip(1), y, y * 2], 1)[:, 1:]


def permuted(y):
    return y.permute(*range(y.ndim)[::-1]).contiguous().sigmoid()


def expanded(y):
    return y.sum(1, keepdim=True).expand_as(y).tanh()


def selected(y):
    return y[..., ::2]


@for_every_op
@pytest.mark.parametrize("function", [summed, averaged, concatenated, permuted, expanded, selected])
def test_grad_output_of_any_strides(backend, op, make_inputs, function, seed):
    inputs = make_inputs(seed)
    y = function(op(**inputs))
    grad_output = draw(y.shape, "contiguous", torch.Generator().manual_seed(seed + 1))
    # a sum's own error is luck; its gradients are the matter here
    assert_op_accurate(then(op, function), inputs, backend, grad_output, check_output=False)


# ---------------------------------------------------------------------------------- which gradients, and how


@for_every_op
@settings(max_examples=3 if INTERPRETED else 5)  # beside `test_each_gradient_alone`
@given(data=st.data(), seed=seeds)
def test_any_subset_of_gradients(backend, op, make_inputs, data, seed):
    inputs = make_inputs(seed)
    wanted = data.draw(st.sets(st.sampled_from(sorted(named_tensors(inputs))), min_size=1))
    results = assert_op_accurate(op, inputs, backend, grad_output_for(inputs, seed), wanted=wanted)
    assert len(results) == 1 + len(wanted)


@for_every_op
def test_each_gradient_alone(backend, op, make_inputs, seed):
    inputs = make_inputs(seed)
    grad_output = grad_output_for(inputs, seed)
    for name in named_tensors(inputs):
        assert_op_accurate(op, inputs, backend, grad_output, wanted=[name])


@for_every_op
def test_frozen_inputs_get_no_gradient(backend, op, make_inputs, seed):
    inputs = map_tensors(torch.clone, make_inputs(seed))
    first, *others = named_tensors(inputs).values()
    first.requires_grad_()
    with fk.use_backend(backend):
        op(**inputs).sum().backward()
    assert first.grad is not None and all(t.grad is None for t in others)


@for_every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_backward_twice(backend, op, make_inputs, dtype, seed):
    skip_what_cannot_run(backend, dtype)
    inputs = map_tensors(lambda t: t.requires_grad_(), make_inputs(seed, dtype=dtype))
    leaves = list(named_tensors(inputs).values())
    grad_output = grad_output_for(inputs, seed)
    with fk.use_backend(backend):
        y = op(**inputs)
        first = torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
        second = torch.autograd.grad(y, leaves, grad_output)
    assert all(map(torch.equal, first, second))


@for_every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_repeated_calls_agree_bitwise(backend, op, make_inputs, dtype, seed):
    skip_what_cannot_run(backend, dtype)
    inputs = make_inputs(seed, dtype=dtype)
    grad_output = grad_output_for(inputs, seed)
    with fk.use_backend(backend):
        first = run(op, inputs, grad_output)
        for _ in range(3):
            again = run(op, inputs, grad_output)
            assert all(torch.equal(first[name], again[name]) for name in first)


@for_every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_stay_as_they_were(backend, op, make_inputs, layout, seed):
    inputs = make_inputs(seed, layout=layout)
    arguments = {**inputs, "grad_output": grad_output_for(inputs, seed)}
    # the storage around a slice counts too
    whole = [t if t._base is None else t._base for t in named_tensors(arguments).values()]
    before = [(t.clone(), t._version) for t in whole]
    with fk.use_backend(backend):
        run(op, inputs, arguments["grad_output"])
    for tensor, (values, version) in zip(whole, before, strict=True):
        assert tensor._version == version
        torch.testing.assert_close(tensor, values, rtol=0, atol=0, equal_nan=True)


@for_every_op
def test_a_changed_input_is_noticed(backend, op, make_inputs, seed):
    inputs = map_tensors(lambda t: t.requires_grad_(), make_inputs(seed))
    for name in [n for n in named_tensors(inputs) if n in ("weights[1]", "weight", "proj_weight")]:
        with fk.use_backend(backend):
            y = op(**inputs)
            with torch.no_grad():
                named_tensors(inputs)[name].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


# --------------------------------------------------------------------------------------------- what is saved


@contextlib.contextmanager
def saved_tensors():
    """What autograd saves meanwhile."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yield saved


def bytes_beyond(saved, inputs):
    """How much of what was saved is not the inputs themselves."""
    own = {t.untyped_storage().data_ptr() for t in named_tensors(inputs).values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@for_every_op
def test_nothing_is_saved_without_need(backend, op, make_inputs, seed):
    inputs = make_inputs(seed)
    with fk.use_backend(backend), saved_tensors() as saved:
        op(**inputs)
    assert not saved
    map_tensors(lambda t: t.requires_grad_(), inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with fk.use_backend(backend), mode(), saved_tensors() as saved:
            assert not op(**inputs).requires_grad
        assert not saved
    with fk.use_backend(backend), saved_tensors() as saved:
        op(**inputs)
    assert saved, "the hooks see nothing: this test cannot fail"


@for_every_op
def test_kernels_save_little(kernels, op, make_inputs, seed):
    layer = op is fk.focal_modulation
    inputs = make_inputs(seed, shape=(2, 9, 8, 40) if layer else (2, 40, 9, 8))
    map_tensors(lambda t: t.requires_grad_(), inputs)
    with fk.use_backend(kernels), saved_tensors() as saved:
        op(**inputs)
    # the whole layer: q, ctx and gates, and the modulator; the others: nothing but their inputs and the means
    x = next(iter(inputs.values()))
    assert bytes_beyond(saved, inputs) <= (3.3 if layer else 0.1) * x.nbytes


@for_every_op
def test_no_reference_cycle(backend, op, make_inputs, seed):
    inputs = map_tensors(lambda t: t.requires_grad_(), make_inputs(seed))
    alive = [weakref.ref(t) for t in named_tensors(inputs).values()]
    gc.disable()
    try:
        with fk.use_backend(backend):
            y = op(**inputs)
        alive.append(weakref.ref(y))
        y.sum().backward()
        del y, inputs
        assert not any(t() is not None for t in alive)
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------- strides


@for_every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_memory_order_of_the_input(kernels, op, make_inputs, layout, seed):
    inputs = make_inputs(seed, layout=layout)
    x = next(iter(inputs.values()))
    with fk.use_backend(kernels):
        assert op(**inputs).stride() == torch.empty_like(x).stride()


@for_every_op
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weight_gradients_have_the_weights_strides(kernels, op, make_inputs, layout, seed):
    """DDP's buckets are views with the parameters' strides, where axes of size 1 count too."""
    inputs = make_inputs(seed) | {k: v for k, v in make_inputs(seed, layout=layout).items() if k in ("x", "q", "ctx")}
    x_name, *names = named_tensors(inputs)
    with fk.use_backend(kernels):
        results = run(op, inputs, grad_output_for(inputs, seed))
    for name in names:
        if name not in ("gates", "ctx_all"):
            assert results[f"grad {name}"].stride() == named_tensors(inputs)[name].stride(), name


# --------------------------------------------------------------------------------------------- higher orders


@for_every_op
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_gradcheck(op, make_inputs, levels, seed):
    layer = op is fk.focal_modulation
    options = {} if op is fk.modulate else {"levels": levels}
    shape = (2, 2, 3, 4) if layer else (2, 4, 2, 3)
    inputs = make_inputs(seed, shape=shape, dtype=torch.float64, **options)
    map_tensors(lambda t: t.requires_grad_(), inputs)
    names = list(named_tensors(inputs))

    def flat(*tensors):
        return op(**with_tensors(inputs, dict(zip(names, tensors, strict=True))))

    leaves = list(named_tensors(inputs).values())
    assert torch.autograd.gradcheck(flat, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(flat, leaves, fast_mode=True)


def with_tensors(inputs, tensors):
    """`inputs` with its tensors replaced by those named in `tensors`."""
    by_id = {id(old): tensors[name] for name, old in named_tensors(inputs).items()}
    return map_tensors(lambda t: by_id[id(t)], inputs)


def gradients_of(op):
    """The op whose output is all gradients of `op`, in one vector: differentiating it is double backward."""

    def gradients(grad_output, **inputs):
        leaves = list(named_tensors(inputs).values())
        found = torch.autograd.grad(op(**inputs), leaves, grad_output, create_graph=True)
        return torch.cat([g.flatten() for g in found])

    gradients.__name__ = f"gradients of {op.__name__}"
    return gradients


@for_every_op
@pytest.mark.parametrize("levels", [0, 2])
def test_double_backward(backend, op, make_inputs, levels, seed):
    inputs = make_inputs(seed, **({} if op is fk.modulate else {"levels": levels}))
    size = sum(t.numel() for t in named_tensors(inputs).values())
    inputs = {"grad_output": grad_output_for(inputs, seed), **inputs}
    grad_output = draw((size,), "contiguous", torch.Generator().manual_seed(seed + 2))
    results = assert_op_accurate(gradients_of(op), inputs, backend, grad_output)
    assert len(results) == 1 + len(named_tensors(inputs))


@for_every_op
def test_double_backward_through_frozen_weights(backend, op, make_inputs, seed):
    inputs = make_inputs(seed)
    x_name = next(iter(inputs))

    def slope(**inputs):
        (g,) = torch.autograd.grad(op(**inputs).square().sum(), inputs[x_name], create_graph=True)
        return g

    results = assert_op_accurate(slope, inputs, backend, grad_output_for(inputs, seed), wanted=[x_name])
    assert results[f"grad {x_name}"].abs().max() > 0
