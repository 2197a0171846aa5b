"""Packages that only some commands need."""

import importlib

import click


def import_extra(name: str, command: str):
    """The module `name`, which the extra `demo` brings; a ClickException that says so where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a mismatched torchvision makes timm raise a RuntimeError
        raise click.ClickException(
            f"{command} needs {name.partition('.')[0]}, which cannot be imported ({error}): "
            'pip install "focalnet_kernels[demo]"'
        ) from error
