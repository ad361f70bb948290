"""Reading training files: text, JSON and JSON Lines, or a hub dataset, into checked rows.

What a row can be (the field names are those of the Alpaca and ShareGPT data sets):

    text     {"text": str}
    alpaca   {"instruction": str, "input": str (optional), "output": str}
    chat     {"messages": [{"role": str, "content": str}, …]}
             {"conversations": [{"from": "human" | "gpt" | "system", "value": str}, …]}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.configs.pruning import JSON_SUFFIXES
from spp.errors import DataError
from spp.files.rows import read_dataset_rows, read_json_rows, read_text, shown

Message = dict[str, str]  # {"role": "system" | "user" | "assistant" | …, "content": str}

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
        if file.is_file() and file.suffix.lower() not in JSON_SUFFIXES:
            if data_format not in ("auto", "text"):
                raise DataError(f"{path} is no JSON file; data_format {data_format!r} needs one ({JSON_SUFFIXES})")
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


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    like_a_file = Path(name).suffix.lower() in (*JSON_SUFFIXES, ".txt") or name.startswith(("/", "./", "../", "~"))
    if like_a_file and not Path(name).is_dir():
        raise DataError(f"there is no file {name}")
    yield from read_dataset_rows(name, split=split)


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
                f"conversations, instruction and output, or {text_field}"
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
        raise DataError(f"{where}: {field} is {shown(turns)}; expected a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        at = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{at}: a message is an object with {role_key} and {text_key}, this is {shown(turn)}")
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
        raise DataError(f"{where}: {field} is {shown(value)}; expected a string")
    return value
