"""Work in processes of their own: a kernel that faults takes its process's GPU context along, and one may hang.

It also lets many kernels be compiled at once: what they leave in Triton's and torch.compile's caches is there for all.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed


class Fault(str):
    """What became of a process, instead of an answer."""


def in_processes(
    function: Callable, tasks: Sequence[tuple], *, chunk: int, workers: int, seconds: float, until: float
) -> Iterator[tuple[tuple, object]]:
    """(task, function(*task)) for every task, in any order; a `Fault` where that raised, hung or ended the process,
    None where the time was over.

    Args:
        function: of a module's top level, as its arguments and answers are sent.
        chunk: tasks that share a process, until one of them faults.
        workers: processes at a time.
        seconds: in which each answer must come.
        until: by time.monotonic(), when all must be over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["focalnet_kernels.bench.runner"])  # and so torch: no process imports it anew

    def answers(todo: Sequence[tuple]) -> list[tuple[tuple, object]]:
        found = []
        while len(found) < len(todo):
            if time.monotonic() > until:
                return found + [(task, None) for task in todo[len(found) :]]
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(function, todo[len(found) :], sender))
            process.start()
            sender.close()
            answer = None
            while len(found) < len(todo) and not isinstance(answer, Fault):
                answer = receive(receiver, process, seconds, until)
                found.append((todo[len(found)], answer))
            process.kill()
            process.join()
        return found

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(answers, tasks[i : i + chunk]) for i in range(0, len(tasks), chunk)]
        for done in as_completed(running):
            yield from done.result()


def _serve(function, todo, sender) -> None:
    for task in todo:
        try:
            answer = function(*task)
        except Exception as error:
            answer = Fault(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sender.send(answer)
        if isinstance(answer, Fault):
            return


def receive(receiver, process, seconds: float, until: float):
    """What the process sends; a `Fault` where it ended or takes longer than `seconds`, None where the time was over."""
    left = max(0.0, until - time.monotonic())
    if not receiver.poll(min(seconds, left)):
        return Fault(f"no answer within {seconds:.0f} seconds") if seconds < left else None
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Fault(f"its process ended with exit code {process.exitcode}")
