"""The GPUs and dtypes that kernels are compiled for and run."""

import pytest
import torch

for_every_gpu = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
# code of both GPUs is much the same: each dtype on one of them, and on the other where there is time
for_every_gpu_and_dtype = pytest.mark.parametrize(
    "capability, dtype",
    [
        pytest.param(80, torch.float16, id="sm_80-float16"),
        pytest.param(90, torch.bfloat16, id="sm_90-bfloat16"),
        pytest.param(80, torch.bfloat16, id="sm_80-bfloat16", marks=pytest.mark.slow),
        pytest.param(90, torch.float16, id="sm_90-float16", marks=pytest.mark.slow),
    ],
)
