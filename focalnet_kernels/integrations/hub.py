"""The layers that Hugging Face's `kernels` puts into models: see build_tools/hub.py.

They have no state, as it wants: their forward is bound to a module of another class, whose members it reads.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .._parts import why_call_any
from .transformers import Transformers

_FORM = Transformers()


class FocalNetModulation(nn.Module):
    """transformers' FocalNetModulation (paper, section 3.2). Where one of its parts is hooked, wrapped or replaced, or
    the layer is exported, the forward of the module's class runs.

    Shape:
        (B, H, W, C) -> (B, H, W, C)
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_state: Tensor) -> Tensor:
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if exported or not isinstance(hidden_state, Tensor) or _FORM.missing(self):
            return type(self).forward(self, hidden_state)
        parts = _FORM.parts(self)
        if why_call_any(self, parts, partial(_FORM.bypassed, norms={})) is not None:
            return type(self).forward(self, hidden_state)
        return _FORM.forward(self, parts, hidden_state)
