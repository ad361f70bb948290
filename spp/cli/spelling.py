"""Messages of the library as a command says them: `--overwrite` where Python says `overwrite=True` (spp.errors.arg)."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spp.configs.options import FOLLOW_LINKS
from spp.errors import Marked, Mention, render

# Functions of the package root that are commands: what is typed for a call of one.
_COMMANDS = {
    "prune": "prune MODEL OUTPUT",
    "certify": "certify DIRECTORY",
    "verify": "verify BEFORE AFTER",
    "convert": "convert SOURCE OUTPUT",
    "export_dense": "export DIRECTORY OUTPUT --dense",
    "export_packed": "export DIRECTORY OUTPUT --packed",
    "reconstruct": "reconstruct PRUNED OUTPUT",
    "reconstruct_checkpoint": "reconstruct PRUNED OUTPUT",
    "merge_checkpoint": "merge BASE ADAPTER OUTPUT",
}


@dataclass(frozen=True)
class Spelling:
    """How a command spells an argument.

    Attributes:
        on: the option, or the place of an argument, such as OUTPUT.
        off: the option that switches it off, if there is one.
        placed: whether it is an argument, whose value is typed alone.
    """

    on: str
    off: str | None = None
    placed: bool = False


Spellings = Mapping[str, Spelling]


def spoken(message: object, spellings: Spellings | None) -> str:
    """Return a message as a command says it.

    Args:
        message: an exception or a warning, whose mentions are spelled; of anything else its str.
        spellings: those of the command; None spells every argument as an option of its name.

    Example:
        >>> from spp.errors import ConfigError, arg
        >>> spoken(ConfigError(f"pass {arg('overwrite', True)}"), {"overwrite": Spelling("--overwrite")})
        'pass --overwrite'
    """
    if not isinstance(message, Marked):
        return str(message)
    return render(message.marked, lambda mention: _said(mention, spellings))


def _said(mention: Mention, spellings: Spellings | None) -> str:
    if mention.function:
        if mention.function == FOLLOW_LINKS.name:
            return FOLLOW_LINKS.spelling
        if mention.function not in _COMMANDS:
            return mention.python()
        options = [_typed(_option(name), value) or "" for name, value in mention.options]
        return " ".join(filter(None, [f"spp {_COMMANDS[mention.function]}", *options]))
    ((name, value),) = mention.options
    spelling = _option(name) if spellings is None else spellings.get(name)
    if spelling is None:  # no option of this command
        return " ".join(filter(None, (name, "" if not value else _plain(value))))
    return _typed(spelling, value) or f"no {spelling.on}"  # False or None, of what is only ever switched on


def _option(name: str) -> Spelling:
    return Spelling(f"--{name.replace('_', '-')}")


def _typed(spelling: Spelling, value: str | None) -> str | None:
    """Return an option with the value of which this is the repr, as one types it; None where there is no way to."""
    if not value:
        return spelling.on
    try:
        meant = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{spelling.on} {_plain(value)}"
    if spelling.placed:
        return str(meant)
    if meant is True:
        return spelling.on
    if meant is False or meant is None:
        return spelling.off if meant is False else None
    if isinstance(meant, Mapping):
        return _repeated(spelling.on, (f"{name}={part}" for name, part in meant.items()))
    return _repeated(spelling.on, meant if isinstance(meant, (list, tuple)) else [meant])


def _plain(value: str) -> str:
    """Return a value as one types it: `float32` of torch.float32, `a` of 'a'."""
    return value.removeprefix("torch.").strip("'\"")


def _repeated(option: str, values: Iterable[object]) -> str:
    return " ".join(f"{option} {value}" for value in values)
