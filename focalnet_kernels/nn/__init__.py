"""Modules: parameters, and calls to functional.py."""

from .block import FocalNetBlock
from .cross_focal_modulation import CrossFocalModulation, CrossFocalModulation1d, CrossFocalModulation3d
from .focal_modulation import FocalModulation, FocalModulation1d, FocalModulation3d
from .patch_embed import PatchEmbed
from .patch_merging import PatchMerging, PatchMerging1d, PatchSplitting, PatchSplitting1d

__all__ = [
    "CrossFocalModulation",
    "CrossFocalModulation1d",
    "CrossFocalModulation3d",
    "FocalModulation",
    "FocalModulation1d",
    "FocalModulation3d",
    "FocalNetBlock",
    "PatchEmbed",
    "PatchMerging",
    "PatchMerging1d",
    "PatchSplitting",
    "PatchSplitting1d",
]
