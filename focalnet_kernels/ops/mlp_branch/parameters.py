"""The tensors of an MLP branch beside x: one flat tuple in one order, read by name."""

from __future__ import annotations

from torch import Tensor

from ..focal_modulation.parameters import as_matrix
from ..residual import Residual


class MlpBranchParameters(tuple):
    """As everything has them, up to the raw ops and C++ (csrc/common/parameters.h).

    `fc1_weight` (M, C), `fc1_bias` (M,) or None, `fc2_weight` (C, M), `fc2_bias` (C,) or None, then a `Residual`. A
    matrix may have the further axes, of size 1, of a 1x1 convolution's weight.
    """

    __slots__ = ()
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", *Residual._fields)

    def as_matrices(self) -> MlpBranchParameters:
        """With matrices where the linear layers are 1x1 convolutions."""
        if self[0].ndim == self[2].ndim == 2:
            return self
        return MlpBranchParameters((as_matrix(self[0]), self[1], as_matrix(self[2]), *self[3:]))

    @property
    def fc1_weight(self) -> Tensor:
        return self[0]

    @property
    def fc1_bias(self) -> Tensor | None:
        return self[1]

    @property
    def fc2_weight(self) -> Tensor:
        return self[2]

    @property
    def fc2_bias(self) -> Tensor | None:
        return self[3]

    @property
    def residual(self) -> Residual:
        return Residual(*self[4:])
