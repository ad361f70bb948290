"""Rows into examples: a document, a conversation, or a prompt and its completion.

    text         {"text": str}
    alpaca       {"instruction": str, "input": str (optional), "output": str}; also question or query, context, and
                 response or answer; system and reasoning_content where there are
    chat         {"messages": [{"role": str, "content": str, …}, …], "tools": […] (optional)}
                 {"conversations": [{"from": "human" | "gpt" | …, "value": str}, …]}
    completion   {"prompt": str, "completion": str}, joined as they are; or both lists of messages

A field that is null or NaN, as where data sets were merged, is not there. Messages go whole to the chat template. A
turn that the data mark as not to be learned ("weight": 0, "train": false, …) is not; a mark of unclear meaning is an
error, and so is whatever cannot be read as meant (images, say). Other fields of a row (id, source, …) are ignored.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp.configs.pruning import ROW_SUFFIXES, TENSOR_SUFFIXES, TEXT_SUFFIXES
from spp.data.reading import read_dataset_rows, read_file, shown
from spp.errors import DataError, arg

logger = logging.getLogger(__name__)

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant" | "tool" | …, "content": str | None, …}

_SPEAKERS = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "chatgpt", "assistant", "model", "bot", "function_call")},
    **{name: "system" for name in ("system",)},
    **{name: "tool" for name in ("tool", "observation")},
}
_QUESTIONS = ("instruction", "question", "query", "prompt")
_ANSWERS = ("output", "response", "answer")
_MORE = ("input", "context")  # follow the question after an empty line
_SYSTEM = ("system", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Kinds of rows by the fields that say so, in this order.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("completion", ("prompt", "completion")),
    ("alpaca", ("instruction",)),
    *(("alpaca", (question, answer)) for question in _QUESTIONS for answer in _ANSWERS),
)
_MASKS = ("weight", "train", "train_on_turn", "loss", "loss_mask")  # 0 or False: not learned
_TOKEN_MASKS = ("labels", "completion_mask", "assistant_mask", "assistant_masks", "mask")  # not ours
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_BOOKKEEPING = ("id", "index", "timestamp", "created_at")  # of a message: says nothing of what was said
_OPTIONS = ("tools", "documents", "chat_template_kwargs")  # of a row: go to the template


@dataclass(frozen=True)
class Text:
    """A document."""

    where: str
    text: str

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing but white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class Completion:
    """A prompt and what continues it, without a template."""

    where: str
    prompt: str
    completion: str

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be learned."""
        return not self.completion


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Args:
        where: file and row, for messages of errors.
        messages: as the template takes them.
        learn: for each message whether it is to be learned; None learns every answer.
        options: what else goes to the template: tools, documents, chat_template_kwargs.
    """

    where: str
    messages: Sequence[Message]
    learn: Sequence[bool] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> list[int]:
        """The indices of the answers to learn."""
        flags = self.learn or [True] * len(self.messages)
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and flags[i]]

    @property
    def is_empty(self) -> bool:
        """Whether no answer that is to be learned says anything."""
        said = ("content", "tool_calls", *_REASONING)
        return not any(self.messages[i].get(name) for i in self.learned for name in said)


Example = Text | Completion | Conversation


@dataclass(frozen=True)
class Source:
    """Checked data: documents of plain text, or conversations and completions; never both.

    Args:
        documents: plain texts; empty for instruction data.
        conversations: the other rows; empty for text.
        empty: rows left out because their text, or every answer to learn in them, is empty.
    """

    documents: tuple[Text, ...]
    conversations: tuple[Completion | Conversation, ...]
    empty: int

    @property
    def is_text(self) -> bool:
        """Whether this is plain text."""
        return bool(self.documents)


def read_source(
    paths: Iterable[str], *, data_format: str = "auto", split: str = "train", text_field: str = "text"
) -> Source:
    """Read files or data sets whole.

    Args:
        paths: existing files, folders that `datasets` can load, or ids on the Hugging Face hub.
        data_format: "auto", "text", "alpaca" or "chat".
        split: split of a data set.
        text_field: field of plain text in a row.

    Raises:
        DataError: something is missing, empty or malformed; the message has the file and the line or row.
        DependencyError: a data set is asked for and `datasets` is not installed.
    """
    documents: list[Text] = []
    rows: list[Completion | Conversation] = []
    empty = 0
    for path in paths:
        for example in read_examples(path, data_format=data_format, split=split, text_field=text_field):
            if example.is_empty:
                empty += 1
            elif isinstance(example, Text):
                documents.append(example)
            else:
                rows.append(example)
        if documents and rows:
            raise DataError(f"{path} and what comes before it mix plain text and instruction rows; tune on one kind")
    if not documents and not rows:
        raise DataError(
            f"{', '.join(paths)}: no training data: all {empty} rows are empty, or marked as not to be learned"
        )
    return Source(tuple(documents), tuple(rows), empty)


def read_measured(path: str, *, text_field: str = "text") -> Source:
    """Read a file that a perplexity is measured on.

    Args:
        path: a file of text or rows, or a folder that `datasets` can load.
        text_field: field of plain text in a row.

    Raises:
        DataError, DependencyError: as `read_source`.
    """
    if not Path(path).exists():
        raise DataError(f"{path} cannot be read: there is no such file")
    return read_source([path], text_field=text_field)


def read_examples(
    path: str,
    *,
    data_format: str = "auto",
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    seed: int | None = None,
) -> Iterator[Example]:
    """Yield the examples of a file or data set, as they are asked for.

    Args:
        path: a file, a folder that `datasets` can load, or an id on the Hugging Face hub.
        data_format: "auto", "text", "alpaca" or "chat".
        config: which part of a data set that has several.
        split: split of a data set.
        text_field: field of plain text in a row.
        seed: draws the order of the rows of a data set.

    Raises:
        DataError, DependencyError: as `read_source`.
    """
    if Path(path).is_file():
        rows: Iterable[tuple[str, Any]] = read_file(path)
        if data_format not in ("auto", "text") and Path(path).suffix.lower() in ("", *TEXT_SUFFIXES):
            raise DataError(
                f"{path} is no file of rows; {arg('data_format')} {data_format!r} needs one ({', '.join(ROW_SUFFIXES)})"
            )
    else:
        like_a_file = Path(path).suffix.lower() in (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TENSOR_SUFFIXES)
        if (like_a_file or path.startswith(("/", "./", "../", "~"))) and not Path(path).is_dir():
            raise DataError(f"there is no file {path}")
        rows = read_dataset_rows(path, config, split, seed=seed)
    told = False
    for where, row in rows:
        if isinstance(row, str):
            yield Text(where, row)
            continue
        kind, others = data_format, []
        if kind == "auto":
            kind, *others = _kinds(row, where, text_field)
        if others and not told:
            told = True
            logger.warning(
                "%s: the row can be read as %s and as %s: it is read as %s", where, kind, " and ".join(others), kind
            )
        yield _parse(row, where, kind, text_field)


def _kinds(row: Mapping[str, Any], where: str, text_field: str) -> list[str]:
    """Return what a row can be read as, the first of which it is; null and empty fields count where no other does."""
    kinds = (*_KINDS, ("text", (text_field,)))
    there = {name for name, value in row.items() if not _is_null(value)}
    for names in ({name for name in there if row[name] not in ("", [])}, there, set(row)):
        found = list(dict.fromkeys(kind for kind, fields in kinds if names.issuperset(fields)))
        if found:
            return found
    raise DataError(
        f"{where}: the row has the fields {', '.join(sorted(map(str, row))) or '(none)'}; expected messages, "
        f"conversations, prompt and completion, instruction and output, or {text_field}"
    )


def _parse(row: Mapping[str, Any], where: str, kind: str, text_field: str) -> Example:
    row = {name: value for name, value in row.items() if not _is_null(value) or name == text_field}
    lost = [name for name in _MEDIA if not _is_empty(row.get(name))]
    lost += [n for n in _TOKEN_MASKS if not _is_empty(row.get(n)) and (kind != "text" or isinstance(row[n], list))]
    if kind != "text":
        lost += [name for name in ("history", "choices", "functions") if not _is_empty(row.get(name))]
    if kind == "text" or (kind == "completion" and not isinstance(_turns_in(row.get("prompt")), list)):
        lost += [name for name in ("tools", "chat_template_kwargs") if not _is_empty(_decoded(row.get(name)))]
    if lost:
        raise DataError(
            f"{where}: the field {lost[0]} would be lost: a row read as {kind} has no use for it",
            remedy="take it out of the data, or write the row as messages that say the same",
        )
    if kind == "text":
        if text_field not in row:
            raise DataError(f"{where}: expected text in the field {text_field}; the row has {', '.join(row) or 'none'}")
        return Text(where, _string(row, text_field, where) if _learned(row, where) else "")
    if kind == "completion":
        return _completion(row, where)
    if kind == "alpaca":
        return _conversation(row, where, _pair(row, where), [True, True])
    return _conversation(row, where, *_turns(row, where))


def _completion(row: Mapping[str, Any], where: str) -> Completion | Conversation:
    prompt, completion = _turns_in(row.get("prompt")), _turns_in(row.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        messages, learn = _turns({"messages": [*prompt, *completion]}, where)
        return _conversation(row, where, messages, [i >= len(prompt) and flag for i, flag in enumerate(learn)])
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            f"{where}: prompt is {shown(prompt)} and completion is {shown(completion)}; expected two strings, or two "
            f"lists of messages"
        )
    said = _string(row, "completion", where)
    return Completion(where, _string(row, "prompt", where), said if _learned(row, where) else "")


def _pair(row: Mapping[str, Any], where: str) -> list[Message]:
    """Return a question and its answer as messages."""
    question, answer = (_one(row, names, where) for names in (_QUESTIONS, _ANSWERS))
    more = [_string(row, name, where) for name in _MORE if name in row]
    asked = "\n\n".join([_string(row, question, where), *(text for text in more if text.strip())])
    reply: Message = {"role": "assistant", "content": _string(row, answer, where)}
    for name in _REASONING:
        if not _is_empty(row.get(name)):
            reply["reasoning_content"] = _string(row, name, where)
    return [{"role": "user", "content": asked}, reply]


def _one(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    found = [name for name in names if name in row]
    filled = [name for name in found if row[name] != ""]
    if len(filled) > 1:
        raise DataError(f"{where}: the row has {' and '.join(filled)}, so it is not clear which is meant: keep one")
    return (filled or found or names)[0]


def _conversation(row: Mapping[str, Any], where: str, messages: list[Message], learn: list[bool]) -> Conversation:
    """Return the conversation with what the row says beside its messages: system, tools, marks."""
    for name in _MASKS:
        marks = _decoded(row.get(name))
        if isinstance(marks, list) and len(marks) == len(messages):
            told = [
                _marked({name: mark}, f"{where}, {name} of message {i}", message["role"])
                for i, (mark, message) in enumerate(zip(marks, messages, strict=True), start=1)
            ]
            learn = [a and b for a, b in zip(learn, told, strict=True)]
        elif not _is_empty(marks) and not _flag(marks, name, where):
            learn = [False] * len(learn)
    system = [name for name in _SYSTEM if not _is_empty(row.get(name))]
    if system:
        prompt = _string(row, system[0], where)
        if messages[0]["role"] != "system":
            messages, learn = [{"role": "system", "content": prompt}, *messages], [True, *learn]
        elif messages[0]["content"] != prompt:
            raise DataError(f"{where}: {system[0]} and the first message are two system prompts: keep one")
    return Conversation(where, messages, learn, _options(row, where))


def _turns(row: Mapping[str, Any], where: str) -> tuple[list[Message], list[bool]]:
    """Return the messages of a chat row, and whether each may be learned."""
    name = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    turns = _decoded(row.get(name))
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {name} is {shown(turns)}; expected a list of messages")
    messages, learn = [], []
    for number, turn in enumerate(turns, start=1):
        at = f"{where}, message {number}"
        keys = ("from", "value") if name == "conversations" else ("role", "content")
        if isinstance(turn, Mapping):
            turn = {str(key): value for key, value in turn.items() if not _is_null(value)}
            if (keys[0] not in turn and "role" in turn) or (keys[0] not in turn and "from" in turn):
                keys = ("role", "content") if "role" in turn else ("from", "value")
        else:
            raise DataError(f"{at}: a message is an object with {keys[0]} and {keys[1]}, this is {shown(turn)}")
        messages.append(_message(turn, at, *keys))
        learn.append(_marked(turn, at, messages[-1]["role"]))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is no answer to learn")
    return messages, learn


def _message(turn: Mapping[str, Any], at: str, role_key: str, text_key: str) -> Message:
    """Return a message as templates take it: role, content, and whatever else it says."""
    role = _string(turn, role_key, at)
    speaker = role
    if role_key == "from":
        if role not in _SPEAKERS:
            raise DataError(f"{at}: from is {role!r}; known: {', '.join(_SPEAKERS)}")
        speaker = _SPEAKERS[role]
    aside = (role_key, text_key, *_MASKS, *_BOOKKEEPING)
    message: Message = {"role": speaker, "content": None}
    message |= {key: value for key, value in turn.items() if key not in aside and not _is_empty(value)}
    calls = message.pop("tool_calls", None)
    if role == "function_call":
        calls, turn = [_decoded(turn.get(text_key))], {**turn, text_key: None}
        calls = calls[0] if isinstance(calls[0], list) else calls
    if calls is not None:
        message["tool_calls"] = _calls(_decoded(calls), at)
    if "function_call" in message:
        raise DataError(f"{at}: function_call is OpenAI's earlier form of a call", remedy="write it as tool_calls")
    if turn.get(text_key) is None and (calls is not None or (speaker == "assistant" and _reasons(message))):
        return message  # content: null, as OpenAI writes a call
    content = turn.get(text_key)
    message["content"] = _joined(content, at) if isinstance(content, list) and content else _string(turn, text_key, at)
    return message


def _reasons(message: Message) -> bool:
    return any(name in message for name in _REASONING)


def _joined(parts: list[Any], at: str) -> str:
    """Return content in parts as one text."""
    for number, part in enumerate(parts, start=1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise DataError(f"{at}: part {number} of its content is of type {kind}, and text alone is read")
    return "".join(part["text"] for part in parts)


def _calls(calls: object, at: str) -> list[Any]:
    """Return tool calls with their arguments as objects; templates that want text get that (templates.py)."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{at}: tool_calls is {shown(calls)}; expected a list of calls")
    found = []
    for call in calls:
        call = {key: value for key, value in call.items() if value is not None}
        inner = _decoded(call.get("function", {key: value for key, value in call.items() if key != "id"}))
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(f"{at}: a call is {shown(call)}; expected a function with name and arguments")
        inner = {**inner, "arguments": _decoded(inner.get("arguments", {}))}
        marks = {key: value for key, value in call.items() if "function" in call or key == "id"}
        found.append({"type": "function", **marks, "function": inner})
    return found


def _options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a row hands to the template beside its messages."""
    found = {name: _decoded(row.get(name)) for name in _OPTIONS}
    found = {name: value for name, value in found.items() if not _is_empty(value)}
    if isinstance(found.get("documents"), str):
        del found["documents"]  # a field of that name that is none of the template's
    for name in set(found) & {"tools", "documents"}:
        listed = found[name] if isinstance(found[name], list) else [None]
        items = [item for item in map(_decoded, listed) if isinstance(item, dict)]
        if len(items) < len(listed):
            raise DataError(f"{where}: {name} is {shown(found[name])}; expected a list of objects, or that as JSON")
        if name == "tools":  # the bare form {"name", "description", "parameters"} too
            items = [{"type": "function", "function": t} if "name" in t and "function" not in t else t for t in items]
        found[name] = items
    extra = found.pop("chat_template_kwargs", {})
    if not isinstance(extra, Mapping):
        raise DataError(f"{where}: chat_template_kwargs is {shown(extra)}; expected an object")
    return {**extra, **found}


def _marked(turn: Mapping[str, Any], at: str, role: str) -> bool:
    """Return whether a message may be learned, as its own marks say."""
    lost = [name for name in _TOKEN_MASKS if not _is_empty(turn.get(name))]
    if lost:
        raise DataError(
            f"{at}: {lost[0]} marks tokens, and tokens are made here", remedy="mark whole turns by weight 0"
        )
    flags = {name: _flag(turn[name], name, at) for name in _MASKS if not _is_empty(turn.get(name))}
    wanted = [name for name, flag in flags.items() if flag]
    if wanted and role != "assistant":
        raise DataError(
            f"{at}: {wanted[0]} is {turn[wanted[0]]!r} on a message of {role}, and only the assistant's are learned",
            remedy=f"take it out; to learn prompts as well there is {arg('completions_only', False)}",
        )
    return all(flags.values())


def _learned(row: Mapping[str, Any], where: str) -> bool:
    return all(_flag(row[name], name, where) for name in _MASKS if not _is_empty(row.get(name)))


def _flag(value: object, name: str, at: str) -> bool:
    words = {"0": False, "1": True, "false": False, "true": True}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise DataError(
        f"{at}: {name} is {shown(value)}; read are 0 or false (not to be learned) and 1 or true",
        remedy="take the field out, or write one of these",
    )


def _decoded(value: Any) -> Any:
    """Return what a string holds that is a JSON list or object, as tables store them; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turns_in(value: Any) -> Any:
    """Return the list of messages that a string holds as JSON; anything else, JSON or not, as it is."""
    found = _decoded(value)
    is_turns = isinstance(found, list) and bool(found) and all(isinstance(x, dict) and "role" in x for x in found)
    return found if is_turns else value


def _is_null(value: object) -> bool:
    """Whether a table's cell is empty: null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_empty(value: object) -> bool:
    return _is_null(value) or (isinstance(value, (str, list, dict)) and not value)


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"{where}: the field {name} is missing; there are {', '.join(sorted(map(str, row))) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {shown(value)}; expected a string")
    return value
