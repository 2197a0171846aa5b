"""Autocast and loss scaling with accelerated layers of other people, beside their own forward."""

import copy

import pytest
import torch
from integrations.foreign_layers import BUILD, build, example
from models.foreign import small_config, timm_model

import focalnet_kernels as fk
from focalnet_kernels.testing import BACKWARD_FACTOR, FORWARD_FACTOR, assert_accurate

QUICK = ("detrex", "timm", "transformers")  # one of each way to keep the parts


def output_and_gradients(layer, x, dtype):
    """Under autocast to `dtype` (None: without)."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = layer(x)
    (y if dtype is None else y.float()).square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in BUILD]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(form, dtype, backend, seed):
    """float32 parameters and input: dtypes as their own forward's under autocast, errors within the rule."""
    torch.manual_seed(seed)
    layer, x = build(form), example(form)
    double = copy.deepcopy(layer).double()
    inputs = [x, *(x * (1 + torch.rand_like(x) / 64) for _ in range(3))]
    eager = [output_and_gradients(layer, t, dtype) for t in inputs]
    exact = [output_and_gradients(double, t.double(), None) for t in inputs]
    fk.accelerate(layer, backend)
    for name, result in output_and_gradients(layer, x, dtype).items():
        assert result.dtype == eager[0][name].dtype, name
        # parameters' gradients are float32 but come of 16-bit sums
        (e, x64), *near = [(e[name].to(dtype), x64[name]) for e, x64 in zip(eager, exact, strict=True)]
        factor = FORWARD_FACTOR if name == "y" else BACKWARD_FACTOR
        assert_accurate(name, result.to(dtype), e, x64, factor, near)


def trained(model, batches, scaler=None):
    """Parameters after one step of SGD per batch, under autocast to float16 with a scaler."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
            loss = model(x).float().square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_grad_scaler(backend, seed):
    torch.manual_seed(seed)
    model = timm_model(small_config(img_size=32)).float().train()
    batches = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    expected = trained(model, batches)
    fk.accelerate(model, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for name, value in trained(model, batches, scaler).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-3)
    assert scaler.get_scale() == 256.0  # no step was skipped


def test_grad_scaler_skips_an_overflow(backend, seed):
    """An infinite gradient must come through as one, or the step would be taken."""
    torch.manual_seed(seed)
    layer = fk.FocalModulation(8, 3, 2)
    before = copy.deepcopy(layer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with fk.use_backend(backend):
        after = trained(layer, [torch.randn(2, 5, 4, 8) * 30], scaler)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert scaler.get_scale() == 2.0**29


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_large_activations(backend, dtype, seed):
    """Nothing overflows that does not in eager PyTorch: contexts whose sum over the map passes float16's 65504."""
    torch.manual_seed(seed)
    layer, C = build("timm", C=16), 16
    with torch.no_grad():
        layer.f.weight.abs_()
        layer.f.weight[:C] *= 0.01
        layer.f.weight[2 * C :] *= 0.01
        for conv, _ in layer.focal_layers:
            conv.weight.abs_()
    x = 20 + example("timm", C=C, H=60, W=56)
    assert layer.f(x)[:, C : 2 * C].sum((2, 3)).median() > 65504
    eager = output_and_gradients(layer, x, dtype)
    fk.accelerate(layer, backend)
    for name, result in output_and_gradients(layer, x, dtype).items():
        far = eager[name].abs() < 0.9 * torch.finfo(dtype).max  # nearer to it, a rounding decides
        assert result[far].isfinite().all(), name
    assert eager["y"].isfinite().all(), "nothing is finite: this test cannot fail"
