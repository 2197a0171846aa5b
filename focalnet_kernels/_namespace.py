"""The torch.library namespace of the raw ops. A process may load a second copy of this package where it has another."""

import torch

NAMESPACE = "focalnet_kernels"  # setup.py reads it too, for the C++ half
OPS = getattr(torch.ops, NAMESPACE)
