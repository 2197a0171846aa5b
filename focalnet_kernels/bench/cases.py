"""What is timed: an op, a layer, a block, a model, or a model and its peers, in published shapes only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..models.variants import VARIANTS
from .layers import DETECTION, VIDEO, PublishedLayer, published_layers

LEVELS = ("op", "layer", "block", "model", "peers")
OPS = ("focal_context", "modulate")
TARGETS = (*VARIANTS, "detection", "video")

# at equal size in the paper's throughput table: by the FocalNet, timm's names of the others
PEERS = {
    f"focalnet_{size}_lrf": (f"swin_{size}_patch4_window7_224", f"convnext_{size}")
    for size in ("tiny", "small", "base")
}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        level: one of `LEVELS`.
        what: the op's name, or the level again.
        target: a variant's name, "detection" or "video": where the shape comes from.
        stage: from 1; 0 for whole models.
        layer: the stage's layer; None for whole models.
        image: (height, width) of a whole model's; () otherwise.
    """

    level: str
    what: str
    target: str
    stage: int
    layer: PublishedLayer | None
    image: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: (B, 3, H, W) images, (B, *spatial, C) for a layer or block, (B, C, *spatial) for an op."""
        if self.layer is None:
            return (self.batch, 3, *self.image)
        if self.level == "op":
            return (self.batch, self.layer.dim, *self.layer.spatial)
        return (self.batch, *self.layer.spatial, self.layer.dim)

    @property
    def name(self) -> str:
        """What it is, without shape and dtype."""
        parts = [] if self.what in ("layer", self.target) else [self.what]
        parts += [self.target] + ([f"stage {self.stage}"] if self.stage else [])
        if self.layer is not None and self.what != "modulate":
            parts.append("k=" + ",".join(map(str, self.layer.kernels)))
        return " ".join(parts)

    def labels(self) -> dict:
        """How it goes into a table."""
        return {
            "level": self.level,
            "case": self.name,
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def cases(
    levels: Iterable[str],
    targets: Iterable[str],
    *,
    batch: int,
    size: tuple[int, int] | None,
    dtypes: Iterable[torch.dtype],
    device: str,
) -> Iterator[Case]:
    """The cases of every level and target.

    Args:
        levels: of `LEVELS`. Detection and video have no models here, video no blocks, and only `PEERS` have peers.
        targets: of `TARGETS`.
        size: (height, width) of the image; None for the variant's own. Detection maps keep theirs.

    Raises:
        ValueError: images of that size are too small for a target.
    """
    targets = tuple(targets)
    for level in levels:
        for target in targets:
            for dtype in dtypes:
                common = {"batch": batch, "dtype": dtype, "device": device}
                if level in ("model", "peers"):
                    if target in (VARIANTS if level == "model" else PEERS):
                        list(published_layers(target, size))  # a model would say so late, and of each of its cases
                        image = size or (VARIANTS[target]["img_size"],) * 2
                        yield Case(level, level, target, 0, None, image, **common)
                    continue
                if level == "block" and target == "video":
                    continue  # nobody builds blocks of volumes
                for stage, layer in enumerate(_layers(target, size), 1):
                    for what in OPS if level == "op" else (level,):
                        yield Case(level, what, target, stage if target != "detection" else 1, layer, (), **common)


def _layers(target: str, size: tuple[int, int] | None) -> Iterable[PublishedLayer]:
    if target in VARIANTS:
        return published_layers(target, size)
    return DETECTION if target == "detection" else VIDEO
