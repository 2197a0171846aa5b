"""`convert`: a checkpoint under another library's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from pathlib import Path

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.checkpoint import read_checkpoint
from ..models.key_maps import convert_state_dict, has_name, recognise_layout
from ..models.variants import VARIANTS, recognise_variant

_LAYOUTS = {"timm": "timm", "hf": "huggingface", "official": "authors"}


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "library", required=True, type=click.Choice(list(_LAYOUTS)), help="Whose names OUT shall have.")
@click.option(
    "--postln/--no-postln",
    "postln",
    default=None,
    help="For timm: whether the model's norms follow its branches (use_postln). Default: as published.",
)
@click.option("--partial", is_flag=True, help="Leave out tensors for which there is no name, a detector's head, say.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def convert(source: Path, target: Path, library: str, postln: bool | None, partial: bool, force: bool) -> None:
    """Write the checkpoint IN under timm's, transformers' (hf) or the authors' names (official, and ours) to OUT.

    Whose names IN has is seen from them; a detector's or segmenter's `backbone.` (a DETR's `backbone.0.`) is taken
    too. Both are .safetensors, or else what torch.save writes: .pth, .pt, .bin. Nothing in IN is run, and OUT is
    there whole or not at all.
    """
    save = _writer(target, library, force)
    try:
        state = read_checkpoint(source)
        layout = recognise_layout(state, str(source))
    except (FileNotFoundError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="IN") from error

    new_layout = _LAYOUTS[library]
    if library == "timm":
        new_layout += "_postln" * _has_postln(state, layout, source, postln)
    unmapped = dict.fromkeys(key for key in state if not has_name(key, layout, new_layout))
    if unmapped and not partial:
        raise click.BadParameter(
            f"{source}: {_listed(unmapped)} no name in the {library} layout; --partial leaves out such tensors",
            param_hint="IN",
        )
    state = {key: tensor for key, tensor in state.items() if key not in unmapped}
    try:
        converted = convert_state_dict(state, layout, new_layout)
    except ValueError as error:
        raise click.BadParameter(f"{source}: {error}", param_hint="IN") from error
    try:
        _write(save, converted, target, force)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer and safetensors' have their own
        raise click.BadParameter(f"{target}: cannot be written: {error}", param_hint="OUT") from error

    click.echo(f"{target}: {len(converted)} tensors, from the {layout} to the {new_layout} layout")
    if unmapped:
        click.echo(f"left out: {_listed(unmapped)} no name there")


def _writer(target: Path, library: str, force: bool) -> Callable[[Mapping[str, Tensor], Path], None]:
    """What writes files of this kind; asked before any work is done."""
    if target.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise click.BadParameter(
            f"{target}: expected a name that ends in .safetensors, .pth, .pt or .bin", param_hint="OUT"
        )
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise click.BadParameter(f"{target}: expected a file in a folder that exists", param_hint="OUT")
    _check_free(target, force)
    if target.suffix == ".safetensors":
        return lambda state, path: save_file(dict(state), path, metadata={"format": "pt"})  # transformers wants that
    if library == "official":
        return lambda state, path: torch.save({"model": state}, path)  # as the authors' code reads it
    return lambda state, path: torch.save(state, path)


def _check_free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise click.BadParameter(f"{target}: exists; --force overwrites it", param_hint="OUT")


def _has_postln(state: Mapping[str, Tensor], layout: str, source: Path, postln: bool | None) -> bool:
    """Only timm's names say where the norms stand. Of others the published variants are known by their shapes."""
    if layout.startswith("timm"):
        found = layout.endswith("_postln")
        if postln not in (None, found):
            raise click.BadParameter(f"{source}: its names say use_postln={found}", param_hint="--postln/--no-postln")
        return found
    if postln is not None:
        return postln
    kept = {key: tensor for key, tensor in state.items() if has_name(key, layout, "authors")}
    variant = recognise_variant(convert_state_dict(kept, layout, "authors"))
    if variant is None:
        raise click.UsageError(
            f"{source}: no published variant, and its names do not say where its norms stand: expected --postln "
            "(after the branches: use_postln) or --no-postln (before them)"
        )
    return VARIANTS[variant].get("use_postln", False)


def _listed(keys: Collection[str], shown: int = 3) -> str:
    names = ", ".join([repr(key) for key in islice(keys, shown)] + ["..."] * (len(keys) > shown))
    return f"{names} ({len(keys)}) {'has' if len(keys) == 1 else 'have'}"


def _write(save: Callable, state: Mapping[str, Tensor], target: Path, force: bool) -> None:
    """All of the file or nothing: under another name first, beside its place, on the disk, then renamed."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save({key: _own_memory(tensor) for key, tensor in state.items()}, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        _check_free(target, force)  # it may have come in the meantime
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _own_memory(tensor: Tensor) -> Tensor:
    """A slice would be written with the whole of its storage, or refused."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
