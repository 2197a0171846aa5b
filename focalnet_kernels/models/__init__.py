"""FocalNet, its published variants, and their checkpoints."""

from .backbone import FocalNetBackbone
from .checkpoint import load_checkpoint
from .focalnet import FocalNet
from .variants import create_model, list_models

__all__ = ["FocalNet", "FocalNetBackbone", "create_model", "list_models", "load_checkpoint"]
