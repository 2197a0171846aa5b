"""Checks of what users hand over: an error names the argument, what came, and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_floating(name: str, tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}")


def check_tokens(name: str, tensor) -> None:
    check_floating(name, tensor)
    if tensor.ndim != 3:
        raise ValueError(f"{name}: expected (B, N, C), got shape {tuple(tensor.shape)}")


def check_map(name: str, tensor, layout: str = "(B, C, *spatial)") -> None:
    check_floating(name, tensor)
    if not 3 <= tensor.ndim <= 5:
        raise ValueError(f"{name}: expected {layout} with one to three spatial axes, got shape {tuple(tensor.shape)}")
    if any(n == 0 for n in tensor.shape[1:]):  # eager PyTorch convolves no empty maps either; a batch may be empty
        raise ValueError(f"{name}: expected at least one channel and one pixel, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor, expected: tuple, meaning: str, optional: bool = False) -> None:
    if optional and tensor is None:
        return
    check_tensor(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} = {meaning}, got {tuple(tensor.shape)}")


def check_levels(name: str, weights, C: int, ndim: int) -> tuple[Tensor, ...]:
    try:
        weights = tuple(weights)
    except TypeError:
        got = type(weights).__name__
        raise TypeError(f"{name}: expected a sequence with one tensor per level, got {got}") from None
    for i, weight in enumerate(weights):  # messages are made where they are needed: this runs in every call
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(weight).__name__}")
        shape = tuple(weight.shape)
        if len(shape) != ndim + 2 or shape[:2] != (C, 1):
            raise ValueError(f"{name}[{i}]: expected shape ({C}, 1, {', '.join('k' * ndim)}) = (C, 1, *k), got {shape}")
        for k in shape[2:]:
            if k % 2 == 0:
                raise ValueError(
                    f"{name}[{i}]: expected odd kernel sizes, got {shape[2:]} (an even one would change the map's size)"
                )
    return weights


def check_matrix(name: str, weight, rows: int, columns: int) -> Tensor:
    """A Linear's weight, or a 1x1 convolution's with its ones dropped."""
    check_tensor(name, weight)
    shape = tuple(weight.shape)
    if shape[:2] != (rows, columns) or any(n != 1 for n in shape[2:]):
        raise ValueError(f"{name}: expected shape ({rows}, {columns}) or a 1x1 convolution's, got {shape}")
    if weight.ndim == 2:
        return weight
    # DDP wants the gradient with the weight's strides, those of the ones too: flattened in the weight's own order
    # (contiguous or channels_last), it comes back so
    return (weight if weight.stride(-1) == 1 else weight.movedim(1, -1)).flatten(1)


def same_kind(
    tensors: Sequence[Tensor | None], names: Sequence[str], levels: str = "", norm: Sequence[str] = ()
) -> Sequence[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on; otherwise checked to share one dtype and device.

    `names` of the first tensors; the others are the list called `levels`. Those named in `norm` may all be float32
    beside 16 bits, which `layer_norm` takes, and it alone.
    """
    device = tensors[0].device
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):  # not of meta tensors
        dtype = torch.get_autocast_dtype(device.type)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    dtype = tensors[0].dtype
    for i, tensor in enumerate(tensors):
        if tensor is None or (tensor.dtype == dtype and tensor.device == device):
            continue
        name = names[i] if i < len(names) else f"{levels}[{i - len(names)}]"
        if tensor.device != device:
            raise ValueError(f"{name}: expected {names[0]}'s device {device}, got {tensor.device}")
        if name in norm and dtype.itemsize == 2:
            mixed = [t for t, n in zip(tensors, names, strict=False) if n in norm]
            if all(t.dtype == torch.float32 for t in mixed):
                continue
        raise TypeError(f"{name}: expected {names[0]}'s dtype {dtype}, got {tensor.dtype}")
    return tensors
