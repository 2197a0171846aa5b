"""The focal modulation layers of the published variants: what benchmarks and checks run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..models.variants import VARIANTS
from ..ops.focal_modulation.parameters import LayerParameters


@dataclass(frozen=True)
class PublishedLayer:
    """One stage's layer: its channels, its map's sides, and its constructor's arguments.

    Args:
        size: the map's height, and its width where `width` is None.
        frames: of a clip, which the layer then takes as a volume; None for a map.
    """

    dim: int
    size: int
    focal_window: int
    focal_level: int
    normalize_modulator: bool = False
    use_postln_in_modulation: bool = False
    width: int | None = None
    frames: int | None = None

    @property
    def spatial(self) -> tuple[int, ...]:
        """(H, W), or (D, H, W) of a clip."""
        plane = (self.size, self.size if self.width is None else self.width)
        return plane if self.frames is None else (self.frames, *plane)

    @property
    def kernels(self) -> tuple[int, ...]:
        """Each level's kernel size."""
        return tuple(self.focal_window + 2 * level for level in range(self.focal_level))

    @property
    def options(self) -> dict:
        """Arguments of `FocalModulation` beside `dim`."""
        return {
            "focal_window": self.focal_window,
            "focal_level": self.focal_level,
            "normalize_modulator": self.normalize_modulator,
            "use_postln_in_modulation": self.use_postln_in_modulation,
        }

    def parameters(self, empty: Callable[..., Tensor]) -> LayerParameters:
        """The layer's, each made by `empty(*shape)`."""
        C, F = self.dim, 2 * self.dim + self.focal_level + 1
        levels = [empty(C, 1, *(k,) * len(self.spatial)) for k in self.kernels]
        ln = (empty(C), empty(C)) if self.use_postln_in_modulation else (None, None)
        return LayerParameters(
            (empty(F, C), empty(F), *levels, empty(C, C), empty(C), empty(C, C), empty(C), *ln),
        )


def published_layers(variant: str, size: Sequence[int] | None = None) -> Iterator[PublishedLayer]:
    """The layer of every stage of a published variant, for images of `size` (height, width; None: the variant's own).

    Raises:
        ValueError: the last stage has no pixel left.
    """
    config = VARIANTS[variant]
    patch = config.get("patch_size", 4)
    height, width = [side // patch for side in ((config["img_size"],) * 2 if size is None else size)]
    stages = list(zip(config["focal_levels"], config["focal_windows"], strict=True))
    if size is not None and min(height, width) < 2 ** (len(stages) - 1):
        least = 2 ** (len(stages) - 1) * patch
        raise ValueError(f"size: expected at least {least} pixels a side for {variant}, got {min(size)}")
    for stage, (level, window) in enumerate(stages):
        yield PublishedLayer(
            config["embed_dim"] * 2**stage,
            height // 2**stage,
            window,
            level,
            config.get("normalize_modulator", False),
            config.get("use_postln_in_modulation", False),
            width=None if width == height else width // 2**stage,
        )


# FPN backbones see 800 x 1333 pixels, with the authors' detection windows: 200 x 334 at the first stage
DETECTION = tuple(PublishedLayer(96, 200, 9, level, width=334) for level in (2, 3))
# Video-FocalNets' clips of 8 frames through focalnet_tiny_srf, as volumes
VIDEO = tuple(replace(layer, frames=8) for layer in published_layers("focalnet_tiny_srf"))
