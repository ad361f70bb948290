"""Reading a recipe: a YAML file with the stages of a run, and the options of each under the names of its config.

    model: MODEL                  # directory or hub id; null leaves it to the command line, as for out, data and text
    prune:
      pattern: 2:4                # a field of PruneConfig, or its option's spelling: keep-zeros
    tune:
      recipe: short

Every key is known by its line. Scalars are YAML 1.2's: 2:4 is text, 1e-3 is a number, on and off are words.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from spp.configs.checks import is_number
from spp.configs.options import Field, options_of
from spp.errors import ConfigError, SPPError, arg

_LARGEST = 1 << 20  # bytes of a recipe
_DEEPEST = 8  # mappings and lists inside each other
_MOST = 100_000  # values, with those that aliases repeat
_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", tuple("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", tuple("-+.0123456789")),
    ("merge", r"<<", ("<",)),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


@dataclass(frozen=True)
class Value:
    """The value of a key, and where it is set: "my.yaml, line 7", or the option of the command line."""

    value: Any
    where: str


@dataclass(frozen=True)
class Section:
    """The options of one stage, or of one measurement.

    Args:
        name: of the stage.
        source: the config whose options they are, or a function that makes it and has options of its own.
        where: it begins.
        values: {field of the config: what it is set to}.
    """

    name: str
    source: tuple[Any, ...]
    where: str
    values: dict[str, Value] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an option as it was written."""
        return self.values[name].value if name in self.values else default

    def place(self, name: str) -> str:
        """Return where an option is set, or where the stage begins."""
        return self.values[name].where if name in self.values else self.where

    def build(self, make: Any, usual: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
        """Return the config that the options make.

        Args:
            make: the class, or a function that makes one.
            usual: values of options that are not set.
            own: values that the run sets.

        Raises:
            SPPError: an option is of a wrong type or makes no sense; the message begins with the file and the line.
        """
        known = {one.name: one for source in self.source for one in options_of(source)}
        hints = {name: hint for source in self.source for name, hint in _hints(source).items()}
        given = {name: self._typed(one, hints[name]) for name, one in known.items() if self._has(one)}
        try:
            return make(**{**usual, **given, **own})
        except SPPError as error:
            named = (name for name in self.values if re.search(rf"\b{name}\b", str(error)))
            where = self.place(error.option or next(named, ""))
            raise type(error)(f"{where}: {self.name}: {error.marked}", option=error.option) from error

    def _has(self, one: Field) -> bool:
        return any(name in self.values for name in (one.name, *(part.name for part in one.nested)))

    def _typed(self, one: Field, hint: Any) -> Any:
        """Return the value of a field as its config takes it."""
        if one.nested:
            return self._nested(one)
        value, where = self.values[one.name].value, self.values[one.name].where
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        written = [value] if isinstance(value, str) else value
        if one.option.parse is not None and isinstance(written, list) and written:
            if not all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in written):
                raise ConfigError(f"{where}: {self.name}.{one.name} is {value!r}; its entries must be text or numbers")
            return one.option.parse([str(part) for part in written])
        if not any(_fits(member, value) for member in members):
            expected = " or ".join(dict.fromkeys(filter(None, map(_word, members))))
            raise ConfigError(f"{where}: {self.name}.{one.name} is {_shown(value)}; it must be {expected}")
        if isinstance(value, str) and Path in members and str not in members:
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    def _nested(self, one: Field) -> Any:
        """Return the value of a field that is a config of its own, such as owl: true, false, or its options."""
        written = self.values.get(one.name, Value({}, self.where))
        flat = {part.name: self.values[part.name] for part in one.nested if part.name in self.values}
        if written.value is False or written.value is None:
            if flat:
                first = next(iter(flat.values()))
                raise ConfigError(f"{first.where}: {self.name}: there is no {one.name}, so this option is for nothing")
            return None
        inside = {} if written.value is True else written.value
        if not isinstance(inside, dict):
            raise ConfigError(
                f"{written.where}: {self.name}.{one.name} is {_shown(inside)}; it must be true, false or its options"
            )
        section = Section(f"{self.name}.{one.name}", (one.type,), written.where)
        for key, value in inside.items():
            section.set(str(key), Value(value, written.where))
        section.values.update({name.removeprefix(f"{one.name}_"): value for name, value in flat.items()})
        return section.build(one.type, {}, {})

    def set(self, key: str, value: Value, own: Collection[str] = (), extra: Collection[str] = ()) -> None:
        """Set an option; the command line may set one again.

        Args:
            key: the field of the config, or the spelling of its option, with or without dashes.
            value: what it is set to, and where.
            own: fields that the run sets itself. extra: keys beside the fields.

        Raises:
            ConfigError: there is no such option, or the run sets it, or it has two spellings here.
        """
        known = {**_names(self.source), **{name: name for name in extra}}
        name = known.get(key.replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), [k for k in known if known[k] not in own], n=1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted({*known.values()} - {*own}))}"
            raise ConfigError(f"{value.where}: {self.name} has no option {_shown(key)}; {meant}")
        if name in own:
            raise ConfigError(f"{value.where}: {self.name}.{name} is set by the run itself: leave it out")
        before = self.values.get(name)
        if before is not None and not value.where.startswith("--"):
            raise ConfigError(f"{value.where}: {self.name}.{name} is set in {before.where} already; keep one of them")
        self.values[name] = value


@contextmanager
def told_together() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Yield a context manager that keeps a ConfigError for the end, where all of them are raised as one."""
    found: list[str] = []

    @contextmanager
    def kept() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            found.append(error.marked)

    yield kept
    if found:
        raise ConfigError("\n".join(found))


@cache
def _hints(source: Any) -> dict[str, Any]:
    return get_type_hints(getattr(source, "__func__", source))


def _names(sources: tuple[Any, ...]) -> dict[str, str]:
    """Return {spelling, with underscores: field} of every option."""
    fields = [part for source in sources for one in options_of(source) for part in (one, *one.nested)]
    spelled = {one.spelling.removeprefix("--").replace("-", "_"): one.name for one in fields if not one.option.argument}
    return {**spelled, **{one.name: one.name for one in fields}}


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value of YAML may be given where a type is expected."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path or origin is os.PathLike:
        return isinstance(value, str)
    if origin in (tuple, list):
        return isinstance(value, list) and all(_fits(get_args(hint)[0], part) for part in value)
    if origin in (Union, UnionType):
        return any(_fits(member, value) for member in get_args(hint))
    kind = origin or hint
    return not is_dataclass(kind) and isinstance(value, kind)


def _word(hint: Any) -> str:
    """Return how a message calls a type; "" for one that YAML has not."""
    origin = get_origin(hint)
    if origin in (tuple, list):
        return "a list"
    if origin is not None and origin is not os.PathLike:
        return "a mapping"
    return _WORDS.get(Path if origin is os.PathLike else hint, "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def shipped() -> list[str]:
    """Return the names of the recipes that the package has."""
    files = resources.files("spp.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read(recipe: str) -> tuple[str, dict[Any, Any], dict[tuple[Any, ...], str]]:
    """Read a recipe of the package, by its name, or a file.

    Returns:
        Its name for messages and folders; its contents; where each key of them is: {path of keys: place}.

    Raises:
        ConfigError: there is none, or it is no YAML, or a key occurs twice.
    """
    if recipe in shipped():
        text = resources.files("spp.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
        return recipe, *parse(text, f"recipe {recipe}")
    try:
        data = Path(recipe).read_bytes()
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(recipe, shipped(), n=1)
        meant = f"did you mean {near[0]}?" if near else f"recipes by name: {', '.join(shipped())}"
        reason = "is a directory" if isinstance(error, IsADirectoryError) else "cannot be read"
        reason = "is no file" if isinstance(error, FileNotFoundError) else reason
        raise ConfigError(f"{arg('recipe')} {recipe} {reason}; {meant}") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"{recipe} has {len(data)} bytes, which is too large for a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{recipe}, line {line}: not UTF-8 text") from None
    return Path(recipe).stem, *parse(text, recipe)


def parse(text: str, name: str) -> tuple[dict[Any, Any], dict[tuple[Any, ...], str]]:
    """Return the contents of a recipe, and where each key is, such as "my.yaml, line 7".

    Raises:
        ConfigError: it is no YAML, or no mapping, or a key occurs twice in one.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            what = "is empty" if node is None else f"holds a {node.id}"
            raise ConfigError(f"{name} {what}; a recipe has keys such as model, prune, tune, merge")
        _check_nodes(node, name)
        contents = loader.construct_document(node)
        return contents, dict(_places(node, name, ()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name}{line}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].count("\n")
        raise ConfigError(f"{name}, line {before + 1}: a character that YAML does not allow") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{name} cannot be read as YAML: {error}") from None


def _check_nodes(top: yaml.Node, name: str) -> None:
    """Refuse keys that occur twice or are no text, and deep nesting."""
    layer: list[yaml.Node] = [top]
    for _ in range(_DEEPEST):
        inner: dict[int, yaml.Node] = {}
        for node in layer:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            seen: dict[str, int] = {}
            for key, value in pairs:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{name}, line {line}: a key must be text")
                if key.value in seen:
                    raise ConfigError(
                        f"{name}, line {line}: the key {key.value!r} occurs twice, first in line {seen[key.value]}; "
                        f"keep one of them"
                    )
                seen[key.value] = line
                inner[id(value)] = value
            if isinstance(node, yaml.SequenceNode):
                inner.update({id(value): value for value in node.value})
        layer = list(inner.values())
    if layer:
        raise ConfigError(f"{name}, line {layer[0].start_mark.line + 1}: mappings or lists nest too deep")
    if _count(top, {}) > _MOST:
        raise ConfigError(f"{name} has more than {_MOST} values, with those that its aliases repeat")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has, each alias counted as what it repeats."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        parts = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def _places(node: yaml.Node, name: str, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if len(path) >= _DEEPEST:
        return
    if isinstance(node, yaml.MappingNode):
        parts = [(key.value, key, value) for key, value in node.value]
    else:
        parts = [(i, item, item) for i, item in enumerate(node.value)] if isinstance(node, yaml.SequenceNode) else []
    for key, place, value in parts:
        yield (*path, key), f"{name}, line {place.start_mark.line + 1}"
        if len(path) < 2:  # stages, measurements, their options
            yield from _places(value, name, (*path, key))
