"""The authors' layer of volumes, as medical imaging writes it: (B, D, H, W, C) and 3-D convolutions."""

from __future__ import annotations

from torch import nn

from .._parts import Module
from .official import OfficialClassification


class Volume(OfficialClassification):
    form = "3-D volumes"
    conv = nn.Conv3d

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return [((2, 5, 4, 3, C),)]
