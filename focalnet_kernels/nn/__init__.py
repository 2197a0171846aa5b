"""Modules: parameters, and calls to functional.py."""

from .block import FocalNetBlock
from .cross_focal_modulation import CrossFocalModulation, CrossFocalModulation1d, CrossFocalModulation3d
from .focal_modulation import FocalModulation, FocalModulation1d, FocalModulation3d

__all__ = [
    "CrossFocalModulation",
    "CrossFocalModulation1d",
    "CrossFocalModulation3d",
    "FocalModulation",
    "FocalModulation1d",
    "FocalModulation3d",
    "FocalNetBlock",
]
