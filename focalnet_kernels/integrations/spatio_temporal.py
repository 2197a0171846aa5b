"""Video-FocalNets' layer: the authors' layer of every frame, modulated once more along time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._parts import Module, Parts
from ..functional import focal_context, modulate
from .adapter import normalizes
from .official import OfficialClassification


class SpatioTemporal(OfficialClassification):
    """y = proj(LN?(q * modulator * modulator_temporal)) of frames (B*T, H, W, C), T = `num_frames`.

    The modulator of space runs through our ops. The one of time has dense convolutions, which are matrix
    products and PyTorch's business; it is computed without the original's copies of x.
    """

    form = "Video-FocalNets' spatio-temporal"
    extra = ("f_temporal", "h_temporal", "focal_layers_temporal")
    storable = ("gates", "modulator", "gates_temporal", "modulator_temporal")

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return [((2 * module.num_frames, 5, 4, C),)]

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor, ...] | None:
        inputs = super().inputs(module, args)
        whole = inputs is not None and inputs[0].ndim == 4 and inputs[0].shape[0] % module.num_frames == 0
        return inputs if whole else None

    def forward(
        self, module: Module, parts: Parts, x: Tensor, *, stores: tuple[str, ...] = (), backend: str | None = None
    ) -> Tensor:
        h, norm, (weights, biases) = parts.h, parts.norm, parts.levels()
        C, L = x.shape[-1], len(weights)
        q, ctx, gates = parts.f(x).movedim(-1, 1).split((C, C, L + 1), 1)
        ctx_all = focal_context(ctx, gates, weights, biases=biases, normalize=normalizes(module), backend=backend)
        gates_temporal, modulator_temporal = _temporal(module, x)
        if stores:
            modulator = h(ctx_all)
            values = (gates, modulator, gates_temporal, modulator_temporal.movedim(-1, 1))
            for name, value in zip(self.storable, values, strict=True):
                if name in stores:
                    setattr(module, name, value)
            y = q * modulator
        else:
            y = modulate(q, ctx_all, h.weight, h.bias, backend=backend)
        y = y.movedim(1, -1) * modulator_temporal
        return self.as_original(module, parts, parts.proj(y if norm is None else norm(y)), x)


def _temporal(module: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """gates_temporal (B*H*W, L+1, T) and the modulator of time (B*T, H, W, C)."""
    (frames, H, W, C), T, L = x.shape, module.num_frames, len(module.focal_layers_temporal)
    B = frames // T
    projected = module.f_temporal(x).unflatten(0, (B, T))  # (B, T, H, W, C+L+1): before x is moved, not after
    ctx, gates = projected.permute(0, 2, 3, 4, 1).flatten(0, 2).split((C, L + 1), 1)
    ctx_all: Any = 0
    for level, layer in enumerate(module.focal_layers_temporal):
        ctx = layer(ctx)
        ctx_all = ctx_all + ctx * gates[:, level : level + 1]
    ctx_all = ctx_all + module.act(ctx.mean(2, keepdim=True)) * gates[:, L:]
    if normalizes(module):
        ctx_all = ctx_all / (L + 1)
    modulator = module.h_temporal(ctx_all).unflatten(0, (B, H, W))  # (B, H, W, C, T)
    return gates, modulator.permute(0, 4, 1, 2, 3).flatten(0, 1)
