"""The program `spp`: its commands, and how its errors look."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spp._version import __version__
from spp.cli import certify, compare, console, eval, export, inspect, merge, prune, push, tune, verify
from spp.cli.options import Command, Program
from spp.errors import SPPError

app = typer.Typer(
    name="spp",
    cls=Program,
    help="Fine-tune pruned language models and keep every zero.\n\n"
    "A model is a directory or the id of a model on the Hugging Face hub. An output is a new directory; --overwrite "
    "replaces an earlier output of spp, and nothing else. The usual order: prune, tune, merge, verify.",
    epilog="spp COMMAND --help explains a command, with an example. To complete names with the Tab key: "
    "spp --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {module.NAME: module.run for module in (prune, tune, merge, verify, certify, inspect, eval, compare)}
COMMANDS |= {module.NAME: module.run for module in (export, push)}
for name, run in COMMANDS.items():
    app.command(name=name, cls=Command)(run)

_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        console.say(f"spp {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Set what holds for every command."""
    global _debug
    _debug = debug
    command = COMMANDS.get(context.invoked_subcommand or "")
    console.speak_of(None if command is None else command.spellings)
    console.show_warnings_on_one_line()
    if not debug:
        console.quiet_imports()


def main() -> None:
    """Run the program; an error of spp is one message and exit code 1, an interruption exit code 130."""
    with console.safe_streams():
        try:
            app(prog_name="spp")
        except SPPError as error:
            if _debug:
                raise
            console.note(f"error: {console.said(error)}")
            sys.exit(1)
        except OSError as error:  # of a path that no check before it stumbled over
            if _debug:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            console.note(f"error: {where}{error.strerror or error}")
            sys.exit(1)
        except KeyboardInterrupt as interruption:
            console.note(console.said(interruption) or "interrupted")
            sys.exit(130)
