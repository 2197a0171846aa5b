"""Checks a case's providers, then times them in turns; unavailable or inaccurate providers are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..testing import BACKWARD_FACTOR, FORWARD_FACTOR, SLACK
from .cases import Case
from .memory import HostMemory, cuda_peak_bytes, saved_bytes
from .providers import Provider, Subject
from .providers import providers as all_providers
from .roofline import Ceilings, work
from .steps import MODES, calls, results
from .timing import interleaved, ready

WARM = 2  # rounds
# not ours to judge: they only have to be the same function. In float32 a sum over 25,000 tokens in another order was
# ten times eager's error, and another function is still thousands of times
OTHERS_FACTOR = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}


def run_case(
    case: Case,
    providers: Sequence[Provider],
    *,
    modes: Sequence[str] = MODES,
    rounds: int = 9,
    ceilings: Ceilings | None = None,
    host_memory: HostMemory | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[dict]:
    """A row for each mode and provider: times, or under "skipped" why there are none.

    Args:
        modes: of `MODES`. "forward" is inference; the others reset the gradients and fill them, as training does.
        rounds: in which every provider has one turn.
        ceilings: for the share of the bound.
        host_memory: for peak memory on a CPU.
        tick: called after each timed call.
    """
    torch._dynamo.reset()  # else the stages before count as recompilations, after eight of which all is eager
    reasons: dict[str, str] = {}
    subjects: dict[str, Subject] = {}
    baselines: dict[str, tuple[dict, dict]] = {}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for provider in providers:
            try:
                if reason := provider.why_not(case):
                    reasons[provider.name] = reason
                    continue
                subject = provider.build(case, False)
                if provider.baseline not in baselines:
                    known = (*providers, *all_providers(case))  # it may not be one of those to time
                    eager = next(p for p in known if p.name == provider.baseline)
                    with torch.backends.cudnn.flags(allow_tf32=False):  # or float32 would be no baseline on a GPU
                        exact = results(eager.build(case, True))
                    baselines[provider.baseline] = results(eager.build(case, False)), exact
                check(subject, *baselines[provider.baseline], ours=provider.backend is not None)
                subjects[provider.name] = subject
            except Exception as error:
                reasons[provider.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        baselines.clear()
        saved = {name: saved_bytes(s) for name, s in subjects.items() if not s.infers_alone}
        peaks: dict[str, dict[str, int]] = {}
        for mode in modes:
            of_mode = {name: s for name, s in subjects.items() if mode == "forward" or not s.infers_alone}
            to_time = {name: calls(subject, mode) for name, subject in of_mode.items()}
            times = interleaved(to_time, rounds, case.device, WARM, tick)
            for provider in providers:
                name = provider.name
                row = case.labels() | {"mode": mode, "provider": name}
                if name in reasons or name not in of_mode:
                    yield row | {"skipped": reasons.get(name, "it infers alone")}
                    continue
                if case.device.startswith("cuda"):
                    peak = cuda_peak_bytes(ready(to_time[name]))
                elif host_memory is not None:
                    if name not in peaks:
                        able = modes if not subjects[name].infers_alone else ["forward"]
                        peaks[name] = host_memory.peak_bytes(case, provider, able)
                    peak = peaks[name].get(mode)
                else:
                    peak = None
                row |= times[name] | {"images_per_s": round(1e3 * case.batch / times[name]["p50_ms"], 2)}
                row |= {"peak_bytes": peak, "saved_bytes": saved[name] if mode != "forward" else None}
                yield row | _bound(case, mode, times[name]["p50_ms"], ceilings)
            for subject in subjects.values():
                subject.forget_gradients()


def check(subject: Subject, eager: dict[str, Tensor], exact: dict[str, Tensor], ours: bool) -> None:
    """Hold a subject's output and gradients to the error rule, in the root mean square over each tensor.

    Args:
        eager: `results` of the baseline in the case's dtype.
        exact: the same in float64, or in float32 for 16 bits.

    Raises:
        AssertionError: an error against `exact` of more than 2 (forward) or 3 (backward) times eager's, or of more
            than `OTHERS_FACTOR` times eager's for a provider that is not ours.
    """
    for name, result in results(subject).items():
        x = exact[name]
        assert result.isfinite().all(), f"{name} is not finite"
        error, of_eager = ((t.double().reshape(x.shape) - x).norm().item() for t in (result, eager[name]))
        factor = FORWARD_FACTOR if name == "output" else BACKWARD_FACTOR
        rounding = SLACK * torch.finfo(result.dtype).eps * x.norm().item()
        allowed = (factor if ours else OTHERS_FACTOR[result.dtype]) * of_eager + rounding
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _bound(case: Case, mode: str, p50_ms: float, ceilings: Ceilings | None) -> dict:
    least = work(case, mode)
    if least is None:
        return {}
    moved = least.elements * case.dtype.itemsize
    row = {"least_bytes": moved, "flops": least.flops}
    row |= {"gbyte_per_s": _short(moved / p50_ms / 1e6), "gflop_per_s": _short(least.flops / p50_ms / 1e6)}
    if ceilings is not None:
        bound = ceilings.bound_ms(least, case.dtype)
        row |= {"bound_ms": _short(bound), "share_of_bound": _short(bound / p50_ms)}
    return row


def _short(value: float) -> float:
    return float(f"{value:.4g}")
