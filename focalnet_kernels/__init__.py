"""Fast Focal Modulation (FocalNet, arXiv 2203.11926): fused kernels as drop-in layers.

Importing touches no GPU driver and works without any compiled extension: then the plain PyTorch reference runs.
"""

from ._version import __version__
from .dispatch import BackendError, use_backend
from .forms import SequenceFocalNet, SimilarityFocalModulation, similarity_focal_modulation
from .functional import (
    cross_focal_modulation,
    explain,
    focal_branch,
    focal_context,
    focal_modulation,
    mlp_branch,
    modulate,
    patch_embed,
)
from .integrations import accelerate, restore
from .models import FocalNet, FocalNetBackbone, create_model, list_models, load_checkpoint
from .nn import (
    CrossFocalModulation,
    CrossFocalModulation1d,
    CrossFocalModulation3d,
    FocalModulation,
    FocalModulation1d,
    FocalModulation3d,
    PatchEmbed,
    PatchMerging,
    PatchMerging1d,
    PatchSplitting,
    PatchSplitting1d,
)
from .ops import keep_packed

__all__ = [
    "BackendError",
    "CrossFocalModulation",
    "CrossFocalModulation1d",
    "CrossFocalModulation3d",
    "FocalModulation",
    "FocalModulation1d",
    "FocalModulation3d",
    "FocalNet",
    "FocalNetBackbone",
    "PatchEmbed",
    "PatchMerging",
    "PatchMerging1d",
    "PatchSplitting",
    "PatchSplitting1d",
    "SequenceFocalNet",
    "SimilarityFocalModulation",
    "__version__",
    "accelerate",
    "create_model",
    "cross_focal_modulation",
    "explain",
    "focal_branch",
    "focal_context",
    "focal_modulation",
    "keep_packed",
    "list_models",
    "load_checkpoint",
    "mlp_branch",
    "modulate",
    "patch_embed",
    "restore",
    "similarity_focal_modulation",
    "use_backend",
]
