"""The ops, one folder each: contract (op.py), reference, kernels."""

from ._packed import keep_packed as keep_packed
from .focal_block.op import focal_block as focal_block
from .focal_branch.op import focal_branch as focal_branch
from .focal_context.op import focal_context as focal_context
from .focal_modulation.op import focal_modulation as focal_modulation
from .mlp_branch.op import mlp_branch as mlp_branch
from .modulate.op import modulate as modulate
from .patch_embed.op import patch_embed as patch_embed
