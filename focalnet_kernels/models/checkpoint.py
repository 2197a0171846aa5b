"""Loading a checkpoint, whoever wrote it."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .key_maps import DETECTORS, convert_state_dict, has_name, recognise_layout, rename_key

# wrappers that put a word before every key: DataParallel and torch.compile
_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load weights saved under the authors', timm's or Hugging Face's names; which ones is recognised.

    Everything is checked before anything is copied: a checkpoint that does not fit leaves the model alone. Of a
    detector's or segmenter's file only the backbone is read. A backbone takes a classifier's weights too: the
    final norm and the head stay behind, and its norms of maps remain as they are.

    Args:
        model: a `FocalNet` or `FocalNetBackbone`, or the authors', timm's or Hugging Face's one.
        path: a .safetensors file, or anything that `torch.load(weights_only=True)` reads. {"model": ...} and
            {"state_dict": ...} are unwrapped. An argparse.Namespace, paths, NumPy's scalars and arrays may stand beside
            the weights.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or that of another model; the message names the path and the
            first keys that differ, or the class that weights_only=True refuses. Also: `model` is no FocalNet, or has
            no memory yet (meta device).
    """
    given = read_checkpoint(path)
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("model: expected one with memory, got one on the meta device; see Module.to_empty")
    model_layout = recognise_layout(own, "model")
    layout = recognise_layout(given, str(path))
    if layout in DETECTORS:
        given = {key: tensor for key, tensor in given.items() if has_name(key, layout, "authors")}
    staying = _norms_of_maps(own, model_layout)
    if staying and not _norms_of_maps(given, layout):
        own = {key: tensor for key, tensor in own.items() if key not in staying}
        given = {key: tensor for key, tensor in given.items() if not _is_of_classifier(key, layout)}
    else:
        staying = {}
    # compared under the checkpoint's names: its owner knows them, and timm's tell where the norms stand
    expected_layout = layout
    if layout.startswith("timm"):
        expected_layout = layout.removesuffix("_postln") + "_postln" * _uses_postln(model)
    try:
        expected = convert_state_dict(own, model_layout, expected_layout)
    except ValueError as error:  # of a backbone, which lacks what the model has
        raise ValueError(f"{path}: expected a checkpoint of this model, got one of a backbone: {error}") from None
    _check_same(expected, given, f"{path}: expected a checkpoint of this model")
    model.load_state_dict(convert_state_dict(given, layout, model_layout) | staying)
    return model


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, without what training wraps around them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or holds something else than named tensors; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: not a readable checkpoint: {_why_not_unpickled(error)}") from error
    except Exception as error:  # every format raises its own kind
        raise ValueError(f"{path}: not a readable checkpoint: {error!r}") from error

    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected tensors by name, got {type(content).__name__} {str(content)[:50]}")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path}: expected tensors by name, got {type(value).__name__} under {key!r}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


def _load_pickle(path: Path):
    with torch.serialization.safe_globals(_beside_weights()):
        return torch.load(path, weights_only=True, map_location="cpu")


@functools.cache
def _beside_weights() -> list:
    """What training scripts store beside the weights and what holds no code, by the names that files have for it."""
    known = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]  # of the first a mere dict takes the place
    for module in ("pathlib", "pathlib._local"):  # of Python 3.13; another system's paths can only be looked at
        known += [(getattr(pathlib, f"Pure{name}"), f"{module}.{name}") for name in ("PosixPath", "WindowsPath")]
        known += [(getattr(pathlib, name), f"{module}.{name}") for name in ("PurePosixPath", "PureWindowsPath")]
    try:
        import numpy
    except ImportError:
        return known
    reduce_scalar, reduce_array = numpy.float64().__reduce__()[0], numpy.empty(0).__reduce__()[0]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2 and 1
        known += [(reduce_scalar, f"{module}.scalar"), (reduce_array, f"{module}._reconstruct")]
    return known + [numpy.ndarray, numpy.dtype, *{type(numpy.dtype(code)) for code in numpy.typecodes["All"]}]


def _why_not_unpickled(error: pickle.UnpicklingError) -> str:
    """In our words: torch's advise to run the code in the file."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"[Cc]lass '?([\w.]+)", str(error))
    if found is None:
        return "no PyTorch file, or one with objects other than tensors"
    return (
        f"it holds {found[1]}, which torch.load(weights_only=True) refuses, for that could run code. Save the "
        "state_dict alone, or, if you trust the file, name this class in torch.serialization.add_safe_globals"
    )


def _norms_of_maps(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Those that a backbone has and nothing else: norm0 and so on."""
    return {key: tensor for key, tensor in state.items() if re.fullmatch(r"norm\d+\..+", _authors_name(key, layout))}


def _is_of_classifier(key: str, layout: str) -> bool:
    """Whether this is the final norm or the head."""
    return _authors_name(key, layout).startswith(("norm.", "head."))


def _authors_name(key: str, layout: str) -> str:
    return rename_key(key, layout, "authors") if has_name(key, layout, "authors") else ""


def _uses_postln(model: nn.Module) -> bool:
    """Whether the norms follow the branches: no key but timm's tells, so the first block is asked."""
    for module in model.modules():
        for name in ("use_postln", "use_post_norm", "use_post_layernorm"):
            if hasattr(module, name):
                return getattr(module, name)
    return False


def _check_same(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that begins with `what` unless names and shapes are equal."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    reshaped = {
        key: f"expected shape {tuple(tensor.shape)}, got {tuple(given[key].shape)}"
        for key, tensor in expected.items()
        if key in given and tensor.shape != given[key].shape
    }
    differing = [*missing, *unexpected, *reshaped]
    if not differing:
        return
    parts = [
        _first(f"{len(missing)} missing", [repr(key) for key in missing]),
        _first(f"{len(unexpected)} unexpected", [repr(key) for key in unexpected]),
        _first(f"{len(reshaped)} of another shape", [f"{key!r} ({why})" for key, why in reshaped.items()]),
    ]
    if all(key.startswith(("head.", "classifier.")) for key in differing):
        parts.append("only the head differs: load with the checkpoint's num_classes, then replace the head")
    raise ValueError(f"{what}: {'; '.join(part for part in parts if part)}")


def _first(kind: str, items: list[str], shown: int = 3) -> str:
    return f"{kind}: {', '.join(items[:shown] + ['...'] * (len(items) > shown))}" if items else ""
