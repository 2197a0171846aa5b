"""What the CPU kernels keep: scratch memory for the next call, and little of it for threads that have nothing to do."""

import os
import subprocess
import sys

import pytest

IDLE_THREADS = """
import threading, torch, focalnet_kernels as fk

torch.set_num_threads(1)
layer, x = fk.FocalModulation(128, 3, 3), torch.randn(1, 56, 56, 128)

def step():
    layer(x).sum().backward()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

step()
before, done, end = resident(), threading.Barrier(9), threading.Event()
def work():
    with lock:  # one after the other: what is left is what they keep
        step()
    done.wait()
    end.wait()

lock = threading.Lock()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
done.wait()
print(resident() - before)
end.set()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed")
def test_idle_threads_keep_little(cpu_kernels):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # malloc itself keeps nothing large
    done = subprocess.run(
        [sys.executable, "-c", IDLE_THREADS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8 * 5, "MiB"
