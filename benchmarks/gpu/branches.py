"""Times of a block's residual branches on a GPU, and tiles to choose from."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measure import _graph, _row
from processes import in_processes

import focalnet_kernels as fk
from focalnet_kernels.bench.timing import interleaved
from focalnet_kernels.testing import make_mlp_branch_inputs, map_tensors, named_tensors

WIDTHS = ((96, 56), (128, 56), (192, 28), (256, 28), (384, 14), (512, 14), (768, 7))
MODES = ("forward", "forward+backward")


@contextmanager
def _patched(**values):
    launch = importlib.import_module("focalnet_kernels.ops.mlp_branch.triton_launch")
    before = {name: getattr(launch, name) for name in values}
    vars(launch).update(values)
    try:
        yield
    finally:
        vars(launch).update(before)


def _call(op, inputs, mode, grad, backend, **patches):
    leaves = list(named_tensors(inputs).values())

    def call():
        with fk.use_backend(backend), _patched(**patches), torch.set_grad_enabled(mode != "forward"):
            y = op(**inputs)
            if mode != "forward":
                torch.autograd.grad(y, leaves, grad)

    return call


def _inputs(B, C, H, dtype, device):
    inputs = make_mlp_branch_inputs((B, H, H, C), 4 * C, dtype=dtype, device=device)
    inputs = map_tensors(lambda t: t.detach().requires_grad_(), inputs)
    return inputs, torch.randn(B, H, H, C, device=device).to(dtype)


def branches(device: str, tiny: bool, workers: int, until: float) -> Iterator[dict]:
    """The MLP branch: eager, ours in one kernel and around cuBLAS; 128 images, and one in a CUDA graph."""
    if not tiny:
        tasks = [(C, MODES[1], None, torch.bfloat16, device) for C, _ in WIDTHS if C <= 256]
        list(in_processes(compile_tile, tasks, chunk=1, workers=workers, seconds=60, until=until))
    for dtype in (torch.float16,) if tiny else (torch.bfloat16, torch.float32):
        for C, H in ((16, 5),) if tiny else WIDTHS:
            for B in (2,) if tiny else (128, 1):
                if time.monotonic() > until:
                    return
                inputs, grad = _inputs(B, C, H, dtype, device)
                for mode in MODES:
                    calls = {"eager": _call(fk.mlp_branch, inputs, mode, grad, "reference")}
                    if dtype != torch.float32 and C <= 256:
                        calls["ours, one kernel"] = _call(
                            fk.mlp_branch, inputs, mode, grad, "triton", **_patches(C, mode, None)
                        )
                    calls["ours, cuBLAS and Triton"] = _call(
                        fk.mlp_branch, inputs, mode, grad, "triton", in_one_kernel=lambda p: False
                    )
                    if not tiny:
                        calls["ours, cuBLAS and CUDA"] = _call(fk.mlp_branch, inputs, mode, grad, "cuda")
                    if B == 1 and mode == "forward" and device.startswith("cuda"):
                        calls |= {f"{name}, CUDA graph": _graph(call) for name, call in calls.items()}
                    for name, times in interleaved(calls, 2 if tiny else 15, device).items():
                        yield _row("mlp_branch", mode, (B, H, H, C), dtype, name) | times


def _patches(C: int, mode: str, tile: tuple | None) -> dict:
    """To run as one kernel, with a tile of its own."""
    table = {16 if C <= 16 else 128 if C <= 128 else 256: tile}
    name = "_FORWARD" if mode == "forward" else "_BACKWARD"
    return {"in_one_kernel": lambda p: True} | ({} if tile is None else {name: table})


def compile_tile(C: int, mode: str, tile: tuple | None, dtype: torch.dtype, device: str) -> bool:
    """Leaves the kernels of a call in Triton's cache."""
    inputs, grad = _inputs(16, C, 4, dtype, device)
    _call(fk.mlp_branch, inputs, mode, grad, "triton", **_patches(C, mode, tile))()
    return True


def tiles(device: str, tiny: bool, workers: int, until: float) -> Iterator[dict]:
    """The one kernel's tables, line by line: each candidate is checked before it is timed."""
    dtype = torch.float16 if tiny else torch.bfloat16
    for C, H in ((16, 5),) if tiny else ((96, 56), (192, 28)):
        inputs, grad = _inputs(2 if tiny else 128, C, H, dtype, device)
        few = {"x": inputs["x"][:2]}
        with fk.use_backend("reference"), torch.no_grad():
            exact = fk.mlp_branch(**map_tensors(torch.Tensor.double, inputs | few))
        columns = 16 if tiny else 128 if C <= 128 else 256
        candidates = [
            (BN, BM, warps, stages)
            for BN in (64, 128)
            for BM in (32, 64, 128)
            for warps in (4, 8)
            for stages in (1, 2, 3)
            if BN * columns / warps <= 4096 and (BM + BN) * columns <= 49152
        ][: 1 if tiny else None]
        tasks = [(C, mode, tile, dtype, device) for mode in MODES for tile in candidates]
        if not tiny:
            list(in_processes(compile_tile, tasks, chunk=4, workers=workers, seconds=60, until=until))
        for mode in MODES:
            for tile in candidates:
                if time.monotonic() > until:
                    return
                patches = _patches(C, mode, tile)
                row = _row("mlp_branch tile", mode, tuple(inputs["x"].shape), dtype, str(tile))
                try:
                    call = _call(fk.mlp_branch, inputs, mode, grad, "triton", **patches)
                    with torch.no_grad(), fk.use_backend("triton"), _patched(**patches):
                        error = ((fk.mlp_branch(**inputs | few).double() - exact).norm() / exact.norm()).item()
                    assert error < 1e-2, f"relative error {error:.1e}"
                    yield row | interleaved({"": call}, 5, device)[""]
                except Exception as failure:
                    yield row | {"skipped": str(failure).strip().splitlines()[-1][:100]}


def networks(device: str, tiny: bool, workers: int, until: float) -> Iterator[dict]:
    """timm's FocalNet-T as it is, and accelerated by layers and by blocks; a training step also in autocast."""
    import timm

    def model(level: str | None, dtype: torch.dtype) -> torch.nn.Module:
        built = timm.create_model("focalnet_tiny_lrf", drop_path_rate=0.2).to(device, dtype)
        if level is not None:
            fk.accelerate(built, level=level)
        return built

    size = 32 if tiny else 224
    for batch in (1,) if tiny else (128, 1):
        for autocast in (False, True):
            if time.monotonic() > until:
                return
            dtype = torch.float32 if autocast or tiny else torch.bfloat16
            x = torch.randn(batch, 3, size, size, device=device).to(dtype)
            models = {"timm": None, "accelerated layers": "layer", "accelerated blocks": "block"}
            models = {name: model(level, dtype) for name, level in models.items()}

            def step(built, x=x, autocast=autocast):
                built.train()
                with torch.autocast(torch.device(x.device).type, torch.bfloat16, enabled=autocast):
                    y = built(x)
                torch.autograd.grad(y.float().square().mean(), list(built.parameters()))

            def infer(built, x=x, autocast=autocast):
                with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                    built.eval()(x)

            for mode, run in (("forward", infer), ("forward+backward", step)):
                calls = {name: lambda b=built, f=run: f(b) for name, built in models.items()}
                if batch == 1 and mode == "forward" and device.startswith("cuda") and not autocast:
                    calls |= {f"{name}, CUDA graph": _graph(call) for name, call in calls.items()}
                for name, times in interleaved(calls, 2 if tiny else 8, device).items():
                    kind = torch.bfloat16 if not autocast else "autocast"
                    yield _row("focalnet_tiny_lrf", mode, tuple(x.shape), kind, name) | times
