"""Modulation of one map by the context of another: forward(x, v=None), q from x, ctx and gates from v."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._parts import Module, Parts, why_call_projection
from ..functional import focal_context, modulate
from .official import OfficialDetection


class QueryContext(OfficialDetection):
    """Channels first outside, Linear projections inside. Without v the layer is the authors', f cut in two."""

    form = "query and context apart"
    extra = ("q",)

    def f_outputs(self, C: int, L: int) -> int:
        return C + L + 1

    def bypassed(self, parts: Parts, norms: Mapping[type, Callable]) -> str | None:
        return super().bypassed(parts, norms) or _why_call_query(dict(parts.extra)["q"], parts.f)

    def examples(self, module: Module, C: int) -> list[tuple[tuple[int, ...], ...]]:
        return [((2, C, 5, 4),), ((2, C, 5, 4), (2, C, 5, 4))]

    def inputs(self, module: Module, args: tuple) -> tuple[Tensor, ...] | None:
        if len(args) != 2:
            return super().inputs(module, args)
        x, v = args
        if v is None:
            return super().inputs(module, (x,))
        same = isinstance(x, Tensor) and isinstance(v, Tensor) and x.shape == v.shape  # else v is broadcast
        return (x, v) if same else None

    def channels_last(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def as_original(self, module: Module, parts: Parts, y: Tensor, x: Tensor) -> Tensor:
        return super().as_original(module, parts, y, x).permute(0, 3, 1, 2)

    def functional_arguments(self, module: Module, parts: Parts, x: Tensor) -> tuple[tuple, dict]:
        (x, f_weight, f_bias, *rest), kwargs = super().functional_arguments(module, parts, x)
        f_weight = torch.cat((module.q.weight, f_weight))
        f_bias = None if f_bias is None else torch.cat((module.q.bias, f_bias))
        return (x, f_weight, f_bias, *rest), kwargs

    def forward(
        self,
        module: Module,
        parts: Parts,
        x: Tensor,
        v: Tensor | None = None,
        *,
        stores: tuple[str, ...] = (),
        backend: str | None = None,
    ) -> Tensor:
        if v is None:
            return super().forward(module, parts, x, stores=stores, backend=backend)
        h, proj, norm, (weights, biases) = parts.h, parts.proj, parts.norm, parts.levels()
        q = module.q(self.channels_last(x)).movedim(-1, 1)
        projected = parts.f(self.channels_last(v)).movedim(-1, 1)
        ctx, gates = projected.split((h.in_channels, len(weights) + 1), 1)
        ctx_all = focal_context(ctx, gates, weights, biases=biases, backend=backend)
        y = modulate(q, ctx_all, h.weight, h.bias, backend=backend).movedim(1, -1)
        if "gates" in stores:
            module.gates = gates
        return self.as_original(module, parts, proj(y if norm is None else norm(y)), x)


def _why_call_query(q: Module, f: Module) -> str | None:
    C = f.weight.shape[1]
    reason = why_call_projection(q, nn.Linear, (C, C))
    if reason is None and (q.bias is None) != (f.bias is None):
        reason = f"is {q}, expected, as f, bias={f.bias is not None}"
    return None if reason is None else f"q {reason}"
