"""The torch.library namespace of the raw ops.

Schemas and fakes stand in Python, so the ops exist without any compiled extension; C++ only adds kernels. Raw ops
are private: they have no autograd, which lives in the autograd.Functions around them.
"""

import torch

library = torch.library.Library("focalnet_kernels", "DEF")


def define(schema: str):
    """Declare a raw op; decorates its fake (shapes, dtypes, strides of the results)."""
    library.define(schema)
    name = "focalnet_kernels::" + schema.split("(", 1)[0]
    return torch.library.register_fake(name, lib=library)
