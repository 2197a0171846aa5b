"""The CPU kernels among threads, in forked processes, and where memory runs out."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.testing import make_focal_branch_inputs, make_mlp_branch_inputs, run

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
sanitized = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a limit stops AddressSanitizer")
AROUND = {"norm": True, "gamma": True}


def calls(seed):
    """Forwards and backwards of several shapes and dtypes, few rows and many."""
    for i, (B, N, C) in enumerate([(1, 6, 24), (2, 20, 16), (1, 30, 40)]):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i]
        options = {"dtype": dtype, "seed": seed + i, **AROUND}
        yield (
            fk.focal_branch,
            make_focal_branch_inputs((B, N, N, C), (3, 5), **options),
            torch.randn(B, N, N, C).to(dtype),
        )
        yield fk.mlp_branch, make_mlp_branch_inputs((B, N, N, C), 4 * C, **options), torch.randn(B, N, N, C).to(dtype)


def results(work):
    with fk.use_backend("cpu"):
        return [run(op, inputs, grad_output) for op, inputs, grad_output in work]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name in other:
            assert torch.equal(one[name], other[name]), name


def test_threads_do_not_meet(cpu_kernels, seed):
    """Each with its own tensors, all at once, and in another order each: the bits of calls one after the other."""
    work = list(calls(seed))
    expected = results(work)
    found: list[list] = []
    together = threading.Barrier(4, timeout=60)

    def turn(worker):
        order = [(i + worker) % len(work) for i in range(len(work))]
        together.wait()
        for _ in range(3):
            mine = results([work[i] for i in order])
            found.append([mine[order.index(i)] for i in range(len(work))])

    threads = [threading.Thread(target=turn, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(found) == 4 * 3
    for mine in found:
        assert_same_bits(mine, expected)


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from ops.test_processes import assert_same_bits, calls, results

work = list(calls({seed}))
expected = results(work)  # the parent's threads have run
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # the parent's do not survive a fork
    try:
        assert_same_bits(results(work), expected)
    except BaseException as error:
        print(repr(error))
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert_same_bits(results(work), expected)  # nor did the child take anything away
sys.exit(os.waitstatus_to_exitcode(status))
"""


@linux
def test_a_forked_process_computes_the_same(cpu_kernels, seed):
    script = FORK.format(tests=os.path.dirname(os.path.dirname(__file__)), seed=seed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# more rows than few, so that weights are packed: what is worked in is larger than what comes out
LIMIT = """
import resource, torch, focalnet_kernels as fk

torch.set_num_threads(2)
fc1, fc2 = torch.randn(1536, 768) / 30, torch.randn(768, 1536) / 40
inputs = dict(x=torch.randn(3, 200, 768), fc1_weight=fc1, fc1_bias=None, fc2_weight=fc2, fc2_bias=None)
expected = fk.mlp_branch(**inputs, backend="reference")

def right(found):
    return ((found - expected).norm() / expected.norm()).item() < 1e-5

def used():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

failures, ours, successes = 0, 0, 0
for MiB in range(1000):
    found = None
    resource.setrlimit(resource.RLIMIT_AS, (used() + MiB * 2**20, resource.RLIM_INFINITY))
    try:
        found = fk.mlp_branch(**inputs, backend="cpu")
    except (RuntimeError, MemoryError) as error:
        failures += 1
        ours += "for what a kernel works in" in str(error)
        # torch 2.10 says on stderr why its allocator failed, and here only that it did
        said = ("memory", "bad_alloc", "API call failed")
        assert isinstance(error, MemoryError) or any(word in str(error) for word in said), error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if found is not None:
        successes += 1
        assert right(found), MiB
        if successes == 5:
            break
assert right(fk.mlp_branch(**inputs, backend="cpu"))
print(failures, ours, successes)
"""


@linux
@sanitized
def test_without_memory_a_call_fails_and_the_next_one_is_right(cpu_kernels):
    """The address space limited more and more: an error that says so, or the result."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed is gone
    done = subprocess.run([sys.executable, "-c", LIMIT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    failures, ours, successes = map(int, done.stdout.split())
    assert failures >= 5 and ours >= 3 and successes == 5, done.stdout
