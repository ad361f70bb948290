"""A table of text, and how names, counts, sizes and times are written in one.

Each report has a function that makes its table beside it, and shows that table in a notebook.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text.

    Args:
        title: the line above; may be empty.
        columns: the heads.
        rows: the cells of each row, one a column.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.

    Example:
        >>> print(Table("sizes", ("name", "size"), (("a", "1"), ("bb", "20"))).text())
        sizes
        name  size
        ----  ----
        a        1
        bb      20
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells, not {len(self.columns)}: {row}")

    def numeric(self, column: int) -> bool:
        """Return whether every cell of a column begins like a number; such a column is set flush right."""
        return all(re.match(r"[-+−]?[\d.]|[–-]?$", row[column]) for row in self.rows)

    def text(self) -> str:
        """Return the table in aligned columns; no line ends in blanks."""
        widths = [max(len(line[i]) for line in (self.columns, *self.rows)) for i in range(len(self.columns))]
        aligned = [str.rjust if self.numeric(i) else str.ljust for i in range(len(self.columns))]
        lines = [self.columns, tuple("-" * width for width in widths), *self.rows]
        body = ["  ".join(f(c, w) for f, c, w in zip(aligned, line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *body] if self.title else body)

    def markdown(self) -> str:
        """Return the table in markdown, without its title."""
        rule = ["--:" if self.numeric(i) else "---" for i in range(len(self.columns))]
        return "\n".join("| " + " | ".join(line) + " |" for line in (self.columns, tuple(rule), *self.rows))

    def html(self) -> str:
        """Return the table in HTML, its title as the caption; everything in it is text, whatever it looks like."""
        right = [' style="text-align:right"' if self.numeric(i) else ' style="text-align:left"' for i in self._places]
        heads = "".join(f'<th scope="col"{right[i]}>{escaped(self.columns[i])}</th>' for i in self._places)
        lines = []
        for row in self.rows:
            cells = "".join(f"<td{right[i]}>{escaped(row[i])}</td>" for i in self._places[1:])
            lines.append(f'<tr><th scope="row"{right[0]}>{escaped(row[0])}</th>{cells}</tr>\n')
        caption = f"<caption>{escaped(self.title)}</caption>\n" if self.title else ""
        return f"<table>\n{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>"

    _repr_html_ = html  # which notebooks show

    @property
    def _places(self) -> range:
        return range(len(self.columns))


def escaped(text: object) -> str:
    """Return a text for HTML, between tags or in an attribute; control characters are replaced."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(text)))


def fields_table(title: str, values: Mapping[str, Any]) -> Table:
    """Return named values as a table of two columns, without those that are None."""
    shown = tuple((name, str(value)) for name, value in values.items() if value is not None)
    return Table(title, ("", "value"), shown)


def kind_of(name: str) -> str:
    """Return the kind of a projection: its path behind the last number, without `.weight`.

    Args:
        name: a module path, or a key of a checkpoint.

    Example:
        >>> kind_of("model.layers.3.self_attn.q_proj.weight")
        'self_attn.q_proj'
    """
    return re.split(r"(?:^|\.)\d+\.", name.removesuffix(".weight"))[-1]


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural except for one.

    Args:
        count: how many.
        noun: in the singular.

    Example:
        >>> count_text(1, "window"), count_text(2, "window")
        ('1 window', '2 windows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def byte_text(count: float) -> str:
    """Return a size in MiB or GiB.

    Args:
        count: bytes.

    Example:
        >>> byte_text(3 * 2**20)
        '3.0 MiB'
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def time_text(seconds: float) -> str:
    """Return a duration as a person would say it.

    Args:
        seconds: of the duration.

    Example:
        >>> time_text(12.34), time_text(245)
        ('12.3 s', '4 min 05 s')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def grouped(entries: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """Return the entries by the kind of their names."""
    groups: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(kind_of(name), []).append(entry)
    return groups


def joined(values: Iterable[str]) -> str:
    """Return the different texts, in their order."""
    return ", ".join(dict.fromkeys(values))


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Return one number, or `lowest … highest`; empty for no number."""
    if not values:
        return ""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} … {high}"
