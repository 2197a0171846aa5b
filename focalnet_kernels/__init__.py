"""Fast Focal Modulation (FocalNet, arXiv 2203.11926): fused kernels as drop-in layers.

Importing touches no GPU driver and works without any compiled extension: then the plain PyTorch reference runs.
"""

from ._version import __version__
from .dispatch import BackendError, use_backend
from .functional import explain, focal_context, focal_modulation, modulate
from .nn import FocalModulation, FocalModulation1d, FocalModulation3d

__all__ = [
    "BackendError",
    "FocalModulation",
    "FocalModulation1d",
    "FocalModulation3d",
    "__version__",
    "explain",
    "focal_context",
    "focal_modulation",
    "modulate",
    "use_backend",
]
