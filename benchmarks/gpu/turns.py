"""Times of calls that take turns, each in a process of its own: torch.compile works on all of them at once."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator

import torch
from processes import Fault, receive

from focalnet_kernels.bench.memory import cuda_peak_bytes
from focalnet_kernels.bench.timing import interleaved, quantiles

LONGEST = 30.0  # seconds of a turn


class Turns:
    """Processes that prepare their calls from here on.

    Args:
        build: of a module's top level; takes a task and the device, and answers with callables by mode.
        tasks: by name.
    """

    def __init__(self, build: Callable[..., dict[str, Callable[[], object]]], tasks: dict[str, tuple], device: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["focalnet_kernels.bench.runner"])
        self._processes = {}
        for name, task in tasks.items():
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(build, task, device, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes[name] = process, connection

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *exc_info) -> None:
        for process, connection in self._processes.values():
            process.kill()
            process.join()
            connection.close()

    def measure(self, names: list[str], rounds: int, until: float) -> Iterator[tuple[str, str, dict | Fault | None]]:
        """(name, mode, quantiles and peak of memory) for every mode of these tasks, which take turns; of one that
        failed (name, "", why), or None where the time was over.

        Args:
            until: by time.monotonic(), when all must be prepared.
        """
        modes = {name: self._answer(name, math.inf, until) for name in names}
        for name, answer in modes.items():
            if not isinstance(answer, list):
                self._processes[name][0].kill()  # others want to be alone
                yield name, "", answer
        for mode in dict.fromkeys(mode for found in modes.values() if isinstance(found, list) for mode in found):
            able = [name for name, found in modes.items() if isinstance(found, list) and mode in found]
            turns: dict[str, list[dict]] = {name: [] for name in able}
            for _, name in ((i, name) for i in range(rounds) for name in able if isinstance(modes[name], list)):
                self._processes[name][1].send(mode)
                answer = self._answer(name, LONGEST, math.inf)
                if isinstance(answer, dict):
                    turns[name].append(answer)
                else:
                    modes[name] = answer
                    yield name, mode, answer
            for name, found in turns.items():
                if len(found) == rounds:
                    yield name, mode, quantiles([turn["ms"] for turn in found]) | {"peak_bytes": found[0]["peak"]}

    def _answer(self, name: str, seconds: float, until: float):
        process, connection = self._processes[name]
        return receive(connection, process, seconds, until)


def _serve(build, task, device, connection) -> None:
    try:
        calls = build(*task, device)
        for call in calls.values():
            _patiently(call)
        connection.send(list(calls))
        while True:
            call = calls[connection.recv()]
            peak = cuda_peak_bytes(call) if device.startswith("cuda") else None
            times = interleaved({"": call}, 2, device, 1)[""]
            if device.startswith("cuda"):
                torch.cuda.empty_cache()  # the others need it
            connection.send({"ms": times["p50_ms"], "peak": peak})
    except Exception as error:
        connection.send(Fault(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def _patiently(call: Callable[[], object]) -> None:
    """Compiles, and runs once; anew where other processes had the memory."""
    for _ in range(6):
        try:
            call()
        except torch.OutOfMemoryError:
            time.sleep(10)
        else:
            break
        finally:
            torch.cuda.empty_cache()
