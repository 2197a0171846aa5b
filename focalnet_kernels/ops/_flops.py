"""What torch's flop counter says of the raw ops: what it would say of eager PyTorch's in their place.

A formula stands beside its op, takes the op's arguments with shapes in the tensors' places, and counts with the
functions below. torch.utils.flop_counter imports Triton, so formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch

from .._namespace import OPS

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def set_formula(name: str, formula: Callable[..., int]) -> None:
    """For the raw op of that name."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register(name)


def _register(name: str) -> None:
    formula = _formulas[name]
    counter = sys.modules[_COUNTER]
    counter.register_flop_formula(getattr(OPS, name))(formula)


class _OnImport(importlib.abc.MetaPathFinder):
    """Sees to the registration when the counter is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            for name in _formulas:
                _register(name)

        spec.loader.exec_module = execute_and_register
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _OnImport())


def linear(tokens: int, outputs: int, inputs: int) -> int:
    """A matrix product of so many rows; as much for either of its gradients."""
    return _of(torch.ops.aten.mm, (tokens, inputs), (inputs, outputs), out_val=(tokens, outputs))


def depthwise(shape: Sequence[int], weight: Sequence[int]) -> int:
    """A depthwise convolution of a (B, C, *spatial) map."""
    shape, weight = tuple(shape), _without_bias(weight)
    return _of(torch.ops.aten.convolution, shape, weight, *_convolution(shape, weight), out_val=shape)


def depthwise_gradients(shape: Sequence[int], weight: Sequence[int], of_map: bool, of_weight: bool) -> int:
    """Those of its map and its weight which are needed."""
    shape, weight = tuple(shape), _without_bias(weight)
    found = (shape if of_map else None, weight if of_weight else None, None)
    arguments = (shape, shape, weight, *_convolution(shape, weight), [of_map, of_weight, False])
    return _of(torch.ops.aten.convolution_backward, *arguments, out_val=found)


def _without_bias(weight: Sequence[int]) -> tuple[int, ...]:
    return weight[0], 1, *weight[2:]


def _convolution(shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple:
    """bias, stride, padding, dilation, transposed, output_padding, groups"""
    ones, padding = [1] * len(weight[2:]), [k // 2 for k in weight[2:]]
    return None, ones, padding, ones, False, [0] * len(ones), shape[1]


def _of(op, *shapes, out_val) -> int:
    return sys.modules[_COUNTER].flop_registry[op](*shapes, out_val=out_val)


def levels(shape: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """All focal levels of a (B, C, *spatial) map."""
    return sum(depthwise(shape, weight) for weight in weights)


def level_gradients(shape: Sequence[int], weights: Sequence[Sequence[int]], of_ctx: bool, needed: int) -> int:
    """Their gradients: of the map if `of_ctx`, of the weights whose bits are set. A level passes on what earlier ones
    need."""
    return sum(
        depthwise_gradients(shape, weight, of_ctx or needed & ((1 << level) - 1) != 0, bool(needed >> level & 1))
        for level, weight in enumerate(weights)
    )
