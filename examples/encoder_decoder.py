"""An encoder-decoder of focal modulation: `python examples/encoder_decoder.py` trains one to find discs in noise.

The encoder embeds patches and merges them; the decoder splits them again, takes up at every size what the encoder
knew there by cross modulation, and splits the last tokens into pixels: a map of the input's own size.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import focalnet_kernels as fk
from focalnet_kernels.nn import FocalNetBlock


class EncoderDecoder(nn.Module):
    """An image to a map over its pixels.

    Args:
        in_chans, out_chans: channels of the image and of the map.
        dim: channels of the first tokens.
        patch_size: side of the first patches.
        depth: how often tokens merge, and split again.
        focal_level, focal_window: see `FocalModulation`.

    Shape:
        (B, in_chans, H, W) -> (B, out_chans, H, W); H and W multiples of patch_size * 2^depth.
    """

    def __init__(
        self,
        in_chans: int = 1,
        out_chans: int = 1,
        dim: int = 16,
        patch_size: int = 2,
        depth: int = 2,
        focal_level: int = 2,
        focal_window: int = 3,
    ):
        super().__init__()
        levels = {"focal_level": focal_level, "focal_window": focal_window}
        widths = [dim * 2**i for i in range(depth)]
        self.embed = fk.PatchEmbed(patch_size, in_chans, dim)
        self.encoder = nn.ModuleList(FocalNetBlock(C, **levels) for C in widths)
        self.merging = nn.ModuleList(fk.PatchMerging(C) for C in widths)
        self.bottom = FocalNetBlock(2 * widths[-1], **levels)
        self.splitting = nn.ModuleList(fk.PatchSplitting(2 * C, out_dim=C) for C in widths)
        self.norm = nn.ModuleList(nn.LayerNorm(C) for C in widths)
        self.cross = nn.ModuleList(fk.CrossFocalModulation(C, **levels) for C in widths)
        self.decoder = nn.ModuleList(FocalNetBlock(C, **levels) for C in widths)
        self.to_pixels = fk.PatchSplitting(dim, out_dim=out_chans, factor=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        x, known = self.embed(image), []
        for block, merging in zip(self.encoder, self.merging, strict=True):
            x = block(x)
            known.append(x)
            x = merging(x)
        x = self.bottom(x)
        for i in reversed(range(len(known))):
            x = self.splitting[i](x)
            x = x + self.cross[i](self.norm[i](x), known[i])
            x = self.decoder[i](x)
        return self.to_pixels(x).permute(0, 3, 1, 2)


def draw_discs(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, size, size) of one disc each, and where the disc is: 0 or 1, same shape."""
    centre = torch.rand(count, 2, 1, 1, generator=generator) * size
    radius = (0.1 + 0.2 * torch.rand(count, 1, 1, generator=generator)) * size
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (row - centre[:, 0]).square() + (column - centre[:, 1]).square() <= radius.square()
    mask = inside.float()[:, None]
    return mask + torch.randn(mask.shape, generator=generator), mask


def train(model: nn.Module, steps: int, size: int, seed: int) -> float:
    """Share of the discs' area found: intersection over union on images that were not trained on."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        images, masks = draw_discs(16, size, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), masks).backward()
        optimizer.step()
    images, masks = draw_discs(64, size, generator)
    with torch.inference_mode():
        found, there = model(images) > 0, masks > 0
    return ((found & there).sum() / (found | there).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = EncoderDecoder()
    iou = train(model, arguments.steps, arguments.size, arguments.seed)
    print(f"intersection over union {iou:.2f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
