"""Whether a GPU's kernels are right on the device itself: what the interpreter and the compiler cannot show."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import (
    LAYOUTS,
    assert_op_accurate,
    make_context_inputs,
    make_focal_branch_inputs,
    make_layer_inputs,
    make_mlp_branch_inputs,
    make_modulate_inputs,
    named_tensors,
    run,
)

SANITIZER_SECONDS = 150
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = [
    # (B, *spatial, C), kernels, post-LN
    ((2, 56, 56, 96), (3, 5, 7), False),
    ((4, 28, 28, 192), (3, 5), False),
    ((5, 14, 14, 384), (3, 5, 7), False),
    ((19, 7, 7, 768), (3, 5, 7, 9), False),
    ((2, 24, 24, 352), (3, 5, 7), True),
    ((3, 12, 12, 128), (5, 7, 9), True),
    ((1, 50, 84, 96), (9, 11, 13), False),
    ((2, 9, 11, 33), (3, 5), True),
    ((2, 1, 1, 40), (3, 5), False),
    ((3, 100, 24), (3, 5, 7), False),
    ((1, 4, 9, 10, 32), (3, 5), False),
    ((1, 200, 334, 96), (3, 5, 7), False),
    ((0, 8, 8, 16), (3,), False),
]
BRANCHES = [
    # (B, *spatial, C), hidden channels, post-norm
    ((2, 28, 28, 96), 384, False),
    ((3, 14, 14, 128), 512, True),
    ((4, 14, 14, 192), 768, False),
    ((2, 9, 11, 33), 71, True),
    ((3, 100, 24), 96, False),
    ((5, 7, 7, 384), 1536, True),
    ((2, 7, 7, 768), 3072, False),
    ((1, 1, 1, 16), 64, False),
]


class Skipped(Exception):
    """A check that this machine cannot make."""


def names(backend: str, device: str, tiny: bool) -> list[str]:
    return [name for name, _ in checks(backend, device, tiny)]


def verdict(index: int, backend: str, device: str, tiny: bool, emulated: bool) -> str:
    """What the check of that index in `names` finds: "right", "wrong: ...", "failed: ..." or "skipped: ...".

    Raises:
        RuntimeError: the GPU faulted, and this process cannot go on.
    """
    if emulated:
        emulate_cuda()
    try:
        list(checks(backend, device, tiny))[index][1]()
    except Exception as error:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()  # raises from now on where the GPU faulted
        kind = {AssertionError: "wrong", Skipped: "skipped"}.get(type(error), f"failed: {type(error).__name__}")
        return f"{kind}: {' '.join(str(error).split())[:300]}"
    return "right"


def emulate_cuda() -> None:
    """Let the CUDA kernels take CPU tensors from here on: see tests/cuda_shim."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    import cuda_shim

    cuda_shim.emulate()


def checks(backend: str, device: str, tiny: bool) -> Iterator[tuple[str, callable]]:
    """(name, check) pairs, what takes long first; a check raises AssertionError where the backend is wrong."""
    layers = [((2, 5, 6, 16), (3, 5), False)] if tiny else LAYERS
    dtypes = (torch.float32, torch.float16) if tiny else DTYPES
    if torch.device(device).type == "cuda":
        for tool in ("memcheck", "racecheck"):
            yield f"compute-sanitizer {tool}", lambda t=tool: _sanitizer(backend, t)
        yield "more than 65,535 images", lambda: _slices(backend, device, (70_001, 4, 4, 8), 70_000)
        yield "more than 2^31 elements", lambda: _slices(backend, device, (5600, 64, 64, 96), 5599)
        yield "CUDA graph", lambda: _graph(backend, device)
        yield "another stream", lambda: _stream(backend, device)
    for shape in [(2, 5, 6, 8)] if tiny else [(64, 56, 56, 96), (1, 200, 334, 96), (128, 7, 7, 768)]:
        times = 3 if tiny else 200
        name = f"{times} repeats, bitwise, {'x'.join(map(str, shape))}"
        yield name, lambda s=shape, n=times: _repeats(backend, device, n, s)
    for shape, kernels, postln in layers:
        for dtype in dtypes:
            name = f"layer {'x'.join(map(str, shape))} k={kernels}{' postln' if postln else ''} {str(dtype)[6:]}"
            yield name, lambda s=shape, k=kernels, p=postln, d=dtype: _layer(backend, device, s, k, d, postln=p)
    yield from _branches(backend, device, tiny, dtypes)
    if not tiny:
        yield "whole networks", lambda: _networks(backend, device)
    for layout in LAYOUTS:
        for dtype in dtypes[-1:] if tiny else dtypes:
            yield f"strides {layout} {str(dtype)[6:]}", lambda lay=layout, d=dtype: _layouts(backend, device, lay, d)
    for shape in [(2, 5, 6, 8)] if tiny else [(8, 56, 56, 96), (1, 200, 334, 16), (1, 4, 100_000, 8)]:
        for dtype in dtypes:
            name = f"sums of one sign, {'x'.join(map(str, shape))} {str(dtype)[6:]}"
            yield name, lambda s=shape, d=dtype: _one_sign(backend, device, s, d)
    yield "autocast", lambda: _autocast(backend, device)


def _branches(backend, device, tiny, dtypes):
    for shape, hidden, post in [((2, 5, 6, 16), 64, False)] if tiny else BRANCHES:
        for dtype in dtypes:
            for residual_dtype in {dtype, torch.float32}:
                name = f"{'x'.join(map(str, shape))} {hidden}{' post' if post else ''} {str(dtype)[6:]}"
                name += "" if residual_dtype == dtype else f" around {str(residual_dtype)[6:]}"
                options = {"dtype": dtype, "residual_dtype": residual_dtype, "post_norm": post, "device": device}
                options |= {"gamma": True, "drop_path": True, "mean": 0.5}
                yield (
                    f"mlp {name}",
                    lambda s=shape, h=hidden, o=options: _branch(
                        backend, fk.mlp_branch, make_mlp_branch_inputs(s, h, **o)
                    ),
                )
                yield (
                    f"focal branch {name}",
                    lambda s=shape, o=options: _branch(
                        backend, fk.focal_branch, make_focal_branch_inputs(s, (3, 5), **o)
                    ),
                )


def _branch(backend, op, inputs):
    wanted = [name for name in named_tensors(inputs) if name != "drop_path"]
    grad = torch.randn_like(inputs["x"])
    assert_op_accurate(op, inputs, backend, grad, wanted)
    inputs |= {"gamma": None, "drop_path": None}
    assert_op_accurate(op, inputs, backend, grad, [name for name in wanted if name != "gamma"])


def _networks(backend, device):
    """timm's model as it is and accelerated, drop path on, plain and in autocast: the same up to rounding."""
    timm = _timm()
    torch.manual_seed(0)
    for autocast in (False, True):
        for options in ({}, {"use_post_norm": True, "layerscale_value": 0.5}):
            model = timm.create_model("focalnet_tiny_lrf", drop_path_rate=0.3, **options).to(device).train()
            x = torch.randn(4, 3, 96, 96, device=device)

            def step(model, x=x, autocast=autocast):
                torch.manual_seed(1)
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                    y = model(x)
                return torch.autograd.grad(y.float().square().mean(), list(model.parameters()))

            with torch.backends.cudnn.flags(allow_tf32=False):  # or convolutions of float32 have ten bits
                with fk.use_backend("reference"):
                    expected = step(model)
                report = fk.accelerate(model, backend)
                assert len(report.blocks) == 12 and not report.kept_blocks, report
                accelerated = step(model)
            limit = 0.1 if autocast else 2e-3
            for found, value in zip(accelerated, expected, strict=True):
                assert (found - value).norm() <= limit * value.norm() + 1e-6, (autocast, options)


def _timm():
    try:
        import timm
    except ImportError:
        raise Skipped("timm is not installed") from None
    return timm


def _layer(backend, device, shape, kernels, dtype, **options):
    inputs = make_layer_inputs(shape, kernels, dtype=dtype, device=device, **options)
    assert_op_accurate(fk.focal_modulation, inputs, backend, torch.randn(shape, device=device).to(dtype))


def _one_sign(backend, device, shape, dtype):
    """Sums over many pixels show their rounding where the numbers do not cancel."""
    inputs = make_layer_inputs(shape, (3, 5), dtype=dtype, device=device)
    inputs["x"] = inputs["x"].abs()
    grad = torch.rand(shape, device=device) / torch.Size(shape).numel() ** 0.5  # no sum leaves float16's range
    assert_op_accurate(fk.focal_modulation, inputs, backend, grad.to(dtype))


def _layouts(backend, device, layout, dtype):
    shape, options = (2, 18, 7, 9), {"dtype": dtype, "layout": layout, "device": device}
    grad = torch.randn(shape, device=device).to(dtype)
    assert_op_accurate(fk.focal_context, make_context_inputs(shape, [3, 5], **options), backend, grad)
    assert_op_accurate(fk.modulate, make_modulate_inputs(shape, **options), backend, grad)


def _repeats(backend, device, times, shape):
    """A race shows as a changing answer: the scratch planes and their barriers above all."""
    inputs = make_layer_inputs(shape, (3, 5, 7), dtype=torch.float16, device=device)
    grad = torch.randn(shape, device=device).half()
    with fk.use_backend(backend):
        first = run(fk.focal_modulation, inputs, grad)
        for _ in range(times):
            again = run(fk.focal_modulation, inputs, grad)
            for name in first:
                assert torch.equal(first[name], again[name]), f"{name} changes from run to run"


def _autocast(backend, device):
    if backend == "triton" and torch.device(device).type == "cpu":
        raise Skipped("autocast on a CPU means bfloat16, which the interpreter cannot")
    inputs = make_layer_inputs((2, 8, 8, 32), (3, 5), device=device)
    with fk.use_backend(backend), torch.autocast(torch.device(device).type, torch.bfloat16):
        y = fk.focal_modulation(**inputs)
    with fk.use_backend("reference"), torch.autocast(torch.device(device).type, torch.bfloat16):
        eager = fk.focal_modulation(**inputs)
    assert y.dtype == eager.dtype == torch.bfloat16
    assert (y - eager).float().norm() <= 0.02 * eager.float().norm()


def _slices(backend, device, shape, image):
    """A batch too large for 32-bit offsets or grid axes: its last image must be as it is alone."""
    torch.manual_seed(0)
    layer = fk.FocalModulation(shape[-1], 3, 2).to(device, torch.bfloat16)
    with torch.inference_mode(), fk.use_backend(backend):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        y = layer(x)
        for i in (0, image // 2, image):
            torch.testing.assert_close(y[i : i + 1], layer(x[i : i + 1].clone()), rtol=2e-2, atol=2e-2)


def _graph(backend, device):
    layer = fk.FocalModulation(96, 3, 3).to(device, torch.bfloat16)
    x = torch.randn(2, 28, 28, 96, device=device, dtype=torch.bfloat16)
    with torch.inference_mode(), fk.use_backend(backend):
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


def _stream(backend, device):
    layer = fk.FocalModulation(96, 3, 3).to(device, torch.bfloat16)
    other = copy.deepcopy(layer)
    x = torch.randn(8, 28, 28, 96, device=device, dtype=torch.bfloat16)
    with torch.inference_mode(), fk.use_backend(backend):
        y = layer(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            on_another = other(x)
        torch.cuda.synchronize()
        assert torch.equal(y, on_another)


def _sanitizer(backend, tool):
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if path is None:
        raise Skipped("compute-sanitizer is not installed")
    program = (
        "import torch, focalnet_kernels as fk\n"
        "from focalnet_kernels.nn.block import FocalNetBlock\n"
        f"fk.use_backend({backend!r})\n"
        "shapes = (2, 9, 10, 24), (17, 7, 7, 8), (1, 5, 70, 8), (1, 20, 140, 8), (2, 9, 14, 8)\n"
        "for shape, window, level in zip(shapes, (3, 3, 3, 3, 9), (2, 3, 2, 2, 3)):\n"
        "    for dtype in (torch.bfloat16, torch.float32):\n"
        "        layer = fk.FocalModulation(shape[-1], window, level).to('cuda', dtype)\n"
        "        x = torch.randn(shape, device='cuda', dtype=dtype, requires_grad=True)\n"
        "        layer(x).sum().backward()\n"
        "        block = FocalNetBlock(shape[-1], use_layerscale=True, use_postln=window == 9).to('cuda', dtype)\n"
        "        block(x).sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = [path, "--tool", tool, "--error-exitcode", "3", sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Skipped(f"compute-sanitizer was not done in {SANITIZER_SECONDS} seconds") from None
    said = done.stdout + done.stderr
    if "ERROR SUMMARY" not in said and "RACECHECK SUMMARY" not in said:
        raise Skipped(f"compute-sanitizer does not run: {said[-200:]}")
    assert done.returncode == 0, said[-300:]
