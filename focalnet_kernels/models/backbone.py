"""FocalNet as a backbone of detectors and segmenters: a normalised map per stage."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from .focalnet import FocalNet


class FocalNetBackbone(FocalNet):
    """The feature pyramid of a FocalNet: each map after a LayerNorm of its own, no final norm and no head.

    Keys, maps and frozen stages are those of the authors' detection and segmentation code, and images are padded
    with zeros to whole patches as there. With `use_conv_embed` they pad the stem's convolution by 3, all others by
    2 as here: for weights of theirs set `backbone.patch_embed.proj.padding = (3, 3)`.

    `load_checkpoint` takes a detector's file, of which only the backbone is read, and a classifier's, which has no
    norms of maps: those stay as they are.

    Args:
        out_indices: the stages whose maps are wanted, counted from 0; None for all.
        frozen_stages: what does not train and stays in evaluation mode, in the authors' count: from 0 on the
            embedding of patches, from 2 on also the first `frozen_stages - 1` stages; -1 for nothing.
        **options: arguments of `FocalNet`; `num_classes` has no effect.

    Shape:
        (B, in_chans, H, W) -> one (B, C_i, H_i, W_i) per stage of `out_indices`, in the order of the stages,
        channels-last in memory. H_0 = ceil(H / patch_size), H_i = ceil(H_{i-1} / 2).

    Raises:
        ValueError: an index names no stage, or there are not so many stages to freeze; else as `FocalNet`.
    """

    def __init__(self, *, out_indices: Collection[int] | None = None, frozen_stages: int = -1, **options):
        super().__init__(**{"pad_patches": True} | options | {"num_classes": 0})
        del self.norm, self.head
        self.out_indices = tuple(range(self.num_layers) if out_indices is None else sorted(set(out_indices)))
        self.check_stages(self.out_indices)
        if not -1 <= frozen_stages <= self.num_layers + 1:
            raise ValueError(f"frozen_stages: expected -1 to {self.num_layers + 1}, got {frozen_stages}")
        self.frozen_stages = frozen_stages
        norm_layer = options.get("norm_layer", nn.LayerNorm)
        for i in self.out_indices:
            self.add_module(f"norm{i}", norm_layer(self.embed_dim[i]))
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normalised maps of the stages in `out_indices`."""
        maps = self.run_stages(x, self.out_indices)
        norms = [self.get_submodule(f"norm{i}") for i in self.out_indices]
        return tuple(norm(features).permute(0, 3, 1, 2) for norm, features in zip(norms, maps, strict=True))

    def train(self, mode: bool = True) -> FocalNetBackbone:
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, *self.layers[: max(self.frozen_stages - 1, 0)]]
