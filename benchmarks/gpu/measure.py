"""Times on a GPU: the layer beside what people use today, its parts beside their bounds, and tiles to choose from."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from processes import in_processes

import focalnet_kernels as fk
from focalnet_kernels.bench import roofline
from focalnet_kernels.bench.cases import OPS, Case, cases
from focalnet_kernels.bench.layers import PublishedLayer
from focalnet_kernels.bench.providers import AUTHORS, providers
from focalnet_kernels.bench.runner import run_case
from focalnet_kernels.bench.steps import calls, results
from focalnet_kernels.bench.timing import interleaved
from focalnet_kernels.testing import make_context_inputs, make_layer_inputs, map_tensors

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
KERNELS = (3, 5, 7)
MODES = ("forward", "forward+backward")
LARGEST = 10**8  # elements of an input: no 128 images of 384 x 384 pixels


def _stages(tiny: bool):
    return ((8, 7),) if tiny else STAGES


def ceilings(device: str, dtypes, tiny: bool) -> Iterator[dict]:
    """What this device copies and multiplies at best: the bounds of everything else."""
    yield from roofline.ceilings(dtypes, device, 9, small=tiny)[1]


@dataclass(frozen=True)
class Block:
    """Cases of `bench` that are prepared together and then timed one after the other.

    Args:
        all_providers: also the providers that are neither eager PyTorch as dispatch knows it nor ours.
        compiled: also torch.compile's forms.
    """

    cases: list[Case]
    all_providers: bool = False
    compiled: bool = False

    def rows(self, backends, compile: bool, workers: int | None, until: float) -> Iterator[dict]:
        """`run_case`'s, until the time is over; a case is timed as a whole or not at all.

        Args:
            backends: of ours that are timed.
            workers: processes in which kernels are compiled beforehand, which take half of the time at most; or None.
        """
        modes = ("default",) if compile and self.compiled else ()
        todo = []
        for case in self.cases:
            of_case = [p for p in providers(case, modes) if p.backend is None or p.backend in backends]
            plain = (AUTHORS, *(f"{AUTHORS} compiled" for _ in modes))
            todo.append((case, [p for p in of_case if self.all_providers or p.backend or p.name in plain]))
        late = set()
        if workers:
            tasks = [(case, p.name, modes) for case, who in todo for p in who if p.backend == "triton" or p.compiled]
            half = (time.monotonic() + until) / 2
            done = in_processes(compile_kernels, tasks, chunk=3, workers=workers, seconds=150, until=half)
            late = {task[:2] for task, answer in done if answer is None}
        for case, who in todo:
            if time.monotonic() > until:
                return
            in_time = [p for p in who if not (p.compiled and (case, p.name) in late)]
            for p in who:
                if p not in in_time:
                    yield case.labels() | {"provider": p.name, "skipped": "torch.compile was not done in time"}
            rounds = 3 if case.target == "tiny" else 10 if case.level == "model" else 20
            yield from run_case(case, in_time, modes=MODES, rounds=rounds)


def _layers(dtypes, device, tiny) -> Iterator[Block]:
    """The headline: FocalNet-T's layers beside all others'."""
    for batch in _batches((128, 1), tiny):
        yield Block(_cases(["layer"], ["focalnet_tiny_lrf"], batch, dtypes[:1], device, tiny), True, True)


def _models(dtypes, device, tiny) -> Iterator[Block]:
    level = "block" if tiny else "model"  # in an interpreter a block has to stand for a model
    for batch in _batches((128,), tiny):
        yield Block(_cases([level], ["focalnet_tiny_lrf"], batch, dtypes[:1], device, tiny), True, True)


def _dispatch(dtypes, device, tiny) -> Iterator[Block]:
    """Every published layer and its ops, by eager PyTorch and by ours: what dispatch's table is made of."""
    targets = [
        f"focalnet_{name}" for name in ("tiny_lrf", "base_lrf", "large_fl4", "tiny_srf", "base_srf", "large_fl3")
    ]
    for dtype in dtypes:
        for batch in _batches((128, 1, 32), tiny):
            found = {}  # FocalNet-S has the layers of T; modulate has those of either range
            for case in _cases(["layer", "op"], targets, batch, [dtype], device, tiny):
                layer = case.layer if case.what != "modulate" else (case.layer.dim, case.layer.spatial)
                if prod(case.shape) <= LARGEST:
                    found.setdefault((case.what, layer), case)
            yield Block(list(found.values()), compiled=batch == 128 and dtype == dtypes[0])


def _detection(dtypes, device, tiny) -> Iterator[Block]:
    """Maps of 200 x 334 and their like: what strips cost."""
    yield Block(_cases(["layer"], ["detection"], 1, dtypes[:1], device, tiny))


BLOCKS = {"layers": _layers, "dispatch": _dispatch, "models": _models, "detection": _detection}


def _batches(batches, tiny: bool) -> tuple[int, ...]:
    return (2, 1) if tiny else batches


def _cases(levels, targets, batch, dtypes, device, tiny) -> list[Case]:
    if not tiny:
        return list(cases(levels, targets, batch=batch, size=None, dtypes=dtypes, device=device))
    layer = PublishedLayer(8, 7, 3, 3)
    whats = [(level, what) for level in levels for what in (OPS if level == "op" else (level,))]
    return [Case(level, what, "tiny", 1, layer, (), batch, d, device) for level, what in whats for d in dtypes]


def compile_kernels(case: Case, name: str, modes: tuple[str, ...]) -> bool:
    """Leaves a provider's kernels for a case in the caches of Triton and torch.compile."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the other cores have processes of their own
    subject = next(p for p in providers(case, modes) if p.name == name).build(case, False)
    results(subject)
    calls(subject, "forward")()
    return True


def convolutions(device: str, tiny: bool) -> Iterator[dict]:
    """What PyTorch's own depthwise convolutions take, with cuDNN and without: the baselines of the chain."""
    dtypes = {torch.bfloat16: (3, 5, 7, 9), torch.float16: (7,), torch.float32: (7,)}
    for C, H in _stages(tiny):
        for dtype, k in ((dtype, k) for dtype, kernels in dtypes.items() for k in kernels):
            x = torch.randn(2 if tiny else 128, C, H, H, device=device).to(dtype)
            w = torch.randn(C, 1, k, k, device=device).to(dtype)
            calls = {
                (mode, order): _convolution(mode, x.contiguous(memory_format=to), w)
                for mode in ("forward", "input's gradient", "weights' gradient")
                for order, to in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last))
            }
            for cudnn in (True, False):
                with torch.backends.cudnn.flags(enabled=cudnn):
                    measured = interleaved(calls, 3 if tiny else 5, device)
                for (mode, order), times in measured.items():
                    name = order if cudnn else f"{order}, no cuDNN"
                    yield _row(f"conv2d depthwise k={k}", mode, tuple(x.shape), dtype, name) | times


def _convolution(mode: str, x: torch.Tensor, w: torch.Tensor):
    padding, C = [w.shape[-1] // 2] * 2, len(w)
    wanted = [mode == "input's gradient", mode == "weights' gradient", False]
    if mode == "forward":
        return lambda: F.conv2d(x, w, padding=padding, groups=C)
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(x, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], C, wanted)


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

    def chain_backward(inputs, want_ctx, want_weights):
        ctx, gates, weights = inputs["ctx"], inputs["gates"], inputs["weights"]
        ctx_all, mean = launch.focal_context_fwd_impl(ctx, gates, weights, False)
        grads = torch.empty_like(ctx) if want_ctx else None, torch.empty_like(gates)
        return lambda: launch.context_bwd(ctx_all, ctx, gates, weights, mean, False, *grads, want_weights)

    def calls_of(B, C, H):
        inputs = make_context_inputs((B, C, H, H), KERNELS, dtype=dtype, device=device)
        x = torch.randn(B, H, H, C, device=device).to(dtype)
        tokens, n = B * H * H, 2 * C + len(KERNELS) + 1
        n8, n256 = -(-n // 8) * 8, -(-n // 256) * 256
        wide, square = (torch.randn(rows, C, device=device).to(dtype) for rows in (n256, C))
        q, ctx_all, bias = x.movedim(-1, 1), torch.randn_like(x).movedim(-1, 1), wide[:, 0].contiguous()
        q_planes, ctx_planes = (layer_launch._as_map(m.movedim(1, 0).reshape(C, -1), x) for m in (q, ctx_all))
        return {
            "chain: bands, logistic GELU": chain(inputs, False, tensor_core_dtypes),
            "chain: bands, erf GELU": chain(inputs, True, tensor_core_dtypes),
            "chain: tap by tap": chain(inputs, False, ()),
            "chain, backward: all": chain_backward(inputs, True, True),
            "chain, backward: without the weights": chain_backward(inputs, True, False),
            "chain, backward: without ctx": chain_backward(inputs, False, True),
            "f: ours, planes": lambda: layer_launch._linear_f(x, wide[:n], bias[:n], tokens),
            "f: cuBLAS, tokens": lambda: F.linear(x, wide[:n], bias[:n]),
            "f: cuBLAS, padded to 8": lambda: F.linear(x, wide[:n8], bias[:n8]),
            "f: cuBLAS, padded to 256": lambda: F.linear(x, wide, bias),
            "h, q*: fused": _on("triton", lambda: fk.modulate(q, ctx_all, square)),
            "h, q*: fused, planes": _on("triton", lambda: fk.modulate(q_planes, ctx_planes, square)),
            "h, q*: cuBLAS and a product": lambda: F.linear(ctx_all.movedim(1, -1), square) * x,
            "proj: cuBLAS": lambda: F.linear(x, square),
        }

    for C, H in _stages(tiny):
        B = 2 if tiny else 128
        with torch.inference_mode():
            for name, times in interleaved(calls_of(B, C, H), 2 if tiny else 10, device).items():
                mode = "backward" if "backward" in name else "forward"
                yield _row("experiment", mode, (B, C, H, H), dtype, name) | times


def latency(backends: list[str], device: str, tiny: bool) -> Iterator[dict]:
    """One image through a layer: what is left of it when launches cost nothing, in a CUDA graph."""
    dtype = torch.float16 if tiny else torch.bfloat16
    for C, H in _stages(tiny):
        inputs = make_layer_inputs((1, H, H, C), KERNELS, dtype=dtype, device=device)
        names = {AUTHORS: "reference"} | {f"ours {backend}": backend for backend in backends}
        calls = {name: _on(b, lambda i=inputs: fk.focal_modulation(**i)) for name, b in names.items()}
        with torch.inference_mode():
            for name, call in list(calls.items()) if device.startswith("cuda") else ():
                try:
                    calls[f"{name}, CUDA graph"] = _graph(call)
                except Exception as failure:
                    reason = str(failure).strip().splitlines()[-1][:100]
                    row = _row("layer", "forward", (1, H, H, C), dtype, f"{name}, CUDA graph")
                    yield row | {"skipped": reason}
            for name, times in interleaved(calls, 3 if tiny else 50, device).items():
                yield _row("layer", "forward", (1, H, H, C), dtype, name) | times


def _graph(call):
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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


def kernels(backends: list[str], device: str, tiny: bool) -> Iterator[dict]:
    """Where a layer's time goes: every kernel that a forward and a backward launch, by PyTorch's profiler."""
    dtype = torch.float16 if tiny else torch.bfloat16
    for C, H in _stages(tiny):
        shape = (2 if tiny else 128, H, H, C)
        inputs = make_layer_inputs(shape, KERNELS, dtype=dtype, device=device)
        inputs = map_tensors(lambda t: t.detach().requires_grad_(), inputs)
        grad = torch.randn(shape, device=device).to(dtype)
        for name, backend in ({AUTHORS: "reference"} | {f"ours {b}": b for b in backends}).items():
            forward = _on(backend, lambda i=inputs: fk.focal_modulation(**i))
            for mode in ("forward", "backward"):
                for kernel, count, us in _profile(forward, grad, mode, device, 1 if tiny else 5):
                    row = _row(f"kernel {kernel[:90]}", mode, shape, dtype, name)
                    yield row | {"p50_ms": round(us / 1e3, 4), "result": f"{count} calls"}


def _profile(forward, grad, mode: str, device: str, times: int) -> list[tuple[str, int, float]]:
    """(kernel, its calls, microseconds in all) of one forward or backward, what takes longest first."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = torch.device(device).type == "cuda"
    forward().backward(grad)
    outputs = [forward() for _ in range(times)] if mode == "backward" else []
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        for i in range(times):
            outputs[i].backward(grad) if outputs else forward()
        if on_gpu:
            torch.cuda.synchronize()
    events = [(e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total)
              for e in profiler.key_averages()]  # fmt: skip
    events = [(key, count // times, total / times) for key, count, total in events if count >= times and total > 0]
    return sorted(events, key=lambda event: -event[2])
