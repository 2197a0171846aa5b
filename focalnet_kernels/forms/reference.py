"""The sequence form as the pseudo-code writes it, step by step: the tests' and the benchmark's baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from .similarity import WeightAndBias, gather_contexts


def similarity_focal_modulation_reference(
    query: Tensor,
    target: Tensor,
    contexts: Sequence[WeightAndBias],
    scales: Sequence[WeightAndBias],
    biases: Sequence[WeightAndBias],
    *,
    scale_factor: float = 1.0,
) -> Tensor:
    """See `similarity_focal_modulation`: same arguments, same result, differentiable to any order."""
    context = gather_contexts(target, contexts)
    gate = (query @ context.mT * scale_factor).softmax(-1)
    return scale_and_shift_reference(query, gate @ context, scales, biases)


def scale_and_shift_reference(
    query: Tensor, modulator: Tensor, scales: Sequence[WeightAndBias], biases: Sequence[WeightAndBias]
) -> Tensor:
    """See `scale_and_shift`: one linear layer after the other."""
    scale, shift = 1, 0
    for scale_layer, bias_layer in zip(scales, biases, strict=True):
        scale = scale + linear(modulator, *scale_layer)
        shift = shift + linear(modulator, *bias_layer)
    return scale * query + shift
