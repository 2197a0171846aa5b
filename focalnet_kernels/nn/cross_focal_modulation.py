"""Cross modulation: the query from one map, the context from another."""

from __future__ import annotations

from torch import Tensor

from ..functional import cross_focal_modulation
from .focal_modulation import FocalModulationNd


class CrossFocalModulationNd(FocalModulationNd):
    """The parameters of `FocalModulationNd`, with f's rows shared out between query and target."""

    functional = staticmethod(cross_focal_modulation)

    # two inputs where the layer of one map has one
    def functional_arguments(self, x: Tensor, target: Tensor) -> tuple[tuple, dict]:  # type: ignore[override]
        (x, *parameters), kwargs = super().functional_arguments(x)
        return (x, target, *parameters), kwargs

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        self.check_input("x", x)
        self.check_input("target", target)
        if self.why_by_parts() is not None:
            return self.proj_drop(self.by_parts(x, target)[0])
        args, kwargs = self.functional_arguments(x, target)
        return self.proj_drop(cross_focal_modulation(*args, **kwargs))

    def project(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """q of x, ctx and gates of the target; f is called for either, and the rows of the other's dropped."""
        q, _, _ = super().project(x)
        _, ctx, gates = super().project(target)
        return q, ctx, gates


class CrossFocalModulation(CrossFocalModulationNd):
    """Focal modulation of a map by the context of another: `layer(x, target)`.

    Constructor and state_dict keys are `FocalModulation`'s, so the weights of either load into the other, and
    `layer(x, x)` is `FocalModulation`. How a target of another size meets the query: `cross_focal_modulation`.
    Arguments are `FocalModulation`'s.

    Shape:
        x (B, H, W, C), target (B, H', W', C) -> (B, H, W, C).

    Raises:
        ValueError: a level's kernel size is even, or x or target has another shape.
    """

    ndim = 2


class CrossFocalModulation1d(CrossFocalModulationNd):
    """`CrossFocalModulation` of sequences: (B, N, C) by (B, M, C) -> (B, N, C), same arguments."""

    ndim = 1


class CrossFocalModulation3d(CrossFocalModulationNd):
    """`CrossFocalModulation` of volumes or videos: (B, D, H, W, C) by (B, D', H', W', C), same arguments."""

    ndim = 3
