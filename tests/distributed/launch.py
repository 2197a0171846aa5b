"""torchrun with two processes on this machine."""

import os
import subprocess
import sys


def on_two_processes(*command: object) -> subprocess.CompletedProcess:
    """Runs a Python script with its arguments; what it writes is kept."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*torchrun, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran
