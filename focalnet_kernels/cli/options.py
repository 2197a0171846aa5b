"""Options that several commands have."""

from __future__ import annotations

import click
import torch


def _check_device(context: click.Context, parameter: click.Parameter, name: str | None) -> str:
    """A device that this torch can compute on: said before any work is done."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    expected = f"expected cpu, cuda or cuda:N, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.BadParameter(expected) from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(expected)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            gpus = "there is no GPU" if count == 0 else f"the last GPU is cuda:{count - 1}"
            raise click.BadParameter(f"got {name!r}, but {gpus} that torch {torch.__version__} can use")
    return name


class ImageSize(click.ParamType):
    """A side's pixels or HEIGHTxWIDTH, as (height, width); 0: None."""

    name = "pixels"

    def convert(self, value, parameter, context) -> tuple[int, int] | None:
        if not isinstance(value, str):
            return value
        sides = value.split("x")
        if not 1 <= len(sides) <= 2 or not all(side.isascii() and side.isdigit() for side in sides):
            self.fail(f"expected pixels a side, or HEIGHTxWIDTH, got {value!r}", parameter, context)
        height, width = int(sides[0]), int(sides[-1])
        if (height == 0) != (width == 0):
            self.fail(f"expected two sides of some pixels, got {value!r}", parameter, context)
        return (height, width) if height else None


device = click.option(
    "--device", default=None, callback=_check_device, help="Default: cuda where there is one, otherwise cpu."
)
