"""The tensors of a focal modulation branch beside x: one flat tuple in one order, read by name."""

from __future__ import annotations

from ..focal_modulation.parameters import LayerParameters
from ..residual import Residual

_AROUND = len(Residual._fields)


class FocalBranchParameters(tuple):
    """As everything has them, up to the raw ops and C++: those of `LayerParameters`, then a `Residual`."""

    __slots__ = ()

    @staticmethod
    def names(levels: int) -> tuple[str, ...]:
        """What each is called where there are so many levels."""
        return (*LayerParameters.names(levels), *Residual._fields)

    def as_matrices(self) -> FocalBranchParameters:
        """With matrices where the projections are 1x1 convolutions."""
        return FocalBranchParameters((*self.layer.as_matrices(), *self.residual))

    @property
    def layer(self) -> LayerParameters:
        return LayerParameters(self[:-_AROUND])

    @property
    def residual(self) -> Residual:
        return Residual(*self[-_AROUND:])
