"""Layers of other code bases made to run through our ops: see `accelerate`, and `patch_timm` and its like."""

from .libraries import LibraryPatch, patch_official, patch_timm, patch_transformers
from .patching import Report, accelerate, restore

__all__ = [
    "LibraryPatch",
    "Report",
    "accelerate",
    "patch_official",
    "patch_timm",
    "patch_transformers",
    "restore",
]
