"""Times on a GPU: the layer beside what people use today, its parts beside their bounds, and tiles to choose from."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import focalnet_kernels as fk
from focalnet_kernels.bench.timing import interleaved
from focalnet_kernels.testing import make_context_inputs

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
KERNELS = (3, 5, 7)


def _stages(tiny: bool):
    return ((8, 7),) if tiny else STAGES


def ceilings(device: str, tiny: bool) -> Iterator[dict]:
    """What this device copies and multiplies at best: the bounds of everything else."""
    n = 1 << (16 if tiny else 29)
    a, b = torch.randn(n, device=device, dtype=torch.float16), torch.empty(n, device=device, dtype=torch.float16)
    size = 128 if tiny else 8192
    calls = {"copy": lambda: b.copy_(a)}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(size, size, device=device).to(dtype)
        calls[f"product {str(dtype)[6:]}"] = lambda x=x: x @ x
    for name, times in interleaved(calls, 9, device).items():
        seconds = times["p50_ms"] / 1e3
        rate = 4 * n / seconds / 1e9 if name == "copy" else 2 * size**3 / seconds / 1e9
        yield {"what": "ceiling", "provider": name, "rate": round(rate, 1), "unit": "GB/s or GFLOP/s"} | times


def contexts(device: str, batches, dtypes, backends, tiny: bool) -> Iterator[dict]:
    """focal_context by itself: its share of the bytes that must move (ctx and gates in, ctx_all out)."""
    for C, H in _stages(tiny):
        for B in batches:
            for dtype in dtypes:
                inputs = make_context_inputs((B, C, H, H), KERNELS, dtype=dtype, device=device)
                bytes_moved = (2 * inputs["ctx"].numel() + inputs["gates"].numel()) * dtype.itemsize
                calls = {b: _on(b, lambda i=inputs: fk.focal_context(**i)) for b in ("reference", *backends)}
                with torch.inference_mode():
                    results = interleaved(calls, 5 if tiny else 20, device)
                for name, times in results.items():
                    rate = round(bytes_moved / times["p50_ms"] / 1e6, 1)
                    yield (
                        _row("focal_context", "forward", (B, C, H, H), dtype, name)
                        | {
                            "rate": rate,
                            "unit": "GB/s of unavoidable bytes",
                        }
                        | times
                    )


def layers(device: str, batches, dtypes, backends, compiled: bool, tiny: bool) -> Iterator[dict]:
    """The whole layer against the authors' form, eager and compiled; peak memory of a training step."""
    for C, H in _stages(tiny):
        for B in batches:
            for dtype in dtypes:
                torch.manual_seed(0)
                layer = fk.FocalModulation(C, 3, len(KERNELS)).to(device, dtype)
                x = torch.randn(B, H, H, C, device=device).to(dtype)
                grad = torch.randn_like(x)
                providers = {b: _on(b, copy.deepcopy(layer)) for b in ("reference", *backends)}
                if compiled:
                    eager = copy.deepcopy(layer)
                    compiled_layer = torch.compile(_on("reference", eager), mode="max-autotune-no-cudagraphs")
                    providers["compiled"] = compiled_layer
                for mode in ("forward", "forward+backward"):
                    calls = {name: _step(run, x, grad, mode) for name, run in providers.items()}
                    results = interleaved(calls, 3 if tiny else 20, device, warm=3)
                    for name, times in results.items():
                        peak = _peak(calls[name], device)
                        yield _row("layer", mode, (B, H, H, C), dtype, name) | {"peak_bytes": peak} | times


def models(device: str, batches, dtypes, backends, compiled: bool, tiny: bool) -> Iterator[dict]:
    """FocalNet-T LRF: timm's, compiled and accelerated."""
    timm = importlib.import_module("timm.models.focalnet")
    size, options = 224, {"depths": (2, 2, 6, 2), "embed_dim": 96, "focal_levels": (3, 3, 3, 3)}
    if tiny:
        size, options = 32, {"depths": (1, 1, 1, 1), "embed_dim": 8, "focal_levels": (1, 1, 1, 1)}
    for B in batches:
        for dtype in dtypes:
            torch.manual_seed(0)
            model = timm.FocalNet(**options).to(device, dtype)
            x = torch.randn(B, 3, size, size, device=device).to(dtype)
            target = torch.randint(1000, (B,), device=device)
            providers = {"timm": copy.deepcopy(model)}
            providers["timm channels_last"] = copy.deepcopy(model).to(memory_format=torch.channels_last)
            if compiled:
                providers["timm compiled"] = torch.compile(copy.deepcopy(model))
            for backend in backends:
                ours = copy.deepcopy(model)
                fk.accelerate(ours, backend=backend)
                providers[backend] = ours
                if compiled:
                    providers[f"{backend} compiled"] = torch.compile(copy.deepcopy(ours))
            for mode in ("forward", "forward+backward"):
                calls = {name: _model_step(m, x, target, mode) for name, m in providers.items()}
                for name, times in interleaved(calls, 2 if tiny else 10, device, warm=3).items():
                    rate = round(1e3 * B / times["p50_ms"], 1)
                    row = _row("model", mode, tuple(x.shape), dtype, name) | {"rate": rate, "unit": "images/s"}
                    yield row | {"peak_bytes": _peak(calls[name], device)} | times


def convolutions(device: str, tiny: bool) -> Iterator[dict]:
    """What PyTorch's own depthwise convolutions take: the baselines of the chain."""
    for C, H in _stages(tiny):
        for k in (3, 7):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = torch.randn(2 if tiny else 128, C, H, H, device=device).to(dtype)
                w = torch.randn(C, 1, k, k, device=device).to(dtype)
                last = x.contiguous(memory_format=torch.channels_last)
                calls = {
                    "NCHW": lambda x=x, w=w: F.conv2d(x, w, padding=w.shape[-1] // 2, groups=len(w)),
                    "NHWC": lambda x=last, w=w: F.conv2d(x, w, padding=w.shape[-1] // 2, groups=len(w)),
                }
                for name, times in interleaved(calls, 3 if tiny else 10, device).items():
                    yield _row(f"conv2d depthwise k={k}", "forward", tuple(x.shape), dtype, name) | times


def experiments(device: str, tiny: bool) -> Iterator[dict]:
    """One question each: what the other way of doing a part would take."""
    launch = importlib.import_module("focalnet_kernels.ops.focal_context.triton_launch")
    layer_launch = importlib.import_module("focalnet_kernels.ops.focal_modulation.triton_launch")
    plan = importlib.import_module("focalnet_kernels.ops.focal_context.triton_plan")
    dtype = torch.float16 if tiny else torch.bfloat16
    gelu, tensor_core_dtypes = launch.exact_gelu, plan.TENSOR_CORE_DTYPES

    def chain(inputs, exact, dtypes):
        def call():
            launch.exact_gelu, plan.TENSOR_CORE_DTYPES = (lambda _: exact), dtypes
            try:
                with fk.use_backend("triton"):
                    fk.focal_context(**inputs)
            finally:
                launch.exact_gelu, plan.TENSOR_CORE_DTYPES = gelu, tensor_core_dtypes

        return call

    def calls_of(B, C, H):
        inputs = make_context_inputs((B, C, H, H), KERNELS, dtype=dtype, device=device)
        x = torch.randn(B, H, H, C, device=device).to(dtype)
        tokens, n = B * H * H, 2 * C + len(KERNELS) + 1
        n8, n256 = -(-n // 8) * 8, -(-n // 256) * 256
        wide, square = (torch.randn(rows, C, device=device).to(dtype) for rows in (n256, C))
        q, ctx_all, bias = x.movedim(-1, 1), torch.randn_like(x).movedim(-1, 1), wide[:, 0].contiguous()
        return {
            "chain: bands, logistic GELU": chain(inputs, False, tensor_core_dtypes),
            "chain: bands, erf GELU": chain(inputs, True, tensor_core_dtypes),
            "chain: tap by tap": chain(inputs, False, ()),
            "f: ours, planes": lambda: layer_launch._linear_f(x, wide[:n], bias[:n], tokens),
            "f: cuBLAS, tokens": lambda: F.linear(x, wide[:n], bias[:n]),
            "f: cuBLAS, padded to 8": lambda: F.linear(x, wide[:n8], bias[:n8]),
            "f: cuBLAS, padded to 256": lambda: F.linear(x, wide, bias),
            "h, q*: fused": _on("triton", lambda: fk.modulate(q, ctx_all, square)),
            "h, q*: cuBLAS and a product": lambda: F.linear(ctx_all.movedim(1, -1), square) * x,
            "proj: cuBLAS": lambda: F.linear(x, square),
        }

    for C, H in _stages(tiny):
        B = 2 if tiny else 128
        with torch.inference_mode():
            for name, times in interleaved(calls_of(B, C, H), 2 if tiny else 10, device).items():
                yield _row("experiment", "forward", (B, C, H, H), dtype, name) | times


def tiles(device: str, tiny: bool) -> Iterator[dict]:
    """focal_context's tile table, line by line: each candidate is checked before it is timed."""
    plan = importlib.import_module("focalnet_kernels.ops.focal_context.triton_plan")
    original, slots = dict(plan._TENSOR_CORES), dict(plan._SLOTS_PER_MULTIPROCESSOR)
    candidates = [
        (channels, 16, rows, warps, registers)
        for channels in (2, 4, 8)
        for rows in (2, 4, 8)
        for warps in (2, 4, 8)
        for registers in (128, 168, 255)
        if channels >= warps / 2 and channels * rows <= 32
    ]
    dtype = torch.float16 if tiny else torch.bfloat16
    for C, H in _stages(tiny):
        B = 2 if tiny else 128
        inputs = make_context_inputs((B, C, H, H), KERNELS, dtype=dtype, device=device)
        with fk.use_backend("reference"):
            exact = fk.focal_context(**{k: _doubled(v) for k, v in inputs.items()})
        for tile in candidates[:1] if tiny else candidates:
            for per_processor in (2, 3, 4, 6):
                plan._TENSOR_CORES.update({key: tile for key in original if not key[0]})
                plan._SLOTS_PER_MULTIPROCESSOR[False] = per_processor
                row = _row("tile", "forward", (B, C, H, H), dtype, f"{tile} x{per_processor}")
                try:
                    call = _on("triton", lambda i=inputs: fk.focal_context(**i))
                    with torch.inference_mode():
                        error = ((call().double() - exact).norm() / exact.norm()).item()
                        assert error < 1e-2, f"relative error {error:.1e}"
                        yield row | interleaved({"": call}, 10, device)[""]
                except Exception as failure:
                    yield row | {"unit": str(failure).strip().splitlines()[-1][:100]}
    plan._TENSOR_CORES.update(original)
    plan._SLOTS_PER_MULTIPROCESSOR.update(slots)


def _doubled(value):
    if isinstance(value, list):
        return [_doubled(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def _row(what, mode, shape, dtype, provider) -> dict:
    return {
        "what": what,
        "mode": mode,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider,
    }


def _on(backend, function):
    def call(*args):
        with fk.use_backend(backend):
            return function(*args)

    return call


def _step(run, x, grad, mode):
    def forward():
        with torch.inference_mode():
            run(x)

    def both():
        run(x.detach().requires_grad_()).backward(grad)

    return forward if mode == "forward" else both


def _model_step(model, x, target, mode):
    def forward():
        model.eval()
        with torch.inference_mode():
            model(x)

    def both():
        model.train()
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x).float(), target).backward()

    return forward if mode == "forward" else both


def _peak(call, device) -> int | None:
    """Bytes that a call allocates at most, beyond what was there."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
