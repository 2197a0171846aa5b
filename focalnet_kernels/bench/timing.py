"""Times of callables that take turns, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prepared:
    """A call whose argument is made anew each time, outside the clock."""

    prepare: Callable[[], object]
    call: Callable[[object], object]


def interleaved(
    calls: dict[str, Callable[[], object] | Prepared],
    rounds: int,
    device: str = "cpu",
    warm: int = 2,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of each callable, in milliseconds: by events on a GPU, by the clock on a CPU.

    `tick` is called after every call, for a progress bar.
    """
    timed = _events if torch.device(device).type == "cuda" else _clock
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm + rounds):
        for name, call in calls.items():
            duration = timed(ready(call))
            if i >= warm:
                measured[name].append(duration)
            tick()
    return {name: quantiles(durations) for name, durations in measured.items()}


def quantiles(durations: list[float]) -> dict[str, float]:
    """p20, p50, p80 of milliseconds."""
    p20, _, _, p80 = statistics.quantiles(durations, n=5, method="inclusive")
    times = {"p20_ms": p20, "p50_ms": statistics.median(durations), "p80_ms": p80}
    return {key: round(value, 4) for key, value in times.items()}


def ready(call: Callable[[], object] | Prepared) -> Callable[[], object]:
    """The call to time, its preparation done."""
    if not isinstance(call, Prepared):
        return call
    argument = call.prepare()
    return lambda: call.call(argument)


def _clock(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _events(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # nothing of the one before runs into this one
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
