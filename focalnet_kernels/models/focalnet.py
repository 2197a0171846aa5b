"""FocalNet: the classifier of the paper, and its maps for dense prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.block import FocalNetBlock
from ..nn.patch_embed import PatchEmbed


class FocalNetStage(nn.Module):
    """The blocks of one stage: (B, H, W, C) -> (B, H, W, C).

    `downsample` (None in the last stage) is here for its state_dict keys; the model calls it, since the map
    before it is the stage's feature map.
    """

    def __init__(self, blocks: Sequence[FocalNetBlock], downsample: PatchEmbed | None, use_checkpoint: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x)
        return x


class FocalNet(nn.Module):
    """Focal Modulation Network (arXiv 2203.11926, section 3.3), with the authors' arguments and keys.

    A seed gives the weights that the authors' class would draw. Any image size works, odd and non-square ones
    too; as in the authors' classifier, trailing pixels that fill no patch are dropped unless `pad_patches`.

    Args:
        img_size: the size that the variant is meant for; kept for reference, it limits nothing.
        patch_size: side of the first patches: 4, or 16 for the isotropic models.
        in_chans: channels of the image.
        num_classes: width of the head; 0 for none (`forward` then returns the pooled features).
        embed_dim: channels of the first stage; they double with every stage.
        depths: blocks per stage.
        mlp_ratio: hidden width of the MLPs over their channels.
        drop_rate: dropout after the first embedding, the modulations and in the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        norm_layer: called with the channels.
        patch_norm: a norm after the first embedding. Those between stages always have one.
        use_checkpoint: recompute blocks in backward instead of keeping their activations.
        keep_hidden: the other way: see `FocalNetBlock`.
        focal_levels, focal_windows: per stage, see `FocalModulation`.
        use_conv_embed: overlapping patches, see `PatchEmbed`.
        use_layerscale, layerscale_value, use_postln, use_postln_in_modulation, normalize_modulator: see
            `FocalNetBlock`.
        pad_patches: pad with zeros to whole patches, as transformers and the authors' detection do, instead of
            dropping the pixels that fill none.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes).

    Raises:
        TypeError: an unknown argument (the authors' class ignores those).
        ValueError: depths, focal_levels, focal_windows differ in length; x has another shape or is too small.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        use_conv_embed: bool = False,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        pad_patches: bool = False,
        keep_hidden: bool = False,
    ):
        super().__init__()
        if not len(depths) == len(focal_levels) == len(focal_windows) > 0:
            raise ValueError(
                "depths, focal_levels, focal_windows: expected one entry per stage in each, "
                f"got {len(depths)}, {len(focal_levels)} and {len(focal_windows)} entries"
            )
        self.img_size = img_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_layers = len(depths)
        self.embed_dim = [embed_dim * 2**stage for stage in range(self.num_layers)]
        self.num_features = self.embed_dim[-1]

        # created in the authors' order, so that a seed gives the weights that their class would draw
        self.patch_embed = PatchEmbed(
            patch_size,
            in_chans,
            embed_dim,
            use_conv_embed,
            norm_layer if patch_norm else None,
            is_stem=True,
            pad=pad_patches,
        )
        self.pos_drop = nn.Dropout(drop_rate)
        # on the CPU even under `torch.device("meta")`: these are settings, not weights
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(self.embed_dim, depths, strict=True)):
            blocks = [
                FocalNetBlock(
                    dim,
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    drop_path=next(rates),
                    norm_layer=norm_layer,
                    focal_level=focal_levels[stage],
                    focal_window=focal_windows[stage],
                    use_layerscale=use_layerscale,
                    layerscale_value=layerscale_value,
                    use_postln=use_postln,
                    use_postln_in_modulation=use_postln_in_modulation,
                    normalize_modulator=normalize_modulator,
                    keep_hidden=keep_hidden,
                )
                for _ in range(depth)
            ]
            is_last = stage == self.num_layers - 1
            downsample = None
            if not is_last:
                downsample = PatchEmbed(2, dim, 2 * dim, use_conv_embed, norm_layer, pad=pad_patches)
            self.layers.append(FocalNetStage(blocks, downsample, use_checkpoint))
        self.norm = norm_layer(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of an image (B, in_chans, H, W)."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The pooled features (B, C) that the head reads."""
        return self.forward_featuremaps(x).mean(dim=1)

    def forward_featuremaps(self, x: Tensor) -> Tensor:
        """The last stage's tokens after the final norm: (B, H*W, C)."""
        (last,) = self.run_stages(x, {self.num_layers - 1})
        return self.norm(last).flatten(1, 2)

    def forward_pyramid(self, x: Tensor, out_indices: Collection[int] | None = None) -> tuple[Tensor, ...]:
        """Each stage's map before it is downsampled, for dense prediction.

        `FocalNetBackbone` adds a norm for each. Stages past the last one asked for do not run.

        Args:
            x: (B, in_chans, H, W).
            out_indices: the stages wanted, counted from 0; None for all.

        Returns:
            One (B, C_i, H_i, W_i) per stage wanted, in the order of the stages; channels-last in memory.

        Raises:
            ValueError: an index names no stage, or x has another shape or is too small.
        """
        wanted = range(self.num_layers) if out_indices is None else out_indices
        self.check_stages(wanted)
        return tuple(features.permute(0, 3, 1, 2) for features in self.run_stages(x, wanted))

    def run_stages(self, x: Tensor, wanted: Collection[int]) -> list[Tensor]:
        """The maps (B, H_i, W_i, C_i) of the wanted stages; the others are let go once used."""
        last = max(wanted)
        self._check_image(x, last)
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in wanted:
                maps.append(x)
            if i == last:
                break
            x = stage.downsample(x.permute(0, 3, 1, 2))
        return maps

    def check_stages(self, wanted: Collection[int]) -> None:
        """Raise a ValueError unless these are stages, and some."""
        if not wanted or any(i not in range(self.num_layers) for i in wanted):
            raise ValueError(f"out_indices: expected stages from 0 to {self.num_layers - 1}, got {wanted}")

    def _check_image(self, x: Tensor, last: int) -> None:
        # of the modules that are there: a stem may have been replaced, for images of more channels, say
        in_chans = getattr(self.patch_embed, "in_chans", None)
        if x.ndim != 4 or in_chans not in (None, x.shape[1]):
            expected = "in_chans" if in_chans is None else f"in_chans={in_chans}"
            raise ValueError(f"x: expected shape (B, {expected}, H, W), got {tuple(x.shape)}")
        size = (x.shape[2], x.shape[3])
        for i in range(last + 1):
            embed = self.patch_embed if i == 0 else self.layers[i - 1].downsample
            grid = embed.output_size(size) if isinstance(embed, PatchEmbed) else None
            if grid is None:  # nobody says what it makes of an image
                return
            if min(grid) < 1:
                raise ValueError(
                    f"x: an image of {x.shape[2]}x{x.shape[3]} is too small: it gives stage {i} (from 0) "
                    f"a map of {size[0]}x{size[1]} to cut patches of {embed.proj.kernel_size} from"
                )
            size = grid


def _init_weights(module: nn.Module) -> None:
    """Linear layers from a normal distribution, biases 0; convolutions keep PyTorch's own initial values."""
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            # By inverse CDF, as timm does it: newer torch draws `trunc_normal_` from another random stream.
            # The bounds of 2 lie 100 deviations away, so the uniform draw spans all of (-1, 1).
            module.weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
