"""Layers of other code bases made to run through our ops: see `accelerate`."""

from .patching import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
