"""`info`: versions, backends, and why a backend is off."""

from __future__ import annotations

import importlib.metadata
import platform

import click
import torch

from .. import _libraries, dispatch
from .._namespace import OPS
from .._version import __version__
from ..ops.triton.launch import INTERPRETED, MISSING


@click.command()
def info() -> None:
    """Show versions and, for each backend, whether it can run here and why not."""
    click.echo(f"focalnet_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    click.echo(f"machine: {platform.machine()}, {torch.get_num_threads()} CPU threads")
    click.echo(f"backend asked for: {dispatch.requested_backend()}")
    click.echo("reference: ready")
    if _libraries.cpu_missing:
        click.echo(f"cpu: off, {_libraries.cpu_missing}")
    else:
        click.echo(f"cpu: ready, instruction set {_libraries.cpu_isa()}")
    if MISSING or not (INTERPRETED or torch.cuda.is_available()):
        click.echo(f"triton: off, {MISSING or 'there is no GPU (but see TRITON_INTERPRET=1)'}")
    else:
        click.echo(f"triton: ready, version {importlib.metadata.version('triton')}")
    if _libraries.cuda_missing:
        click.echo(f"cuda: off, {_libraries.cuda_missing}")
    else:
        built = f"built for compute capability {OPS.cuda_build()}"
        click.echo(f"cuda: {f'ready, {built}' if torch.cuda.is_available() else f'off, there is no GPU; {built}'}")
