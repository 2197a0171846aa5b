"""How many threads the ops have: two where the C++ kernels share their work out, for the others one is faster."""

import pytest
import torch

from focalnet_kernels.ops.triton.launch import INTERPRETED


@pytest.fixture(autouse=True)
def threads(request):
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    before = torch.get_num_threads()
    torch.set_num_threads(1 if INTERPRETED or backend in ("reference", "cuda") else 2)
    yield
    torch.set_num_threads(before)
