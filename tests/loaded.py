"""Prints which package and which binary of it this Python loads: `make test-old-torch` compares two."""

import hashlib
import sys
from pathlib import Path

import torch

import focalnet_kernels

print(Path(focalnet_kernels.__file__).resolve())
for library in sorted(map(Path, torch.ops.loaded_libraries)):
    if library.name.startswith("_cpu."):
        print(library.resolve(), hashlib.sha256(library.read_bytes()).hexdigest())
        break
else:
    sys.exit("the C++ kernels are not loaded")
print(f"torch {torch.__version__}", file=sys.stderr)
