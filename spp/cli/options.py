"""The options and the help of a command, made of the fields of a config.

    @command(EvalConfig)
    def run(config: EvalConfig) -> None: …

`run` then takes the value of every option as typer passes it, None where an option was not given, and hands the config
that they make to the function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spp.cli import console
from spp.cli.spelling import Spelling
from spp.configs.options import FOLLOW_LINKS, GROUPS, JSON, RUN, Field, options_of
from spp.errors import ConfigError, arg
from spp.supported import require_supported

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


def command(config: type, build: Callable[..., Any] | None = None) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that gives a function the options of a config, and the config that they make.

    Args:
        config: a dataclass whose fields have Options.
        build: makes a config of the fields that are given; its own parameters with an Option are options too. None
            is the class.

    Returns:
        A decorator that makes of `function(config, …)` a function for typer. Parameters of `function` beside the first
        are options of their own: by an Option in their annotation, or as typer reads them. The result has `spellings`,
        {name in Python: Spelling}.
    """
    made = options_of(config) + (options_of(build) if build is not None else ())

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = options_of(function)
        taken = {field.name for field in own}
        others = [p for p in _parameters(function)[1:] if p.name not in taken]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            follow = values.pop(FOLLOW_LINKS.name)
            with console.answering(bool(values.pop(JSON.name))):
                require_supported()
                given = {field.name: value for field in made for value in _values(field, values)}
                extra = {p.name: values[p.name] for p in others}
                extra |= {field.name: value for field in own for value in _values(field, values)}
                with _following_links() if follow else nullcontext():
                    function((build or config)(**given), **extra)

        fields = sorted((*made, *own, FOLLOW_LINKS, JSON), key=_place)
        parameters = [_typer_parameter(part) for field in fields for part in (field, *field.nested)] + others
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.spellings = spellings_of(fields)  # type: ignore[attr-defined]
        return run

    return decorate


def _following_links() -> AbstractContextManager[None]:
    from spp.files.places import follow_links  # it loads torch, which help needs not

    return follow_links()


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    signature = inspect.signature(function, eval_str=True)
    return [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values()]


def _place(field: Field) -> tuple[bool, int]:
    """Sort arguments first, then by the groups of the help; a stable sort keeps the order of the fields."""
    return not field.option.argument, 0 if field.option.argument else GROUPS.index(field.option.group)


def _values(field: Field, values: Mapping[str, Any]) -> list[Any]:
    """Return the value that a field is given, in a list, or nothing where its default holds."""
    value = values[field.name]
    if field.nested:
        inner = {part.name: given for part in field.nested for given in _values(part, values)}
        if inner and not value:
            first, on = arg(next(iter(inner))), arg(field.name, True)
            raise ConfigError(f"{first} is an option of {field.name.upper()}: add {on}, or leave it out")
        return [field.type(**{name.removeprefix(f"{field.name}_"): v for name, v in inner.items()})] if value else []
    if value is None or (field.option.many and not value):
        return []
    return [value if field.option.parse is None else field.option.parse(value)]


def _typer_parameter(field: Field) -> inspect.Parameter:
    option, kind = field.option, bool if field.nested else field.type
    metavar = option.metavar or (None if option.argument or kind is bool else _METAVARS[kind])
    shared: dict[str, Any] = {"help": field.help, "metavar": metavar, "show_default": False}
    if option.choices:
        shared["autocompletion"] = _completing(option.choices)
    if option.argument:
        info: Any = typer.Argument(**shared)
    else:
        spelling = f"{field.spelling}/{field.off}" if field.off else field.spelling
        names = [spelling, *([option.short] if option.short else [])]
        info = typer.Option(*names, rich_help_panel=option.group, **shared)
    typed: Any = list[kind] if option.many else kind  # type: ignore[valid-type]
    annotation = Annotated[typed, info] if field.required else Annotated[typed | None, info]
    default = inspect.Parameter.empty if field.required else None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _completing(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def starting(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return starting


def spellings_of(fields: Iterable[Field]) -> dict[str, Spelling]:
    """Return {name in Python: how the command spells it}."""
    every = [part for field in fields for part in (field, *field.nested)]
    return {part.name: Spelling(part.spelling, part.off, part.option.argument) for part in every}


def typed(config: Any) -> list[str]:
    """Return a config as the words that one types to have it: arguments in their places, options that are not usual."""
    words: list[str] = []
    for field in sorted(options_of(type(config)), key=_place):
        value = getattr(config, field.name)
        if value is None or (value == field.default and not field.option.argument):
            continue
        inner = [(part, getattr(value, part.name.removeprefix(f"{field.name}_"))) for part in field.nested]
        pairs = [(field, True if inner else value), *((part, one) for part, one in inner if one != part.default)]
        for part, one in pairs:
            spelling = part.off if one is False else part.spelling
            for text in [None] if isinstance(one, bool) else _texts(one):
                placed = [] if part.option.argument or spelling is None else [spelling]
                words += placed + ([] if text is None else [text])
    return words


def _texts(value: Any) -> list[str]:
    """Return the words that a value is typed as: of a mapping NAME=VALUE each, of weighted adapters NAME:WEIGHT."""
    if isinstance(value, Mapping):
        return [f"{name}={one}" for name, one in value.items()]
    if not isinstance(value, (list, tuple)):
        return [str(value)]
    return [one if isinstance(one, str) else one[0] if one[1] == 1 else f"{one[0]}:{one[1]:g}" for one in value]


# ---- The help of a command: its text, then a panel for each group of options, on a terminal of any width.

ARGUMENTS = "Arguments"
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's own class, wherever typer has it


class Command(TyperCommand):
    """A command whose help shows every option in full; a name that is cut off helps nobody."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was typed; with --json a mistake in it is answered as any other."""
        console.speak_json(JSON.spelling in args)
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            console.fail(error)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the name of the command: its arguments under the names that the help explains."""
        pieces = ["[OPTIONS]"]
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = _typed_names(parameter) + ("..." if parameter.nargs == -1 else "")
                pieces.append(name if parameter.required else f"[{name}]")
        return pieces

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in (ARGUMENTS, *GROUPS)}
        for parameter in self.get_params(ctx):
            usual = ARGUMENTS if parameter.param_type_name == "argument" else RUN
            panel = getattr(parameter, "rich_help_panel", None) or usual
            rows[panel].append((_typed_names(parameter), _told(parameter)))
        _print_help(self.get_usage(ctx), self.help, rows)


class Program(TyperGroup):
    """The program, whose help has the commands and what each is for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        commands = {name: command.help or "" for name, command in self.commands.items()}
        rows = {
            "Commands": [(name, " ".join(told.split("\n\n")[0].split())) for name, told in commands.items()],
            "Options": [(_typed_names(parameter), _told(parameter)) for parameter in self.get_params(ctx)],
        }
        _print_help(self.get_usage(ctx), f"{self.help}\n\n{self.epilog}", rows)


def _print_help(usage: str, text: str | None, panels: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Print how a program is called, its text, and a panel for each group of (what is typed, what it means)."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Padding(Text(usage, style="bold"), (1, 1)))
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        console.print(Padding(Text(" ".join(paragraph.split())), (0, 1, 1, 1)))
    for name, rows in panels.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for typed, told in rows:
            table.add_row(Text(typed, style="bold cyan"), Text(told))
        if rows:
            console.print(Panel(table, title=name, title_align="left", border_style="dim"))


def _typed_names(parameter: Any) -> str:
    """Return how an argument or option is typed, on a line of its own what switches it off."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = ", ".join(sorted(parameter.opts, key=len))
    names += f" {parameter.metavar}" if parameter.metavar and not parameter.is_flag else ""
    return "\n".join([names, *parameter.secondary_opts])


def _told(parameter: Any) -> str:
    required = parameter.required and parameter.param_type_name != "argument"
    return f"{parameter.help or ''}{' Required.' if required else ''}"
