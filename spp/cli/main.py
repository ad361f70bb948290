"""The program `spp`: its commands, and how its errors look."""

from __future__ import annotations

import functools
import sys
import traceback
from typing import Annotated, Any

import typer

from spp._version import __version__
from spp.cli import (
    certify,
    compare,
    console,
    convert,
    eval,
    export,
    inspect,
    merge,
    plan,
    prune,
    push,
    reconstruct,
    report,
    run,
    teacher_cache,
    tune,
    verify,
)
from spp.cli.options import Command, Program
from spp.cli.ranks import require_ranks
from spp.errors import SPPError

app = typer.Typer(
    name="spp",
    cls=Program,
    help="Fine-tune pruned language models and keep every zero.\n\n"
    "A model is a directory or the id of a model on the Hugging Face hub. An output is a new directory; --overwrite "
    "replaces an earlier output of spp, and nothing else. The usual order: prune, tune, merge, verify.",
    epilog="With --json a command prints one JSON object on one line of standard output, and nothing after it: its "
    'report, with the paths of its outputs under "wrote". If it fails, the exit code is the usual one, and the object '
    'has "error", the message, and "type", with "option" and "remedy" where they are known. A number that is not '
    'finite is null; "non_finite" says where, and what it was.\n\n'
    "spp COMMAND --help explains a command, with an example. To complete names with the Tab key: "
    "spp --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {module.NAME: module.run for module in (prune, tune, merge, verify, certify, inspect, eval, compare)}
COMMANDS |= {
    module.NAME: module.run for module in (reconstruct, convert, teacher_cache, export, report, push, run, plan)
}
for name, function in COMMANDS.items():
    app.command(name=name, cls=Command)(function)

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
    require_ranks(context.invoked_subcommand)
    if not debug:
        console.quiet_imports()


@functools.cache
def program() -> Any:
    """Return the commands with all their options: making them takes a third of a small command."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the program; an error of spp is one message and exit code 1, an interruption exit code 130."""
    with console.safe_streams():
        console.speak_json(False)
        code: Any = 1
        try:
            program()(prog_name="spp")
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt as interruption:
            console.note(console.told(interruption))
            code = 130
        except Exception as error:
            if _debug or not isinstance(error, (SPPError, OSError)):
                if not console.in_json():
                    raise
                traceback.print_exc()
            else:
                console.note(f"error: {console.told(error)}")
        console.print_answer()  # when the frames of an error are gone, and with them the bars that it left open
        console.speak_json(False)
        sys.exit(code)
