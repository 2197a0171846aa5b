"""Checks of what users hand over: an error names the argument, what came, and what was expected.

They look at kinds (see `_calls.py`), so that what was found right once can be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._calls import Kind, NoTensor, kinds_of, looked_up

_WITHOUT_AUTOCAST = ("meta", "vulkan", "lazy")  # torch.compile of torch 2.10 cannot ask is_autocast_available
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, kind: Kind) -> None:
    if kind is None or isinstance(kind, NoTensor):
        raise TypeError(f"{name}: expected a tensor, got {'NoneType' if kind is None else kind.name}")


def check_floating(name: str, kind: Kind) -> None:
    check_tensor(name, kind)
    if kind[1] not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {kind[1]}")


def check_tokens(name: str, kind: Kind) -> None:
    check_floating(name, kind)
    if len(kind[0]) != 3:
        raise ValueError(f"{name}: expected (B, N, C), got shape {tuple(kind[0])}")


def check_map(name: str, kind: Kind, layout: str = "(B, C, *spatial)") -> None:
    check_floating(name, kind)
    shape = tuple(kind[0])
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"{name}: expected {layout} with one to three spatial axes, got shape {shape}")
    if any([n == 0 for n in shape[1:]]):  # eager PyTorch convolves no empty maps either; a batch may be empty
        raise ValueError(f"{name}: expected at least one channel and one pixel, got shape {shape}")


def check_shape(name: str, kind: Kind, expected: tuple, meaning: str, optional: bool = False) -> None:
    if optional and kind is None:
        return
    check_tensor(name, kind)
    if tuple(kind[0]) != expected:
        raise ValueError(f"{name}: expected shape {expected} = {meaning}, got {tuple(kind[0])}")


def per_axis(name: str, value, axes: int, least: int) -> tuple[int, ...]:
    """One whole number per spatial axis, none below `least`; one stands for all."""
    numbers = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(numbers) != axes or any([not isinstance(n, int) or n < least for n in numbers]):
        raise ValueError(f"{name}: expected a whole number from {least} on, or one per spatial axis, got {value!r}")
    return numbers


def as_levels(name: str, weights, biases=None) -> tuple:
    """One tensor per level, as the ops take them: (C, 1, *k) with odd k, or (C, 2, *k) with a bias.

    An even k gets a tap of zero in front: `padding="same"` of PyTorch's convolutions, k // 2 pixels after and one less
    before. A bias is what the kernel's centre [:, 1] makes of a second channel, of ones.
    """
    levels = _per_level(name, weights)
    plain = _are_plain(tuple([w.shape if isinstance(w, Tensor) else None for w in levels]))
    if plain and biases is None:
        return levels
    for i, weight in enumerate(levels):
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if len(shape) > 2 and (shape[1] != 1 or 0 in shape):
            raise ValueError(f"{name}[{i}]: expected shape (C, 1, {', '.join('k' * len(shape[2:]))}), got {shape}")
    if biases is not None:
        of_biases = name.replace("weights", "biases")
        biases = _per_level(of_biases, biases)
        if len(biases) != len(levels):
            raise ValueError(f"{of_biases}: expected one per level, {len(levels)}, got {len(biases)}")
        both = follow_autocast((*levels, *biases))
        levels, biases = both[: len(levels)], both[len(levels) :]
    levels = tuple([_with_odd_kernel(w) if isinstance(w, Tensor) else w for w in levels])
    if biases is None:
        return levels
    pairs = enumerate(zip(levels, biases, strict=True))
    return tuple([w if b is None else _with_bias(f"{of_biases}[{i}]", w, b) for i, (w, b) in pairs])


def _per_level(name: str, tensors) -> tuple:
    try:
        return tuple(tensors)
    except TypeError:
        got = type(tensors).__name__
        raise TypeError(f"{name}: expected a sequence with one tensor per level, got {got}") from None


@looked_up
def _are_plain(shapes: tuple) -> bool:
    """Whether the ops take weights of these shapes as they are, or refuse them."""
    known = [shape for shape in shapes if shape is not None]
    return not any([2 in shape[1:2] or any([k % 2 == 0 for k in shape[2:]]) for shape in known])


def _with_odd_kernel(weight: Tensor) -> Tensor:
    in_front = [zeros for k in reversed(weight.shape[2:]) for zeros in (int(k % 2 == 0), 0)]
    return F.pad(weight, in_front) if any(in_front) else weight


def _with_bias(name: str, weight: Tensor, bias: Tensor) -> Tensor:
    (kind,) = kinds_of((bias,))
    check_tensor(name, kind)
    if not isinstance(weight, Tensor) or weight.ndim < 3:
        return weight  # which is refused later on
    check_shape(name, kind, tuple(weight.shape[:1]), "(C,)")
    if (bias.dtype, bias.device) != (weight.dtype, weight.device):
        expected = f"its weight's {weight.dtype} on {weight.device}"
        raise TypeError(f"{name}: expected {expected}, got {bias.dtype} on {bias.device}")
    around = [zeros for k in reversed(weight.shape[2:]) for zeros in (k // 2, k // 2)]
    return torch.cat((weight, F.pad(bias.reshape(-1, *[1] * (weight.ndim - 1)), around)), 1)


def check_levels(name: str, kinds: Sequence[Kind], C: int, ndim: int) -> None:
    for i, kind in enumerate(kinds):
        check_tensor(f"{name}[{i}]", kind)
        shape = tuple(kind[0])
        if len(shape) != ndim + 2 or shape[0] != C or shape[1] not in (1, 2) or 0 in shape:
            raise ValueError(f"{name}[{i}]: expected shape ({C}, 1, {', '.join('k' * ndim)}) = (C, 1, *k), got {shape}")


def check_matrix(name: str, kind: Kind, rows: int, columns: int) -> None:
    """A Linear's weight, or a 1x1 convolution's."""
    check_tensor(name, kind)
    shape = tuple(kind[0])
    if shape[:2] != (rows, columns) or any([n != 1 for n in shape[2:]]):
        raise ValueError(f"{name}: expected shape ({rows}, {columns}) or a 1x1 convolution's, got {shape}")


def check_same_kind(kinds: Sequence[Kind], names: Sequence[str], norm: Sequence[str] = ()) -> None:
    """That all share the first one's dtype and device. Those named in `norm` may all be float32 beside 16 bits, which
    `layer_norm` takes, and it alone."""
    _, dtype, device = kinds[0]
    for name, kind in zip(names, kinds, strict=True):
        if kind is None or (kind[1] == dtype and kind[2] == device):
            continue
        if kind[2] != device:
            raise ValueError(f"{name}: expected {names[0]}'s device {device}, got {kind[2]}")
        if name in norm and dtype.itemsize == 2:
            mixed = [k for k, n in zip(kinds, names, strict=True) if n in norm]
            if all([k[1] == torch.float32 for k in mixed]):
                continue
        raise TypeError(f"{name}: expected {names[0]}'s dtype {dtype}, got {kind[1]}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off."""
    if device.type in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def follow_autocast(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on for the first one's device."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    kinds = kinds_of(tensors)
    castable = [isinstance(kind, tuple) and kind[1] in _DTYPES and kind[1] != torch.float64 for kind in kinds]
    return [t.to(dtype) if cast else t for t, cast in zip(tensors, castable, strict=True)]
