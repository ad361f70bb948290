"""Reading training files: text, JSON and JSON Lines, or a hub dataset, into checked rows.

What a row can be (the field names are those of the Alpaca and ShareGPT data sets):

    text     {"text": str}
    alpaca   {"instruction": str, "input": str (optional), "output": str}
    chat     {"messages": [{"role": str, "content": str}, …]}
             {"conversations": [{"from": "human" | "gpt" | "system", "value": str}, …]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.errors import DataError, DependencyError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant" | …, "content": str}

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_SPEAKERS = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "chatgpt", "assistant", "model", "bot")},
    **{name: name for name in ("system", "tool")},
}


@dataclass(frozen=True)
class Source:
    """Checked training data: documents of plain text, or conversations; never both.

    Args:
        documents: plain texts; empty for instruction data.
        conversations: (where it comes from, its messages) for each row; empty for text.
        empty: rows left out because their text, or every answer in them, is empty.
    """

    documents: tuple[str, ...]
    conversations: tuple[tuple[str, list[Message]], ...]
    empty: int

    @property
    def is_text(self) -> bool:
        """Whether this is plain text."""
        return bool(self.documents)


def read_source(
    paths: Iterable[str], *, data_format: str = "auto", split: str = "train", text_field: str = "text"
) -> Source:
    """Read files or hub data sets.

    Args:
        paths: existing files, or ids on the Hugging Face hub.
        data_format: "auto", "text", "alpaca" or "chat".
        split: split of a hub data set.
        text_field: field of plain text in a row.

    Raises:
        DataError: something is missing, empty or malformed; the message has the file and the line or row.
        DependencyError: a hub data set is asked for and `datasets` is not installed.
    """
    documents: list[str] = []
    conversations: list[tuple[str, list[Message]]] = []
    empty = 0
    for path in paths:
        file = Path(path)
        if file.is_file() and file.suffix.lower() not in _JSON_SUFFIXES:
            if data_format not in ("auto", "text"):
                raise DataError(f"{path} is no JSON file; data_format {data_format!r} needs one ({_JSON_SUFFIXES})")
            documents.append(read_text(file))
            continue
        found = read_json_rows(file) if file.is_file() else _hub_rows(path, split)
        for where, row in found:
            messages, text = _parse(row, where, data_format, text_field)
            if messages is not None:
                conversations.append((where, messages))
            elif text.strip():
                documents.append(text)
            else:
                empty += 1
        if documents and conversations:
            raise DataError(f"{path} and what comes before it mix plain text and instruction rows; tune on one kind")
    answered = [(where, m) for where, m in conversations if any(x["content"] for x in m if x["role"] == "assistant")]
    empty += len(conversations) - len(answered)
    if not documents and not answered:
        raise DataError(f"{', '.join(paths)}: no training data: all {empty} rows are empty")
    return Source(tuple(documents), tuple(answered), empty)


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def read_json_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for each row of a JSON array or a JSON Lines file, told apart by the first character."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        if not rows:
            raise DataError(f"{path} is an empty JSON array")
        for number, row in enumerate(rows, start=1):
            yield _checked(f"{path}, row {number}", row)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, column {error.colno}: not JSON: {error.msg} "
                    "(a file holds one JSON array, or one JSON object a line)"
                ) from None
            yield _checked(f"{path}, line {number}", row)


def _checked(where: str, row: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, this is {_shown(row)}")
    return where, row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if Path(name).suffix.lower() in (*_JSON_SUFFIXES, ".txt") or name.startswith(("/", "./", "../", "~")):
        raise DataError(f"there is no file {name}")
    try:
        import datasets
    except ImportError:
        raise DependencyError(
            f"there is no file {name}, and to load it as a hub data set the package datasets is needed: "
            "pip install 'spp[train]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises OSError, ValueError, its own and those of the HTTP client
        raise DataError(
            f"{name} is no file here, and as a hub data set (split {split!r}) it cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _checked(f"{name}, row {number}", dict(row))


def _parse(row: Mapping[str, Any], where: str, data_format: str, text_field: str) -> tuple[list[Message] | None, str]:
    """Return (messages, "") for an instruction row, or (None, text)."""
    kind = data_format
    if kind == "auto":
        if "messages" in row or "conversations" in row:
            kind = "chat"
        elif "instruction" in row:
            kind = "alpaca"
        elif text_field in row:
            kind = "text"
        else:
            raise DataError(
                f"{where}: the row has the fields {', '.join(sorted(row)) or '(none)'}; expected messages, "
                "conversations, "
                f"instruction and output, or {text_field}"
            )
    if kind == "chat":
        return _chat(row, where), ""
    if kind == "alpaca":
        return _alpaca(row, where), ""
    return None, _string(row, text_field, where)


def _alpaca(row: Mapping[str, Any], where: str) -> list[Message]:
    instruction = _string(row, "instruction", where)
    extra = _string(row, "input", where) if row.get("input") is not None else ""
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output", where)}]


def _chat(row: Mapping[str, Any], where: str) -> list[Message]:
    field, role_key, text_key = ("messages", "role", "content")
    if "messages" not in row and "conversations" in row:
        field, role_key, text_key = ("conversations", "from", "value")
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {field} is {_shown(turns)}; expected a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        at = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{at}: a message is an object with {role_key} and {text_key}, this is {_shown(turn)}")
        role = _string(turn, role_key, at)
        if field == "conversations":
            if role not in _SPEAKERS:
                raise DataError(f"{at}: from is {role!r}; known: {', '.join(_SPEAKERS)}")
            role = _SPEAKERS[role]
        messages.append({"role": role, "content": _string(turn, text_key, at)})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is no answer to learn")
    return messages


def _string(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: the field {field} is missing; there are {', '.join(sorted(map(str, row))) or 'none'}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {_shown(value)}; expected a string")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
