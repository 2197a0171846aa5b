"""The command line: one file per subcommand."""

from __future__ import annotations

import click

from .. import _libraries, dispatch
from .bench import bench
from .check import check
from .convert import convert
from .demo import demo
from .info import info
from .visualize import visualize


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Fast Focal Modulation: what is installed, whether it is right, how fast it is."""
    try:
        dispatch.requested_backend()
        _libraries.cpu_isa()
    except ValueError as error:  # what the environment names, which every command would stumble over
        raise click.UsageError(str(error)) from error


main.add_command(bench)
main.add_command(check)
main.add_command(convert)
main.add_command(demo)
main.add_command(info)
main.add_command(visualize)
