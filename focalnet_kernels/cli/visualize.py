"""`visualize`: where a model looks: gates and modulator of every stage, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from ..models import FocalNet, create_model
from ..models.variants import VARIANTS
from .extras import import_extra

# of ImageNet, by which the published weights were trained
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StageMaps(NamedTuple):
    """What the last block of a stage made of an image.

    Args:
        kernels: each level's kernel size; L of them.
        gates: (L+1, H, W), one map per level and one for the global context.
        modulator: (H, W), the modulator's norm over its channels.
    """

    kernels: tuple[int, ...]
    gates: Tensor
    modulator: Tensor


@click.command()
@click.argument("image", metavar="IMAGE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--variant", default="focalnet_tiny_lrf", show_default=True, type=click.Choice(sorted(VARIANTS)))
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of that variant: the authors', timm's or Hugging Face's. Default: random, seed 0.",
)
@click.option("--size", type=click.IntRange(min=32), help="Pixels of the shorter side. Default: the variant's.")
@click.option("--output", default="visualize.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
def visualize(image: Path, variant: str, checkpoint: Path | None, size: int | None, output: Path) -> None:
    """Write the gates of every level and the modulator's norm, in the last block of each stage, as one picture.

    A level's gate says how much of its context a pixel takes (the last one: of the whole image's mean), the
    modulator's norm how much the pixel's query is changed by it all. The image keeps its shape.
    """
    figure = import_extra("matplotlib.figure", "visualize")
    pixels = _read(image, VARIANTS[variant]["img_size"] if size is None else size)
    torch.manual_seed(0)
    try:  # as a backbone: whatever head or detector the weights belong to
        model = create_model(variant, pretrained=checkpoint, out_indices=None).eval()
    except ValueError as error:
        raise click.BadParameter(f"expected weights of {variant}. {error}", param_hint="--checkpoint") from error
    normalised = (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
    stages = stage_maps(model, normalised[None])
    weights = checkpoint.name if checkpoint else "random weights"
    picture = _draw(figure, pixels, stages, f"{image.name}: {variant}, {weights}")
    try:
        picture.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a kind of file that matplotlib does not write
        raise click.BadParameter(f"{output}: cannot be written: {error}", param_hint="--output") from error
    click.echo(f"wrote {output}")


def stage_maps(model: FocalNet, x: Tensor) -> list[StageMaps]:
    """The maps of every stage's last block for one image x (1, in_chans, H, W)."""
    layers = [stage.blocks[-1].modulation for stage in model.layers]
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    stages = []
    with torch.inference_mode():
        for layer, layer_input in zip(layers, inputs, strict=True):
            _, gates, modulator = layer(layer_input, return_gates=True)
            stages.append(StageMaps(tuple(layer.kernel_sizes), gates[0], modulator[0].norm(dim=0)))
    return stages


def _read(path: Path, size: int) -> Tensor:
    """(3, H, W) from 0 to 1, the shorter side `size` pixels long."""
    Image, numpy = import_extra("PIL.Image", "visualize"), import_extra("numpy", "visualize")
    try:
        with Image.open(path) as image:
            factor = size / min(image.size)
            shape = tuple(max(size, round(side * factor)) for side in image.size)
            image = image.convert("RGB").resize(shape, Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise click.BadParameter(
            f"{path}: expected an image that Pillow can read: {error}", param_hint="IMAGE"
        ) from error
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255


def _draw(figure_module, pixels: Tensor, stages: list[StageMaps], title: str):
    """A row per stage: the image, its gates on a scale of their own from blue (negative) to red, the modulator."""
    columns = 2 + max(len(stage.gates) for stage in stages)
    figure = figure_module.Figure(figsize=(2.2 * columns, 2.2 * len(stages) + 0.6), layout="constrained")
    panels = figure.subplots(len(stages), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for number, (row, stage) in enumerate(zip(panels, stages, strict=True), 1):
        row[0].imshow(pixels.permute(1, 2, 0).numpy())
        row[0].set_title(f"stage {number}: {stage.modulator.shape[0]}x{stage.modulator.shape[1]}", fontsize=8)
        names = [f"gate {level}, kernel {k}" for level, k in enumerate(stage.kernels, 1)] + ["gate of the mean"]
        limit = stage.gates.abs().max().item()
        for panel, name, gate in zip(row[1:], names, stage.gates, strict=False):
            panel.imshow(gate.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            panel.set_title(f"{name}\n{gate.min():.2g} to {gate.max():.2g}", fontsize=8)
        row[-1].imshow(stage.modulator.numpy(), cmap="viridis")
        row[-1].set_title(f"|modulator|\n{stage.modulator.min():.2g} to {stage.modulator.max():.2g}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
