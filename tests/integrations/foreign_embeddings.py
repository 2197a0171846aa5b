"""Patch embeddings of other people, retold in short."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.focalnet import Downsample
from torch import nn
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetPatchEmbeddings


class AuthorsPatchEmbed(nn.Module):
    """Of classification: tokens, and the size of their map."""

    def __init__(self, patch_size, in_chans, embed_dim, use_conv_embed=False, norm_layer=None, is_stem=False):
        super().__init__()
        self.patch_size = patch_size
        self.in_chans, self.embed_dim = in_chans, embed_dim
        kernel_size, stride, padding = patch_size, patch_size, 0
        if use_conv_embed:
            kernel_size, stride, padding = (7, 4, 2) if is_stem else (3, 2, 1)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def forward(self, x):
        x = self.proj(x)
        H, W = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x), H, W


class DetectionPatchEmbed(AuthorsPatchEmbed):
    """Of detection and segmentation: a map, of whole patches."""

    def forward(self, x):
        _, _, H, W = x.size()
        if W % self.patch_size[1] != 0:
            x = F.pad(x, (0, self.patch_size[1] - W % self.patch_size[1]))
        if H % self.patch_size[0] != 0:
            x = F.pad(x, (0, 0, 0, self.patch_size[0] - H % self.patch_size[0]))
        x = self.proj(x)
        if self.norm is not None:
            Wh, Ww = x.size(2), x.size(3)
            x = self.norm(x.flatten(2).transpose(1, 2))
            x = x.transpose(1, 2).view(-1, self.embed_dim, Wh, Ww)
        return x


def _authors(cls, C, N, norm, overlap, stem):
    size = 4 if stem else 2
    return cls((size, size), C, N, overlap, nn.LayerNorm if norm else None, stem)


def _timm(C, N, norm, overlap, stem):
    return Downsample(C, N, 4 if stem else 2, overlap, partial(LayerNorm2d, eps=1e-5) if norm else None)


def _transformers(C, N, norm, overlap, stem):
    config, size = FocalNetConfig(), 4 if stem else 2
    return FocalNetPatchEmbeddings(config, 224, size, C, N, norm, overlap, stem)


BUILD = {
    "timm": _timm,
    "authors": partial(_authors, AuthorsPatchEmbed),
    "detection": partial(_authors, DetectionPatchEmbed),
    "transformers": _transformers,
}
FORMS = {
    "timm": "timm's patch embedding",
    "authors": "authors' patch embedding",
    "detection": "authors' patch embedding of detection and segmentation",
    "transformers": "transformers' patch embedding",
}


def build(form, C=5, N=12, norm=True, overlap=False, stem=False):
    """A patch embedding of that form with no parameter at a value that hides mistakes."""
    embed = BUILD[form](C, N, norm, overlap, stem)
    with torch.no_grad():
        for parameter in embed.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return embed.eval()
