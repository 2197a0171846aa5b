"""The user's functions: bad arguments are named, autocast is followed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import focalnet_kernels as fk
from focalnet_kernels.testing import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    assert_accurate,
    make_context_inputs,
    make_layer_inputs,
    make_modulate_inputs,
    map_tensors,
    named_tensors,
)

MAKE = {
    fk.focal_context: lambda: make_context_inputs((2, 8, 5, 6), [3, 5]),
    fk.modulate: lambda: make_modulate_inputs((2, 8, 5, 6)),
    fk.focal_modulation: lambda: make_layer_inputs((2, 5, 6, 8), [3, 5], postln=True),
}
for_every_op = pytest.mark.parametrize("op", MAKE, ids=lambda op: op.__name__)


def replaced(inputs, name, change):
    """A copy of `inputs` with the tensor `name` ("weights[1]") changed."""
    old = named_tensors(inputs)[name]
    return map_tensors(lambda t: change(t) if t is old else t, inputs)


def refuses(op, inputs, error, name, *fragments):
    with pytest.raises(error) as caught:
        op(**inputs)
    message = str(caught.value)
    assert message.startswith(f"{name}: expected "), message
    for fragment in fragments:
        assert fragment in message, message


# Which tensor, how it is spoilt, the shape that the message expects
def resized(*shape):
    return lambda t: t.new_zeros(shape)


BAD_SHAPES = [
    (fk.focal_context, "ctx", resized(8, 5), "(B, C, *spatial) with one to three spatial axes"),
    (fk.focal_context, "ctx", resized(2, 8, 2, 2, 2, 2), "(B, C, *spatial) with one to three spatial axes"),
    (fk.focal_context, "gates", resized(2, 2, 5, 6), "(2, 3, 5, 6) = (B, L+1, *spatial) for L = 2 weights"),
    (fk.focal_context, "gates", resized(2, 4, 5, 6), "(2, 3, 5, 6) = (B, L+1, *spatial) for L = 2 weights"),
    (fk.focal_context, "gates", resized(2, 3, 6, 5), "(2, 3, 5, 6)"),
    (fk.focal_context, "gates", resized(1, 3, 5, 6), "(2, 3, 5, 6)"),
    (fk.focal_context, "weights[0]", resized(9, 1, 3, 3), "(8, 1, k, k)"),
    (fk.focal_context, "weights[1]", resized(8, 2, 3, 3), "(C, 1, k, k)"),
    (fk.focal_context, "weights[1]", resized(8, 3, 3, 3), "(8, 1, k, k)"),
    (fk.focal_context, "weights[1]", resized(8, 1, 3), "(8, 1, k, k)"),
    (fk.focal_context, "weights[0]", resized(8, 1, 0, 3), "(C, 1, k, k)"),
    (fk.focal_context, "ctx", resized(2, 8, 0, 5), "at least one channel and one pixel"),
    (fk.modulate, "q", resized(8, 5), "(B, C, *spatial) with one to three spatial axes"),
    (fk.modulate, "ctx_all", resized(2, 8, 6, 5), "(2, 8, 5, 6) = q's shape"),
    (fk.modulate, "ctx_all", resized(2, 8, 1, 1), "(2, 8, 5, 6) = q's shape"),
    (fk.modulate, "weight", resized(8, 9), "(8, 8)"),
    (fk.modulate, "weight", resized(8, 8, 3, 3), "(8, 8) or a 1x1 convolution's"),
    (fk.modulate, "weight", resized(8), "(8, 8)"),
    (fk.modulate, "bias", resized(9), "(8,)"),
    (fk.modulate, "bias", resized(8, 1), "(8,)"),
    (fk.focal_modulation, "x", resized(2, 5, 5, 0), "at least one channel and one pixel"),
    (fk.focal_modulation, "x", resized(5, 8), "(B, *spatial, C) with one to three spatial axes"),
    (fk.focal_modulation, "f_weight", resized(18, 8), "(19, 8)"),
    (fk.focal_modulation, "f_bias", resized(18), "(19,) = (2C+L+1,)"),
    (fk.focal_modulation, "focal_weights[0]", resized(7, 1, 3, 3), "(8, 1, k, k)"),
    (fk.focal_modulation, "focal_weights[1]", resized(8, 2, 5, 5), "(C, 1, k, k)"),
    (fk.focal_modulation, "h_weight", resized(8, 16), "(8, 8)"),
    (fk.focal_modulation, "h_bias", resized(1), "(8,)"),
    (fk.focal_modulation, "proj_weight", resized(16, 8), "(8, 8)"),
    (fk.focal_modulation, "proj_bias", resized(7), "(8,)"),
    (fk.focal_modulation, "ln_weight", resized(7), "(8,)"),
    (fk.focal_modulation, "ln_bias", resized(7), "(8,)"),
]


@pytest.mark.parametrize(
    "op, name, change, expected",
    BAD_SHAPES,
    ids=[f"{op.__name__}-{name}-{i}" for i, (op, name, *_) in enumerate(BAD_SHAPES)],
)
def test_wrong_shapes_are_named(op, name, change, expected):
    inputs = replaced(MAKE[op](), name, change)
    got = tuple(named_tensors(inputs)[name].shape)
    refuses(op, inputs, ValueError, name, expected, "got ", str(got))


@for_every_op
def test_wrong_dtypes_are_named(op):
    inputs = MAKE[op]()
    first, *others = named_tensors(inputs)
    for name in others:
        spoilt = replaced(inputs, name, torch.Tensor.half)
        refuses(op, spoilt, TypeError, name, f"{first}'s dtype torch.float32", "got torch.float16")


@for_every_op
def test_wrong_devices_are_named(op):
    inputs = MAKE[op]()
    first, *others = named_tensors(inputs)
    for name in others:
        spoilt = replaced(inputs, name, lambda t: t.to("meta"))
        refuses(op, spoilt, ValueError, name, f"{first}'s device cpu", "got meta")


@for_every_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_not_floating_point_are_refused(op, dtype):
    inputs = map_tensors(lambda t: torch.zeros(t.shape, dtype=dtype), MAKE[op]())
    refuses(op, inputs, TypeError, next(iter(inputs)), "floating-point", str(dtype))


@for_every_op
def test_what_is_no_tensor_is_named(op):
    inputs = MAKE[op]()
    for name in named_tensors(inputs):
        if "[" not in name:
            refuses(op, inputs | {name: [1.0, 2.0]}, TypeError, name, "a tensor", "got list")
            if name not in ("bias", "f_bias", "h_bias", "proj_bias", "ln_weight", "ln_bias"):
                refuses(op, inputs | {name: None}, TypeError, name, "a tensor", "got NoneType")
        else:
            stem = name.split("[")[0]
            levels = [*inputs[stem][:-1], 3.0]
            refuses(op, inputs | {stem: levels}, TypeError, f"{stem}[1]", "a tensor", "got float")


@pytest.mark.parametrize("value", [None, 3], ids=["None", "number"])
@pytest.mark.parametrize("op, name", [(fk.focal_context, "weights"), (fk.focal_modulation, "focal_weights")])
def test_levels_that_are_no_sequence_are_named(op, name, value):
    refuses(op, MAKE[op]() | {name: value}, TypeError, name)


def test_half_a_layer_norm_is_refused():
    inputs = MAKE[fk.focal_modulation]()
    for name in ("ln_weight", "ln_bias"):
        with pytest.raises(ValueError, match="^ln_weight, ln_bias: give both or neither"):
            fk.focal_modulation(**inputs | {name: None})


@for_every_op
def test_a_bad_call_leaves_its_arguments_alone(op):
    inputs = MAKE[op]()
    spoilt = replaced(inputs, list(named_tensors(inputs))[-1], torch.Tensor.half)
    before = copy.deepcopy(spoilt)
    with pytest.raises(TypeError):
        op(**spoilt)
    assert all(map(torch.equal, named_tensors(before).values(), named_tensors(spoilt).values()))


def test_weights_may_be_any_sequence(backend):
    inputs = MAKE[fk.focal_context]()
    with fk.use_backend(backend):
        y = fk.focal_context(**inputs)
        for kind in (tuple, torch.nn.ParameterList):
            assert torch.equal(fk.focal_context(**inputs | {"weights": kind(inputs["weights"])}), y)


# ------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", ["same", torch.float32])
def test_autocast(backend, dtype, input_dtype, seed):
    """float32 parameters, an input of either dtype: result and gradients as eager PyTorch's under autocast."""
    torch.manual_seed(seed)
    layer = fk.FocalModulation(24, 3, 2)
    x = torch.randn(2, 7, 6, 24, dtype=dtype if input_dtype == "same" else input_dtype)

    def autocast(backend):
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        with fk.use_backend(backend), torch.autocast("cpu", dtype):
            y = twin(leaf)
            loss = (y.float() ** 2).mean()
        loss.backward()
        return {"y": y.detach(), "x": leaf.grad} | {k: p.grad for k, p in twin.named_parameters()}

    def baseline(x):
        return eager_autocast(layer, x, dtype), eager_autocast(copy.deepcopy(layer).double(), x.double(), None)

    results, (eager, exact) = autocast(backend), baseline(x)
    others = [baseline(x * (1 + torch.rand_like(x) / 64)) for _ in range(3)]
    for name, result in results.items():
        assert result.dtype == eager[name].dtype, name
        # parameters' gradients are float32 but come of 16-bit sums
        near = [(e[name].to(dtype), x[name]) for e, x in others]
        factor = FORWARD_FACTOR if name == "y" else BACKWARD_FACTOR
        assert_accurate(name, result.to(dtype), eager[name].to(dtype), exact[name], factor, near)


def eager_autocast(layer, x, dtype):
    """The authors' form, written with modules, under PyTorch's own autocast (None: without)."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        q, ctx, gates = layer.f(x).movedim(-1, 1).split((layer.dim, layer.dim, layer.focal_level + 1), 1)
        ctx_all = 0
        for level, focal_layer in enumerate(layer.focal_layers):
            ctx = focal_layer(ctx)
            ctx_all = ctx_all + gates[:, level : level + 1] * ctx
        ctx_global = torch.nn.functional.gelu(ctx.mean((2, 3), keepdim=True))
        ctx_all = ctx_all + gates[:, layer.focal_level :] * ctx_global
        y = layer.proj((q * layer.h(ctx_all)).movedim(1, -1))
        loss = ((y if dtype is None else y.float()) ** 2).mean()
    loss.backward()
    return {"y": y.detach(), "x": x.grad} | {k: p.grad for k, p in layer.named_parameters()}


@for_every_op
def test_autocast_leaves_float64_alone(op):
    inputs = map_tensors(torch.Tensor.double, MAKE[op]())
    with torch.autocast("cpu", torch.bfloat16):
        y = op(**inputs)
    assert y.dtype == torch.float64
    assert torch.equal(y, op(**inputs))


@for_every_op
def test_autocast_on_another_device_changes_nothing(backend, op):
    inputs = MAKE[op]()
    with fk.use_backend(backend):
        with torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available()):
            y = op(**inputs)
        assert y.dtype == torch.float32
        assert torch.equal(y, op(**inputs))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@for_every_op
def test_meta_tensors(op, autocast):
    """Shapes alone, as plain PyTorch gives them, in autocast too: it leaves the meta device alone."""
    inputs = map_tensors(lambda t: t.to("meta").requires_grad_(), MAKE[op]())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = op(**inputs)
        y.sum().backward()
    first = next(iter(inputs.values()))
    assert y.is_meta and y.dtype == torch.float32 and y.shape == first.shape
    assert all(t.grad.is_meta and t.grad.shape == t.shape for t in named_tensors(inputs).values())


class EagerLayer(nn.Module):
    """A layer of plain modules, in whatever dtypes they are."""

    def __init__(self, C, k):
        super().__init__()
        self.f, self.proj, self.h = nn.Linear(C, 2 * C + 2), nn.Linear(C, C), nn.Conv2d(C, C, 1)
        self.level, self.ln = nn.Conv2d(C, C, k, padding=k // 2, groups=C, bias=False), nn.LayerNorm(C)

    def forward(self, x):
        C = x.shape[-1]
        q, ctx, gates = self.f(x).permute(0, 3, 1, 2).split((C, C, 2), 1)
        level = F.gelu(self.level(ctx))
        ctx_all = level * gates[:, :1] + F.gelu(level.mean((2, 3), keepdim=True)) * gates[:, 1:]
        return self.proj(self.ln((q * self.h(ctx_all)).permute(0, 2, 3, 1)))

    def fused(self, x):
        f, h, proj, ln = self.f, self.h, self.proj, self.ln
        return fk.focal_modulation(
            x, f.weight, f.bias, [self.level.weight], h.weight, h.bias, proj.weight, proj.bias,
            ln_weight=ln.weight, ln_bias=ln.bias,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_norm_in_float32(dtype, seed):
    """What layer_norm takes beside 16 bits, and as eager modules compute it."""
    torch.manual_seed(seed)
    layer, x = EagerLayer(8, 3).to(dtype), torch.randn(2, 5, 6, 8).to(dtype)
    layer.ln.float()
    nn.init.normal_(layer.ln.weight)
    results = []
    for forward in (layer, layer.fused):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), tuple(layer.parameters()))))
    for result, expected in zip(*results, strict=True):
        assert result.dtype == expected.dtype
        assert (result - expected).double().norm() <= 4 * torch.finfo(dtype).eps * expected.double().norm()
    with fk.use_backend("cpu"), pytest.raises(fk.BackendError, match="its LayerNorm is torch.float32 in a layer of"):
        layer.fused(x)


@pytest.mark.parametrize(
    "dtype, weight, bias, refused",
    [
        (torch.bfloat16, torch.float16, torch.float16, "ln_weight"),
        (torch.bfloat16, torch.float32, torch.bfloat16, "ln_weight"),
        (torch.bfloat16, torch.bfloat16, torch.float32, "ln_bias"),
        (torch.float64, torch.float32, torch.float32, "ln_weight"),
        (torch.float32, torch.bfloat16, torch.bfloat16, "ln_weight"),
    ],
)
def test_what_layer_norm_refuses_too(dtype, weight, bias, refused):
    layer, x = EagerLayer(8, 3).to(dtype), torch.randn(2, 5, 6, 8, dtype=dtype)
    layer.ln.weight.data, layer.ln.bias.data = layer.ln.weight.data.to(weight), layer.ln.bias.data.to(bias)
    with pytest.raises(RuntimeError):
        layer(x)
    with pytest.raises(TypeError, match=f"^{refused}: expected x's dtype {dtype}, got "):
        layer.fused(x)
