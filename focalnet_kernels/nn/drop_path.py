"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch per sample while training, and scale the kept ones by 1 / (1 - drop_prob).

    Stochastic depth (arXiv 1603.09382), with the random stream of timm's module, which the authors use.

    Args:
        drop_prob: probability of dropping, in [0, 1].

    Shape:
        (B, ...) -> (B, ...). In eval mode, or with drop_prob 0, x itself.

    Raises:
        ValueError: drop_prob lies outside [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob: expected a probability in [0, 1], got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        # with keep_prob 0 everything is dropped already: no 0 / 0
        return x * (kept / keep_prob if keep_prob else kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"
