"""Option: how the command line offers a field of a config, in the field's annotation.

    steps: Annotated[int | None, Option("Optimizer steps.", OPTIMISATION, default="as many as --epochs has")] = None

Type and default are those of the field. spp.cli.options makes the options of a command of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

# The groups of the help, in their order there.
MODEL = "Model"
DATA = "Data"
ADAPTER = "Adapter"
METHOD = "Method"
OPTIMISATION = "Optimisation"
TEACHER = "Teacher"
EVALUATION = "Evaluation"
RUN = "Run"
MASK_UPDATES = "Mask updates"
PST = "PST"
GROUPS = (MODEL, METHOD, DATA, ADAPTER, OPTIMISATION, TEACHER, EVALUATION, RUN, MASK_UPDATES, PST)


@dataclass(frozen=True)
class Option:
    """How the command line offers a field.

    Args:
        help: a sentence or two; the default is added to it.
        group: the panel of the help that shows it.
        name: the spelling, such as "--window"; None makes it of the field's name.
        short: a second, short spelling, such as "-r".
        metavar: how help shows the value; None shows its type.
        choices: the values there are, for completion; the config itself refuses others.
        default: how help says what happens without the option, where the field's default does not.
        parse: makes the field's value of what was typed: a list of str where it may be repeated.
        type: what is typed, where the field's own type does not say.
        many: whether it may be repeated.
        negatable: whether a bool has a second spelling, --no-…, that switches it off.
        argument: whether it is an argument, which has its place instead of a spelling.
        required: whether it must be given though the field has a default.
        prefix: of the help of the fields of a dataclass that is the value, where they are options of their own.
    """

    help: str
    group: str = RUN
    name: str | None = None
    short: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    default: str | None = None
    parse: Callable[[Any], Any] | None = None
    type: type | None = None
    many: bool = False
    negatable: bool = False
    argument: bool = False
    required: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Field:
    """A field of a config, or a parameter of a function that makes one, with its Option.

    Attributes:
        name: in Python.
        type: of its value, without None.
        default: MISSING where there is none.
        option: its Option.
    """

    name: str
    type: Any
    default: Any
    option: Option

    @property
    def required(self) -> bool:
        """Whether the command line must have it."""
        return self.option.required or self.default is MISSING

    @property
    def spelling(self) -> str:
        """Its option, such as "--block-length"; for an argument its name."""
        if self.option.argument:
            return self.option.metavar or self.name.upper()
        return self.option.name or f"--{self.name.replace('_', '-')}"

    @property
    def off(self) -> str | None:
        """The option that switches it off, if there is one."""
        return f"--no-{self.spelling.removeprefix('--')}" if self.option.negatable else None

    @property
    def nested(self) -> tuple[Field, ...]:
        """The fields of the dataclass that its value is, such as OWL, as options of their own: --owl-threshold."""
        inner = options_of(self.type) if is_dataclass(self.type) else ()
        spelled = [
            replace(part.option, name=f"{self.spelling}{part.spelling[1:]}", help=self._prefixed(part.option.help))
            for part in inner
        ]
        return tuple(
            replace(part, name=f"{self.name}_{part.name}", option=option)
            for part, option in zip(inner, spelled, strict=True)
        )

    def _prefixed(self, text: str) -> str:
        prefix = self.option.prefix
        return f"{prefix}: {text[0].lower()}{text[1:]}" if prefix else text

    @property
    def help(self) -> str:
        """The text of the help, with the default."""
        told: str | None = self.option.default
        if told is None and not self.required and self.default is not None and not self.nested:
            told = str(self.default)
            if self.type is bool:
                told = ("on" if self.default else "off") if self.option.negatable else None
        return f"{self.option.help.removesuffix('.')} (default: {told})." if told else self.option.help


# Of every command: the links that are not followed otherwise (spp.files.places.check_link).
FOLLOW_LINKS = Field(
    "follow_links",
    bool,
    False,
    Option("Follow links out of a downloaded folder, and copy what they lead to, whatever that is."),
)
# Of every command: its report as JSON (spp.cli.console.answer).
JSON = Field(
    "json",
    bool,
    False,
    Option("Print no tables, and in the end one JSON object on one line: the report, or the error (see spp --help)."),
)


def options_of(source: Any) -> tuple[Field, ...]:
    """Return the fields of a dataclass, or the parameters of a function, that have an Option, in their order."""
    hints = get_type_hints(getattr(source, "__func__", source), include_extras=True)
    if isinstance(source, type) and is_dataclass(source):
        defaults = {field.name: field.default for field in fields(source)}
    else:
        parameters = inspect.signature(source).parameters
        defaults = {n: MISSING if p.default is p.empty else p.default for n, p in parameters.items()}
    found = []
    for name, default in defaults.items():
        hint = hints.get(name)
        if get_origin(hint) is Annotated:
            kind, *extras = get_args(hint)
            found += [Field(name, _typed(kind, extra), default, extra) for extra in extras if isinstance(extra, Option)]
    return tuple(found)


def _typed(hint: Any, option: Option) -> Any:
    """Return what is typed for a field: of `str | float | None` a str, of `tuple[int, ...]` an int."""
    if option.type is not None:
        return option.type
    if get_origin(hint) is tuple:
        return get_args(hint)[0]
    if get_origin(hint) not in (Union, UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not NoneType]
    return str if str in members else members[0]
