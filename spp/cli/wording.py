"""Messages of the library in the words of the command line: `target_modules=["a"]` is `--target-modules a` there.

name=value            the options of the command that runs, with the value as one types it
name is VALUE, name: …  at the start of a message, the same; a folder that is called so has no value
spp.verify(a, b)      the command that does it; spp.export_dense(a, b) is `spp export DIRECTORY OUTPUT --dense`
PYTHON (--option)     the option
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

_VALUE = r"""True|False|None|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|\([^()]*\)|torch\.\w+|-?\d[\w.:]*"""
_COMMANDS = {
    "prune": "prune MODEL OUTPUT",
    "certify": "certify DIRECTORY",
    "verify": "verify BEFORE AFTER",
    "export_dense": "export DIRECTORY OUTPUT --dense",
    "export_packed": "export DIRECTORY OUTPUT --packed",
}
_CALL = re.compile(rf"\bspp\.({'|'.join(_COMMANDS)})\b(?:\(([^()]*)\))?")
_SAID = rf" is (?:{_VALUE}|-?inf\b|nan\b|(?:an )?empty\b)|: "
_TWICE = re.compile(r"(--[\w-]+)(?: [^\s()]+)? \(\1\)")

Options = Mapping[str, tuple[str, str | None]]


def options_of(command: Any) -> dict[str, tuple[str, str | None]]:
    """Return {name in Python: (option, the option that switches it off)} of a click command."""
    found = {}
    for parameter in getattr(command, "params", ()):
        names = [name for name in parameter.opts if name.startswith("--")]
        if names:
            found[str(parameter.name)] = (names[0], next(iter(parameter.secondary_opts), None))
    return found


def as_options(message: str, options: Options) -> str:
    """Return a message with what Python calls options called as the command line does.

    Example:
        >>> as_options("pass dtype=torch.float16, or overwrite=True", {"dtype": ("--dtype", None)})
        'pass --dtype float16, or overwrite=True'
    """
    message = _CALL.sub(_command, message)
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))

    def replace(match: re.Match[str]) -> str:
        return _typed(*options[match[1]], match[2]) or match[0]

    message = re.sub(rf"(?<![\w./\\'-])({names})=(?:({_VALUE})(?![\w(])|(?![\w\"'({{\[]))", replace, message)
    message = re.sub(rf"\A({names})(?={_SAID})", lambda match: options[match[1]][0], message)
    return _TWICE.sub(r"\1", message)


def _command(match: re.Match[str]) -> str:
    flags = re.findall(r"(\w+)=True", match[2] or "")
    return " ".join([f"spp {_COMMANDS[match[1]]}", *(f"--{flag.replace('_', '-')}" for flag in flags)])


def _typed(option: str, off: str | None, value: str | None) -> str | None:
    """Return an option with a value as one types it; None where there is no way to."""
    if value is None:
        return option
    if value.startswith("torch."):
        return f"{option} {value.removeprefix('torch.')}"
    try:
        meant = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{option} {value}"
    if meant is True:
        return option
    if meant is False or meant is None:
        return off if meant is False else None
    if isinstance(meant, Mapping):
        return _repeated(option, (f"{name}={part}" for name, part in meant.items()))
    return _repeated(option, meant if isinstance(meant, (list, tuple)) else [meant])


def _repeated(option: str, values: Iterable[object]) -> str:
    return " ".join(f"{option} {value}" for value in values)
