"""Modules: parameters, and calls to functional.py."""

from .block import FocalNetBlock
from .focal_modulation import FocalModulation, FocalModulation1d, FocalModulation3d

__all__ = ["FocalModulation", "FocalModulation1d", "FocalModulation3d", "FocalNetBlock"]
