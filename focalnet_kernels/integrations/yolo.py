"""The form that forks of YOLO share: channels first, 1x1 convolutions for projections, `f_linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .._parts import Module, Parts, dropped
from .timm import Timm, channels_first, is_channels_last


class Yolo(Timm):
    form = "YOLO forks"
    f, norm, norm_flag = "f_linear", "ln", "use_postln_in_modulation"

    def post_norm(self, module: Module) -> None:
        return None

    def bypassed(self, parts: Parts, norms: Mapping[type, Callable]) -> str | None:
        if parts.norm_is_on:
            return f"{self.norm_flag} is on: its LayerNorm takes the last axis of (B, C, H, W), the width, for channels"
        return super().bypassed(parts, norms)

    def as_original(self, module: Module, parts: Parts, y: Tensor, x: Tensor) -> Tensor:
        # it makes every map contiguous, and only proj's convolution can pass on another order: its weight's
        last = is_channels_last(parts.proj._parameters["weight"])
        return dropped(getattr(module, self.drop), channels_first(y, last))
