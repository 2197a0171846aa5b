"""The sequence form: context windows of the target, weighed by their similarity to the query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import check_shape, check_tokens, same_kind

WeightAndBias = tuple[Tensor, Tensor]


def similarity_focal_modulation(
    query: Tensor,
    target: Tensor,
    contexts: Sequence[WeightAndBias],
    scales: Sequence[WeightAndBias],
    biases: Sequence[WeightAndBias],
    *,
    scale_factor: float = 1.0,
) -> Tensor:
    """Modulate a sequence by what it resembles in another (the summary's pseudo-code; docs/forms.md).

    context = concat_i conv_i(target), modulator = softmax(scale_factor * query @ context^T) @ context, and
    y = (1 + sum_i scales_i(modulator)) * query + sum_i biases_i(modulator), i = 0..L-1.
    conv_i is depthwise, of kernel 2^(i+1) and stride 2^i; see `gather_contexts` for its padding.

    Args:
        query: (B, N, C), any strides; float64/32/16 or bfloat16.
        target: (B, M, C), M at least 1; same dtype and device.
        contexts: L >= 1 depthwise convolutions, each a weight (C, 1, 2^(i+1)) and a bias (C,).
        scales, biases: L linear layers, each a weight (C, C) and a bias (C,).
        scale_factor: of the similarities. 1 as in the pseudo-code; C^-0.5 keeps a wide softmax from saturating.

    Returns:
        (B, N, C), dtype of `query` (the autocast dtype under autocast). Where `scaled_dot_product_attention` takes
        a flash kernel its gradient cannot be differentiated again.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    query, target, contexts, scales, biases = _prepare(query, target, contexts, scales, biases)
    context = gather_contexts(target, contexts)
    # with an axis for the one head, without which no flash kernel is taken
    modulator = F.scaled_dot_product_attention(
        query.unsqueeze(1), context.unsqueeze(1), context.unsqueeze(1), scale=scale_factor
    ).squeeze(1)
    return scale_and_shift(query, modulator, scales, biases)


def gather_contexts(target: Tensor, contexts: Sequence[WeightAndBias]) -> Tensor:
    """All levels of a target (B, M, C), one after the other: (B, sum_i ceil(M / 2^i), C).

    Level i sees windows of 2s tokens every s = 2^i tokens. s // 2 zeros before the target, and behind it as many as
    ceil(M / s) windows need: so window j lies around tokens j*s to j*s + s - 1 (level 0: token j and the next),
    wherever the target ends; every token is seen; and any M >= 1 will do. Without padding the last tokens are lost
    and a target shorter than 2s is an error.
    """
    channels_first, M = target.transpose(1, 2), target.shape[1]
    levels = []
    for i, (weight, bias) in enumerate(contexts):
        stride = 2**i
        windows = -(-M // stride)
        before = stride // 2
        padded = F.pad(channels_first, (before, (windows + 1) * stride - M - before))
        levels.append(F.conv1d(padded, weight, bias, stride, groups=weight.shape[0]).transpose(1, 2))
    return torch.cat(levels, 1)


def scale_and_shift(
    query: Tensor, modulator: Tensor, scales: Sequence[WeightAndBias], biases: Sequence[WeightAndBias]
) -> Tensor:
    """(1 + sum_i scales_i(modulator)) * query + sum_i biases_i(modulator), with one product instead of 2L.

    A sum of linear layers of one input is the linear layer of the summed weights; the two sums, stacked, are one.
    """
    (scale_weight, scale_bias), (bias_weight, bias_bias) = _sum(scales), _sum(biases)
    weight, bias = torch.cat((scale_weight, bias_weight)), torch.cat((1 + scale_bias, bias_bias))
    scale, shift = F.linear(modulator, weight, bias).chunk(2, -1)
    return torch.addcmul(shift, scale, query)


class SimilarityFocalModulation(nn.Module):
    """The summary's `focal_modulation(query, target)`; see `similarity_focal_modulation` and docs/forms.md.

    Not the paper's layer, and without published weights. Each level keeps parameters of its own: `contexts.i`,
    `scales.i` and `biases.i` in the state_dict.

    Args:
        dim: channels C.
        num_contexts: levels L, at least 1.
        scale_factor: of the similarities.

    Shape:
        query (B, N, C), target (B, M, C) -> (B, N, C).

    Raises:
        ValueError: num_contexts is below 1, or query or target has another shape.
    """

    def __init__(self, dim: int, num_contexts: int, scale_factor: float = 1.0):
        super().__init__()
        if num_contexts < 1:
            raise ValueError(f"num_contexts: expected at least 1, got {num_contexts}")
        self.dim = dim
        self.num_contexts = num_contexts
        self.scale_factor = scale_factor
        levels = range(num_contexts)
        # parameters alone: padding and stride stand in `gather_contexts`
        self.contexts = nn.ModuleList(nn.Conv1d(dim, dim, 2 ** (i + 1), 2**i, groups=dim) for i in levels)
        self.scales = nn.ModuleList(nn.Linear(dim, dim) for _ in levels)
        self.biases = nn.ModuleList(nn.Linear(dim, dim) for _ in levels)

    def forward(self, query: Tensor, target: Tensor) -> Tensor:
        contexts, scales, biases = (
            [(layer.weight, layer.bias) for layer in layers] for layers in (self.contexts, self.scales, self.biases)
        )
        return similarity_focal_modulation(query, target, contexts, scales, biases, scale_factor=self.scale_factor)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_contexts={self.num_contexts}, scale_factor={self.scale_factor:.3g}"


def _sum(layers: Sequence[WeightAndBias]) -> WeightAndBias:
    # not added one by one: `sum` rounds low precision once
    weights, biases = zip(*layers, strict=True)
    return torch.stack(weights).sum(0), torch.stack(biases).sum(0)


def _prepare(query, target, contexts, scales, biases):
    check_tokens("query", query)
    check_tokens("target", target)
    B, _, C = query.shape
    if (target.shape[0], target.shape[2]) != (B, C) or target.shape[1] == 0:
        raise ValueError(
            f"target: expected shape ({B}, M, {C}) = (B, M, C) with M >= 1 for the given query, "
            f"got {tuple(target.shape)}"
        )
    L = len(contexts)
    if L < 1:
        raise ValueError("contexts: expected at least one level, got none")
    tensors, names = [query, target], ["query", "target"]
    for role, layers in (("contexts", contexts), ("scales", scales), ("biases", biases)):
        if len(layers) != L:
            raise ValueError(f"{role}: expected one layer for each of the {L} contexts, got {len(layers)}")
        for i, (weight, bias) in enumerate(layers):
            name = f"{role}[{i}]"
            if role == "contexts":
                check_shape(f"{name} weight", weight, (C, 1, 2 ** (i + 1)), "(C, 1, 2^(i+1))")
            else:
                check_shape(f"{name} weight", weight, (C, C), "(C, C)")
            check_shape(f"{name} bias", bias, (C,), "(C,)")
            tensors += (weight, bias)
            names += (f"{name} weight", f"{name} bias")
    query, target, *flat = same_kind(tensors, names)
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    return query, target, layers[:L], layers[L : 2 * L], layers[2 * L :]
