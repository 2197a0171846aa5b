"""Times on a GPU: the layer beside what people use today, its parts beside their bounds, and tiles to choose from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import focalnet_kernels as fk
from focalnet_kernels.bench import roofline
from focalnet_kernels.bench.cases import OPS, Case, cases
from focalnet_kernels.bench.providers import providers
from focalnet_kernels.bench.runner import run_case
from focalnet_kernels.bench.timing import interleaved
from focalnet_kernels.models.layers import PublishedLayer
from focalnet_kernels.testing import make_context_inputs

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
KERNELS = (3, 5, 7)


def _stages(tiny: bool):
    return ((8, 7),) if tiny else STAGES


def ceilings(device: str, dtypes, tiny: bool) -> Iterator[dict]:
    """What this device copies and multiplies at best: the bounds of everything else."""
    yield from roofline.ceilings(dtypes, device, 9, small=tiny)[1]


def timed(device: str, level: str, batches, dtypes, backends, compile_modes, tiny: bool) -> Iterator[dict]:
    """Ops, layers and models beside what people use today: `bench`'s own cases, without the backends that are wrong."""
    for batch in batches:
        if tiny:  # in Triton's interpreter a block has to stand for a model
            level = "block" if level == "model" else level
            layer, whats = PublishedLayer(8, 7, 3, 3), OPS if level == "op" else (level,)
            found = [Case(level, w, "tiny", 1, layer, 0, batch, d, device) for w in whats for d in dtypes]
        else:
            options = {"batch": batch, "size": None, "dtypes": dtypes, "device": device}
            found = cases([level], ["focalnet_tiny_lrf"], **options)
        for case in found:
            who = [p for p in providers(case, compile_modes) if p.backend is None or p.backend in backends]
            rounds = 3 if tiny else 10 if level == "model" else 20
            yield from run_case(case, who, modes=("forward", "forward+backward"), rounds=rounds)


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
                    yield row | {"skipped": str(failure).strip().splitlines()[-1][:100]}
    plan._TENSOR_CORES.update(original)
    plan._SLOTS_PER_MULTIPROCESSOR.update(slots)


def _doubled(value):
    if isinstance(value, list):
        return [_doubled(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def _row(what, mode, shape, dtype, provider) -> dict:
    return {
        "case": what,
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
