"""The command line: parse, call the front door, print; each command has a file beside this one.

Nothing heavy is imported before a command runs, so that ``unembed --help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from io import TextIOWrapper
from typing import Annotated

import typer

import unembed
from unembed.cli import align as _align
from unembed.cli import audit as _audit
from unembed.cli import defend as _defend
from unembed.cli import evaluate as _evaluate
from unembed.cli import invert as _invert
from unembed.cli import prepare as _prepare
from unembed.cli import serve as _serve
from unembed.cli import train as _train
from unembed.cli import words as _words
from unembed.cli.options import OUTPUT, STRATEGIES_EPILOG
from unembed.errors import ConfigError, UnembedError

app = typer.Typer(
    name="unembed",
    help="How much text does an embedding give away? Turn vectors back into text, and measure it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a preflight check failed, 2 an error, 128 + signal when stopped "
    "(docs/commands.md).",
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


prepare = app.command()(_prepare.prepare)
preflight = app.command()(_prepare.preflight)
inspect = app.command()(_prepare.inspect)
train = app.command()(_train.train)
plot = app.command()(_train.plot)
export = app.command()(_train.export)
invert = app.command(epilog=STRATEGIES_EPILOG)(_invert.invert)
align = app.command()(_align.align)
evaluate = app.command(epilog=STRATEGIES_EPILOG)(_evaluate.evaluate)
words = app.command()(_words.words)
read = app.command()(_audit.read)
audit = app.command()(_audit.audit)
defend = app.command()(_defend.defend)
serve = app.command()(_serve.serve)


def main() -> None:
    """Run the command line; an error the user can act on is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what the console cannot write becomes a sign it can
            stream.reconfigure(errors="replace")
    try:
        if "" in sys.argv[1:]:  # an empty path would be the working folder
            before = sys.argv[sys.argv.index("", 1) - 1]
            raise ConfigError(
                "a value in every argument",
                f"an empty one after {before}",
                "Fill it in, or leave the option out (was a shell variable not set?)",
            )
        app()
    except (UnembedError, OSError) as error:  # OSError: no permission, a full disk, a wrong path
        if OUTPUT.verbose:
            traceback.print_exception(error)
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
