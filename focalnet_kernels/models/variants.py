"""The 15 published variants (paper, section 4 and appendix; the authors' `configs/`)."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from .backbone import FocalNetBackbone
from .checkpoint import load_checkpoint
from .focalnet import FocalNet


def _pyramid(depth: int, embed_dim: int, focal_level: int, focal_window: int = 3, **options) -> dict:
    """Four stages; `depth` is the third one's, where the variants differ."""
    return {
        "depths": (2, 2, depth, 2),
        "embed_dim": embed_dim,
        "focal_levels": (focal_level,) * 4,
        "focal_windows": (focal_window,) * 4,
        "img_size": 224,
        "num_classes": 1000,
        **options,
    }


def _isotropic(embed_dim: int, **options) -> dict:
    """One stage on patches of 16, as a ViT."""
    return {
        "depths": (12,),
        "patch_size": 16,
        "embed_dim": embed_dim,
        "focal_levels": (3,),
        "focal_windows": (3,),
        "img_size": 224,
        "num_classes": 1000,
        **options,
    }


# trained on ImageNet-22K
_LARGE = {
    "img_size": 384,
    "num_classes": 21842,
    "use_conv_embed": True,
    "use_layerscale": True,
    "use_postln": True,
}
_HUGE = {**_LARGE, "img_size": 224, "use_postln_in_modulation": True}

VARIANTS: dict[str, dict] = {
    "focalnet_tiny_srf": _pyramid(6, 96, 2),
    "focalnet_tiny_lrf": _pyramid(6, 96, 3),
    "focalnet_small_srf": _pyramid(18, 96, 2),
    "focalnet_small_lrf": _pyramid(18, 96, 3),
    "focalnet_base_srf": _pyramid(18, 128, 2),
    "focalnet_base_lrf": _pyramid(18, 128, 3),
    "focalnet_tiny_iso": _isotropic(192),
    "focalnet_small_iso": _isotropic(384),
    "focalnet_base_iso": _isotropic(768, use_layerscale=True, use_postln=True),
    "focalnet_large_fl3": _pyramid(18, 192, 3, 5, **_LARGE),
    # the only one published with a normalised modulator
    "focalnet_large_fl4": _pyramid(18, 192, 4, **_LARGE, normalize_modulator=True),
    "focalnet_xlarge_fl3": _pyramid(18, 256, 3, 5, **_LARGE),
    "focalnet_xlarge_fl4": _pyramid(18, 256, 4, **_LARGE),
    "focalnet_huge_fl3": _pyramid(18, 352, 3, **_HUGE),
    "focalnet_huge_fl4": _pyramid(18, 352, 4, **_HUGE),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published variants that match a shell pattern such as "*_lrf", the smallest first."""
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]


def create_model(name: str, pretrained: str | os.PathLike | None = None, **overrides) -> FocalNet:
    """Build a published variant.

    Args:
        name: one of `list_models()`.
        pretrained: a checkpoint for `load_checkpoint`, or None for random weights. Nothing is downloaded.
        **overrides: arguments of `FocalNet` that replace the variant's own. With `out_indices` or `frozen_stages`
            among them the result is a `FocalNetBackbone`.

    Returns:
        The model, on PyTorch's current default device, in training mode.

    Raises:
        ValueError: an unknown name, or a checkpoint that does not fit.
        TypeError: an override that `FocalNet` does not know, or a `pretrained` that is no path.
        FileNotFoundError: no such checkpoint.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(str(name), VARIANTS)
        hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(VARIANTS)}"
        raise ValueError(f"name: unknown model {name!r}; {hint}")
    if not (pretrained is None or isinstance(pretrained, str | os.PathLike)):
        raise TypeError(f"pretrained: expected a path or None (nothing is downloaded), got {pretrained!r}")
    is_backbone = not overrides.keys().isdisjoint(("out_indices", "frozen_stages"))
    model = (FocalNetBackbone if is_backbone else FocalNet)(**(VARIANTS[name] | overrides))
    return model if pretrained is None else load_checkpoint(model, pretrained)


def recognise_variant(state_dict: Mapping[str, Tensor]) -> str | None:
    """The published variant that has just these parameters, by name and shape and whatever the head; None if none.

    Args:
        state_dict: under the authors' names, see `key_maps.convert_state_dict`.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if not key.startswith("head.")}
    width = shapes.get("patch_embed.proj.weight", (None,))[0]
    for name in [name for name, config in VARIANTS.items() if config["embed_dim"] == width]:
        with torch.device("meta"):
            expected = create_model(name, num_classes=0).state_dict()
        if {key: tuple(tensor.shape) for key, tensor in expected.items()} == shapes:
            return name
    return None
