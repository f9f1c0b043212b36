"""The commands: parse, call the front door, print; each is in a file of `commands`.

Nothing heavy is imported before a command runs, so that ``unembed --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import unembed
from unembed.commands import data, recovery, serving, training
from unembed.errors import UnembedError

app = typer.Typer(
    name="unembed",
    help="How much text does an embedding give away? Turn vectors back into text, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"unembed {unembed.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How much text does an embedding give away?"""


prepare = app.command()(data.prepare)
preflight = app.command()(data.preflight)
inspect = app.command()(data.inspect)
train = app.command()(training.train)
plot = app.command()(training.plot)
export = app.command()(training.export)
invert = app.command()(recovery.invert)
evaluate = app.command()(recovery.evaluate)
serve = app.command()(serving.serve)


def main() -> None:
    """Run the command line; an error the user can act on is one line and exit code 2."""
    try:
        app()
    except (UnembedError, OSError) as error:  # OSError: no permission, a full disk, a wrong path
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
