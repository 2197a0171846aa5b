"""Test inputs, fresh and random, in any memory layout, and the accuracy criterion that every backend is held to.

The error rule: against the float64 result, a backend's error is at most 2 (forward) or 3 (backward) times that of
eager PyTorch in the same dtype, in the maximum and in the root mean square, plus what rounding the result alone
would do.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dispatch import use_backend

FORWARD_FACTOR, BACKWARD_FACTOR, SLACK = 2, 3, 4

LAYOUTS = ("contiguous", "channels_last", "slice", "expanded", "permuted", "offset")


# ---------------------------------------------------------------------------------------------------- inputs


def fresh_seed() -> int:
    """A new seed, printed, so that a failing test shows it."""
    seed = secrets.randbits(32)
    print(f"seed={seed}")
    return seed


def draw(
    shape: Sequence[int],
    layout: str,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channel_axis: int = 1,
    scale: float = 1.0,
    mean: float = 0.0,
    normed: bool = False,
) -> Tensor:
    """Random normal numbers of logical `shape` in that memory layout.

    Args:
        layout: "contiguous"; "channels_last" (`channel_axis` innermost); "slice" (every axis cut out of a
            larger one, the last with step 2, NaN all around: reading a neighbour shows); "expanded" (one axis
            has stride 0); "permuted" (axes in a random order in memory); "offset" (starts one element into
            its storage, so aligned vector loads fail).
        scale, mean: standard deviation and mean. Sums of zero mean hide what they lost.
        normed: a LayerNorm reads the last axis, so "expanded" takes another: of equal channels the norm would
            see nothing but rounding errors, and its gradient, times eps**-0.5, overflows float16.
    """
    n, shape = len(shape), list(shape)

    def normal(shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return (values + mean).to(device, dtype)

    def pick(high):
        return int(torch.randint(high, (), generator=generator))

    if layout == "contiguous":
        return normal(shape)
    if layout in ("channels_last", "permuted"):
        if layout == "channels_last":
            order = [axis for axis in range(n) if axis != channel_axis % n] + [channel_axis % n]
        else:
            order = torch.randperm(n, generator=generator).tolist()
        return normal([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(n)])
    if layout == "expanded":
        axis = pick(n - 1 if normed else n)
        base = normal([1 if i == axis else size for i, size in enumerate(shape)])
        return base.expand(shape)
    if layout == "offset":
        numel = torch.Size(shape).numel()
        storage = torch.full((numel + 1,), float("nan"), dtype=dtype, device=device)
        return storage[1:].view(shape).copy_(normal(shape))
    if layout == "slice":
        before, after = [pick(3) for _ in shape], [pick(3) for _ in shape]
        steps = [1] * (n - 1) + [2]
        sizes = [b + s * size + a for b, s, size, a in zip(before, steps, shape, after, strict=True)]
        whole = torch.full(sizes, float("nan"), dtype=dtype, device=device)
        index = tuple(slice(b, b + s * size, s) for b, s, size in zip(before, steps, shape, strict=True))
        return whole[index].copy_(normal(shape))
    raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def make_context_inputs(
    shape: Sequence[int],
    kernels: Sequence[int | Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    mean: float = 0.0,
) -> dict:
    """Arguments of `focal_context` for ctx of `shape` (B, C, *spatial) and one kernel size per level.

    `mean`: of ctx and gates.
    """
    generator = _generator(seed)
    B, C, *spatial = shape
    options = {"dtype": dtype, "device": device}
    return {
        "ctx": draw(shape, layout, generator, mean=mean, **options),
        "gates": draw((B, len(kernels) + 1, *spatial), layout, generator, mean=mean, **options),
        "weights": _level_weights(C, len(spatial), kernels, layout, generator, options),
    }


def make_modulate_inputs(
    shape: Sequence[int],
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    mean: float = 0.0,
) -> dict:
    """Arguments of `modulate` for q of `shape` (B, C, *spatial). `mean`: of q and ctx_all."""
    generator, C = _generator(seed), shape[1]
    options = {"dtype": dtype, "device": device}
    return {
        "q": draw(shape, layout, generator, mean=mean, **options),
        "ctx_all": draw(shape, layout, generator, mean=mean, **options),
        "weight": draw((C, C), layout, generator, scale=C**-0.5, **options),
        "bias": draw((C,), layout, generator, **options) if bias else None,
    }


def make_layer_inputs(
    shape: Sequence[int],
    kernels: Sequence[int | Sequence[int]],
    *,
    bias: bool = True,
    postln: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    mean: float = 0.0,
) -> dict:
    """Arguments of `focal_modulation` for x of `shape` (B, *spatial, C) and one kernel size per level.

    For x, "channels_last" means the memory order of a (B, C, *spatial) tensor: the other one of the two.
    "expanded" is x alone: with equal rows in the weights LayerNorm would see nothing but rounding errors.
    `mean`: of x.
    """
    generator = _generator(seed)
    x_layout, layout = layout, "contiguous" if layout == "expanded" else layout
    C, ndim = shape[-1], len(shape) - 2
    f_out = 2 * C + len(kernels) + 1
    options, of_x = {"dtype": dtype, "device": device}, {"dtype": dtype, "device": device, "mean": mean}

    def vector(size, present):
        return draw((size,), layout, generator, **options) if present else None

    def matrix(rows):
        return draw((rows, C), layout, generator, scale=C**-0.5, **options)

    return {
        "x": _tokens(shape, x_layout, generator, **of_x),
        "f_weight": matrix(f_out),
        "f_bias": vector(f_out, bias),
        "focal_weights": _level_weights(C, ndim, kernels, layout, generator, options),
        "h_weight": matrix(C),
        "h_bias": vector(C, bias),
        "proj_weight": matrix(C),
        "proj_bias": vector(C, bias),
        "ln_weight": vector(C, postln),
        "ln_bias": vector(C, postln),
    }


def make_mlp_branch_inputs(
    shape: Sequence[int],
    hidden: int,
    *,
    bias: bool = True,
    norm: bool = True,
    post_norm: bool = False,
    gamma: bool = False,
    drop_path: bool = False,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    mean: float = 0.0,
) -> dict:
    """Arguments of `mlp_branch` for x of `shape` (B, *spatial, C) and so many hidden channels.

    Layouts are as in `make_layer_inputs`. `residual_dtype`: of all but the MLP; None: the same. `norm_dtype`: of the
    norm's weight and bias; None: the residual's. `mean`: of x.
    """
    generator = _generator(seed)
    x_layout, layout = layout, "contiguous" if layout == "expanded" else layout
    C = shape[-1]
    options, of_residual = {"dtype": dtype, "device": device}, {"dtype": residual_dtype or dtype, "device": device}
    return {
        "x": _tokens(shape, x_layout, generator, mean=mean, normed=True, **of_residual),
        "fc1_weight": draw((hidden, C), layout, generator, scale=C**-0.5, **options),
        "fc1_bias": draw((hidden,), layout, generator, **options) if bias else None,
        "fc2_weight": draw((C, hidden), layout, generator, scale=hidden**-0.5, **options),
        "fc2_bias": draw((C,), layout, generator, **options) if bias else None,
        **_residual_inputs(shape, layout, generator, of_residual, norm, post_norm, gamma, drop_path, norm_dtype),
    }


def make_focal_branch_inputs(
    shape: Sequence[int],
    kernels: Sequence[int | Sequence[int]],
    *,
    bias: bool = True,
    postln: bool = False,
    norm: bool = True,
    post_norm: bool = False,
    gamma: bool = False,
    drop_path: bool = False,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    mean: float = 0.0,
) -> dict:
    """Arguments of `focal_branch`: those of `make_layer_inputs`, and of the residual as in `make_mlp_branch_inputs`."""
    seed = fresh_seed() if seed is None else seed
    layer = {"bias": bias, "postln": postln, "dtype": dtype, "layout": layout, "device": device, "mean": mean}
    inputs = make_layer_inputs(shape, kernels, seed=seed, **layer)
    generator, of_residual = _generator(seed + 1), {"dtype": residual_dtype or dtype, "device": device}
    inputs["x"] = _tokens(shape, layout, generator, mean=mean, normed=True, **of_residual)
    layout = "contiguous" if layout == "expanded" else layout
    return inputs | _residual_inputs(
        shape, layout, generator, of_residual, norm, post_norm, gamma, drop_path, norm_dtype
    )


def _residual_inputs(shape, layout, generator, options, norm, post_norm, gamma, drop_path, norm_dtype) -> dict:
    B, C = shape[0], shape[-1]
    of_norm = options if norm_dtype is None else options | {"dtype": norm_dtype}

    def vector(present, options, mean=0.0):
        return draw((C,), layout, generator, mean=mean, **options) if present else None

    kept = torch.rand(B, generator=generator) < 0.75
    return {
        "norm_weight": vector(norm, of_norm, 1.0),
        "norm_bias": vector(norm, of_norm),
        "post_norm": post_norm,
        "gamma": vector(gamma, options, 1.0),
        "drop_path": (kept / 0.75).to(options["device"], options["dtype"]) if drop_path else None,
    }


def layer_tensors(inputs: dict) -> tuple[Tensor, list[Tensor | None]]:
    """x and the parameters of `make_layer_inputs`, as the raw ops take them."""
    x, f_weight, f_bias, focal_weights, *others = inputs.values()
    return x, [f_weight, f_bias, *focal_weights, *others]


def branch_tensors(inputs: dict) -> tuple[Tensor, list[Tensor | None]]:
    """The same of `make_mlp_branch_inputs` and `make_focal_branch_inputs`."""
    x, *others = [value for name, value in inputs.items() if name != "post_norm"]
    flat = [t for value in others for t in (value if isinstance(value, list) else [value])]
    return x, flat


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed() if seed is None else seed)


def _tokens(shape, layout, generator, **options) -> Tensor:
    """A map of `shape` (B, *spatial, C), of which "channels_last" means the other memory order."""
    if layout == "channels_last":
        return draw((shape[0], shape[-1], *shape[1:-1]), "contiguous", generator, **options).movedim(1, -1)
    return draw(shape, layout, generator, **options)


def _level_weights(C, ndim, kernels, layout, generator, options) -> list[Tensor]:
    sizes = [(k,) * ndim if isinstance(k, int) else tuple(k) for k in kernels]
    return [draw((C, 1, *k), layout, generator, scale=torch.Size(k).numel() ** -0.5, **options) for k in sizes]


# ------------------------------------------------------------------------------------------------ error rule


def assert_accurate(
    name: str,
    result: Tensor,
    eager: Tensor,
    exact: Tensor,
    factor: float,
    neighbours: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Assert the error rule for one tensor.

    error(result) <= factor * error(eager) + rounding, once for the maximum and once for the root mean square over
    all elements, where rounding is one rounding step of the dtype, and for one element of the tensor `SLACK` steps
    of float32, in which kernels compute.

    Args:
        name: what the tensor is, for the message.
        result: the backend's.
        eager: eager PyTorch's in the same dtype, of the same inputs.
        exact: the float64 result, of the same inputs.
        factor: `FORWARD_FACTOR` or `BACKWARD_FACTOR`.
        neighbours: (eager, exact) of other inputs nearby. Eager's error is the largest it makes among them: in a
            tensor of few elements one lucky hit is no baseline.

    Raises:
        AssertionError: the result is less accurate, not finite, or has the wrong shape or dtype.
    """
    assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    assert result.dtype == eager.dtype, f"{name}: dtype {result.dtype}, expected {eager.dtype}"
    if result.numel() == 0:
        return
    bad = int((~result.isfinite()).sum())
    assert bad == 0, f"{name}: {bad} of {result.numel()} elements are NaN or infinite"

    error = result.double() - exact
    eager_errors = [e.double() - x for e, x in [(eager, exact), *neighbours]]
    assert all(e.isfinite().all() for e in eager_errors), f"{name}: the baseline, eager PyTorch, is not finite"
    info = torch.finfo(result.dtype)
    slack = SLACK * torch.finfo(torch.float32).eps * _largest(exact)
    for measure, size, share in (("max", _largest, 1), ("rms", _rms, result.numel() ** -0.5)):
        rounding = info.eps * max(size(exact), info.smallest_normal) + slack * share
        eager_error = max(map(size, eager_errors))
        allowed = factor * eager_error + rounding
        assert size(error) <= allowed, (
            f"{name}: {measure} error {size(error):.3e} against float64, allowed {allowed:.3e} = "
            f"{factor} * eager's {eager_error:.3e} + rounding {rounding:.3e} "
            f"({result.dtype}, shape {tuple(result.shape)}, worst at {_where(error)})"
        )


def assert_op_accurate(
    op: Callable[..., Tensor],
    inputs: dict,
    backend: str,
    grad_output: Tensor | None = None,
    wanted: Sequence[str] | None = None,
    check_output: bool = True,
) -> dict[str, Tensor]:
    """Assert the error rule for an op's output and, given `grad_output`, for its gradients.

    Args:
        op: `focal_context`, `modulate` or `focal_modulation`; its reference backend is the baseline.
        inputs: its arguments by name; lists of tensors and values that are no tensors are welcome.
        backend: the one on trial.
        grad_output: the gradient of the output, its shape and dtype.
        wanted: the names of the inputs ("ctx", "weights[0]") that require a gradient; None: all.
        check_output: False where only gradients count.

    Returns:
        "output" and "grad <input>", as the backend gave them.
    """
    call = {"inputs": inputs, "grad_output": grad_output}
    with use_backend(backend):
        results = run(op, **call, wanted=wanted)
    calls = [map_tensors(Tensor.contiguous, call)]
    eager: list[dict[str, Tensor]] = []
    exact: list[dict[str, Tensor]] = []

    def compare(neighbours: int) -> None:
        calls.extend(map_tensors(_nearby, call) for _ in range(1 + neighbours - len(calls)))
        with use_backend("reference"):
            for c in calls[len(eager) :]:
                eager.append(run(op, **c, wanted=wanted))
                exact.append(run(op, **map_tensors(Tensor.double, c), wanted=wanted))
        for name in results if check_output else list(results)[1:]:
            (e, x), *others = [(e[name], x[name]) for e, x in zip(eager, exact, strict=True)]
            factor = FORWARD_FACTOR if name == "output" else BACKWARD_FACTOR
            assert_accurate(f"{op.__name__} on {backend}, {name}", results[name], e, x, factor, others)

    # Of few elements, or of few large ones (the gates' biases), eager often hits all by luck: ask more often.
    for neighbours in (3, 12):
        with contextlib.suppress(AssertionError):
            compare(neighbours)
            return results
    compare(neighbours=48)
    return results


def run(
    op: Callable[..., Tensor],
    inputs: dict,
    grad_output: Tensor | None = None,
    wanted: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """`op(**inputs)` as "output" and, given `grad_output`, the gradients as "grad <input>"."""
    inputs = map_tensors(Tensor.detach, inputs)
    leaves = {name: t for name, t in named_tensors(inputs).items() if wanted is None or name in wanted}
    if grad_output is not None:
        for leaf in leaves.values():
            leaf.requires_grad_()
    output = op(**inputs)
    results = {"output": output.detach()}
    if grad_output is not None:
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_output, materialize_grads=True)
        results |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """`value` with every tensor in its dicts, lists and tuples replaced by `function` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def named_tensors(inputs: dict) -> dict[str, Tensor]:
    """The tensors among an op's arguments: {"ctx": ..., "weights[0]": ...}."""
    named = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, list | tuple):
            named |= {f"{name}[{i}]": v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return named


def _nearby(tensor: Tensor) -> Tensor:
    """Numbers of about the same size, whose roundings fall anew."""
    return (tensor * (1 + torch.rand_like(tensor) / 64)).contiguous()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _where(error: Tensor) -> tuple[int, ...]:
    return tuple(i.item() for i in torch.unravel_index(error.abs().argmax(), error.shape))
