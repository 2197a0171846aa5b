"""Blocks of other people, retold in short, around the layers of foreign_layers.py."""

import torch
from timm.layers import DropPath
from timm.models.focalnet import FocalNetBlock as TimmBlock
from torch import nn
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetLayer

from integrations.foreign_layers import AuthorsClassification, AuthorsDetection, SpatioTemporalLayer


class AuthorsMlp(nn.Module):
    def __init__(self, dim, hidden, drop):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.Dropout(drop),
        )

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class AuthorsBlock(nn.Module):
    """The authors' block around a layer of theirs; tokens, with the map's size kept on the block."""

    def __init__(self, layer, dim, drop=0.0, drop_path=0.0, postln=False, scale=False):
        super().__init__()
        self.use_postln = postln
        self.norm1, self.modulation = nn.LayerNorm(dim), layer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), AuthorsMlp(dim, 4 * dim, drop)
        self.gamma_1 = nn.Parameter(torch.ones(dim)) if scale else 1.0
        self.gamma_2 = nn.Parameter(torch.ones(dim)) if scale else 1.0
        self.H = self.W = None

    def after(self, x, y, gamma):
        return x + self.drop_path(gamma * y)

    def forward(self, x):
        B, L, C = x.shape
        y = (x if self.use_postln else self.norm1(x)).view(B, self.H, self.W, C)
        y = self.modulation(y).view(B, L, C)
        x = self.after(x, self.norm1(y) if self.use_postln else y, self.gamma_1)
        y = self.norm2(self.mlp(x)) if self.use_postln else self.mlp(self.norm2(x))
        return self.after(x, y, self.gamma_2)


class DetectionBlock(AuthorsBlock):
    """Which knows no norm after its bodies."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert not self.use_postln


def _authors(C, **options):
    return AuthorsBlock(AuthorsClassification(C, 3, 2), C, **options)


def _detection(C, postln=False, **options):
    return DetectionBlock(AuthorsDetection(C, focal_level=2, focal_window=3), C, **options)


def _video(C, **options):
    return AuthorsBlock(SpatioTemporalLayer(C, 3, 2, num_frames=3), C, **options)


def _timm(C, drop=0.0, drop_path=0.0, postln=False, scale=False):
    value = 0.5 if scale else None
    return TimmBlock(C, 4.0, 2, 3, postln, layerscale_value=value, proj_drop=drop, drop_path=drop_path)


def _transformers(C, drop=0.0, drop_path=0.0, postln=False, scale=False):
    config = FocalNetConfig(
        focal_levels=[2], focal_windows=[3], use_post_layernorm=postln, use_layerscale=scale, hidden_dropout_prob=drop
    )
    return FocalNetLayer(config, 0, C, (7, 6), drop_path=drop_path)


BUILD = {
    "authors": _authors, "detection": _detection, "video": _video, "timm": _timm, "transformers": _transformers,
}  # fmt: skip
FORMS = {
    "authors": "authors' block", "detection": "authors' block", "video": "authors' block", "timm": "timm's block",
    "transformers": "transformers' block",
}  # fmt: skip


def build(form, C=12, **options):
    """A block of that form with no parameter at a value that hides mistakes."""
    block = BUILD[form](C, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    if isinstance(block, AuthorsBlock):
        block.H, block.W = 7, 6
    return block.eval()


def example(form, C=12, dtype=torch.float32):
    """Arguments of a call."""
    if form == "timm":
        return (torch.randn(4, C, 7, 6, dtype=dtype),)
    x = torch.randn(6 if form == "video" else 4, 42, C, dtype=dtype)
    return (x, (7, 6)) if form == "transformers" else (x,)
