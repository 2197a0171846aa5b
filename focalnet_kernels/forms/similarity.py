"""The sequence form: context windows of the target, weighed by their similarity to the query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import check_same_kind, check_shape, check_tokens, follow_autocast
from .._calls import kinds_of
from .._parts import why_call, why_call_all

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
    conv_i is depthwise, of kernel 2^(i+1) and stride 2^i; see `_windows` for its padding.

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
    return scale_and_shift(query, _attend(query, gather_contexts(target, contexts), scale_factor), scales, biases)


def gather_contexts(target: Tensor, contexts: Sequence[WeightAndBias]) -> Tensor:
    """All levels of a target (B, M, C), one after the other: (B, sum_i ceil(M / 2^i), C). See `_windows`."""
    convolutions = [
        partial(F.conv1d, weight=weight, bias=bias, stride=2**i, groups=weight.shape[0])
        for i, (weight, bias) in enumerate(contexts)
    ]
    return _gather(target, convolutions)


def _gather(target: Tensor, convolutions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    windows = [convolve(_windows(target, i)).transpose(1, 2) for i, convolve in enumerate(convolutions)]
    return torch.cat(windows, 1)


def _windows(target: Tensor, i: int) -> Tensor:
    """The target (B, C, M + padding) for level i.

    Level i sees windows of 2s tokens every s = 2^i tokens. s // 2 zeros before the target, and behind it as many as
    ceil(M / s) windows need: so window j lies around tokens j*s to j*s + s - 1 (level 0: token j and the next),
    wherever the target ends; every token is seen; and any M >= 1 will do. Without padding the last tokens are lost
    and a target shorter than 2s is an error.
    """
    M, stride = target.shape[1], 2**i
    windows = -(-M // stride)
    before = stride // 2
    return F.pad(target.transpose(1, 2), (before, (windows + 1) * stride - M - before))


def _attend(query: Tensor, context: Tensor, scale_factor: float) -> Tensor:
    """The modulator (B, N, C): the context, weighed by its similarity to the query."""
    # with an axis for the one head, without which no flash kernel is taken
    query, context = query.unsqueeze(1), context.unsqueeze(1)
    return F.scaled_dot_product_attention(query, context, context, scale=scale_factor).squeeze(1)


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
        # without padding, which stands in `_windows`
        self.contexts = nn.ModuleList(nn.Conv1d(dim, dim, 2 ** (i + 1), 2**i, groups=dim) for i in levels)
        self.scales = nn.ModuleList(nn.Linear(dim, dim) for _ in levels)
        self.biases = nn.ModuleList(nn.Linear(dim, dim) for _ in levels)

    def forward(self, query: Tensor, target: Tensor) -> Tensor:
        if self._why_by_parts() is not None:
            return self._by_parts(query, target)
        contexts, scales, biases = (
            [(layer.weight, layer.bias) for layer in layers] for layers in (self.contexts, self.scales, self.biases)
        )
        return similarity_focal_modulation(query, target, contexts, scales, biases, scale_factor=self.scale_factor)

    def _why_by_parts(self) -> str | None:
        """Which inner module must be called, and why; None where the weights of all may be read: see `_parts.py`."""
        reason = why_call_all()
        if reason is not None:
            return reason
        C = self.dim
        for i, conv in enumerate(self.contexts):
            reason = why_call(conv) or _why_call_other(conv, nn.Conv1d, (C, 1, 2 ** (i + 1)))
            if reason is None and (conv.stride, conv.padding, conv.dilation) != ((2**i,), (0,), (1,)):
                reason = f"is not of stride {2**i}, dilation 1 and no padding"
            if reason is not None:
                return f"contexts[{i}] {reason}"
        for name, layers in (("scales", self.scales), ("biases", self.biases)):
            for i, linear in enumerate(layers):
                reason = why_call(linear) or _why_call_other(linear, nn.Linear, (C, C))
                if reason is not None:
                    return f"{name}[{i}] {reason}"
        return None

    def _by_parts(self, query: Tensor, target: Tensor) -> Tensor:
        """The same by calling the inner modules."""
        _check_inputs(query, target)
        modulator = _attend(query, _gather(target, self.contexts), self.scale_factor)
        scale, shift = 1, 0
        for scale_layer, bias_layer in zip(self.scales, self.biases, strict=True):
            scale, shift = scale + scale_layer(modulator), shift + bias_layer(modulator)
        return scale * query + shift

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_contexts={self.num_contexts}, scale_factor={self.scale_factor:.3g}"


def _why_call_other(part: nn.Module, kind: type[nn.Module], shape: tuple[int, ...]) -> str | None:
    """Why a plain module is not the one of that class and shape, with a bias."""
    if type(part) is not kind:
        return f"is a {type(part).__name__}, expected a {kind.__name__}"
    weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
    found = [None if tensor is None else tuple(tensor.shape) for tensor in (weight, bias)]
    expected = [shape, shape[:1]]
    return None if found == expected else f"has weight and bias of shapes {found}, expected {expected}"


def _sum(layers: Sequence[WeightAndBias]) -> WeightAndBias:
    # not added one by one: `sum` rounds low precision once
    weights, biases = zip(*layers, strict=True)
    return torch.stack(weights).sum(0), torch.stack(biases).sum(0)


def _check_inputs(query, target) -> None:
    of_query, of_target = kinds_of((query, target))
    check_tokens("query", of_query)
    check_tokens("target", of_target)
    (B, _, C), shape = of_query[0], of_target[0]
    if (shape[0], shape[2]) != (B, C) or shape[1] == 0:
        raise ValueError(
            f"target: expected shape ({B}, M, {C}) = (B, M, C) with M >= 1 for the given query, got {tuple(shape)}"
        )


def _prepare(query, target, contexts, scales, biases):
    _check_inputs(query, target)
    C = query.shape[2]
    L = len(contexts)
    if L < 1:
        raise ValueError("contexts: expected at least one level, got none")
    tensors, names = [query, target], ["query", "target"]
    for role, layers in (("contexts", contexts), ("scales", scales), ("biases", biases)):
        if len(layers) != L:
            raise ValueError(f"{role}: expected one layer for each of the {L} contexts, got {len(layers)}")
        for i, (weight, bias) in enumerate(layers):
            name, (of_weight, of_bias) = f"{role}[{i}]", kinds_of((weight, bias))
            if role == "contexts":
                check_shape(f"{name} weight", of_weight, (C, 1, 2 ** (i + 1)), "(C, 1, 2^(i+1))")
            else:
                check_shape(f"{name} weight", of_weight, (C, C), "(C, C)")
            check_shape(f"{name} bias", of_bias, (C,), "(C,)")
            tensors += (weight, bias)
            names += (f"{name} weight", f"{name} bias")
    query, target, *flat = follow_autocast(tensors)
    check_same_kind(kinds_of((query, target, *flat)), names)
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    return query, target, layers[:L], layers[L : 2 * L], layers[2 * L :]
