"""FocalCodec's layer: of sequences, its levels with biases and with even kernels too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._parts import Module, Parts
from .adapter import Adapter


class FocalCodec(Adapter):
    """forward(x, left_contexts=None) -> (y, contexts to come): None but in the causal form, which is its class's."""

    form = "FocalCodec"
    f, h, proj = "in_proj", "context_proj", "out_proj"
    act, drop, norm, levels = "activation", "dropout", "norm", "layers"
    norm_flag = "use_post_norm"
    conv = nn.Conv1d
    storable = ()

    def is_plain(self) -> bool:
        return True  # the contexts aside

    def why_not(self, module: Module) -> str | None:
        if getattr(module, "causal", False):
            return "its causal form repeats what was first on the left, and has a window in the mean's place"
        if getattr(module, "store_hidden", False):
            return "store_hidden is on: its class keeps gates and modulators"
        return super().why_not(module)

    def may_run(self, parts: Parts, x: Tensor) -> bool:
        return x.device.type == "cpu"  # a GPU's kernels take no biases, and the reference is slower than the class

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return [((2, 23, C),)]

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor, ...] | None:
        if getattr(module, "causal", False) or getattr(module, "store_hidden", False) or args[1:] not in ((), (None,)):
            return None
        return super().inputs(module, args[:1])

    def forward(
        self, module: Module, parts: Parts, x: Tensor, *, stores: tuple[str, ...] = (), backend: str | None = None
    ) -> Any:
        y = super().forward(module, parts, x, stores=stores, backend=backend)
        return y, [None] * (len(parts.focal_layers) + 1)
