"""From a conversation to text: the tokenizer's chat template, or a plain prompt where it has none.

A message goes whole to the template: tool calls, reasoning, names, tool results; a row's tools beside it. Templates
differ in the form that they take: content as text or in parts, null or empty, the arguments of a call as an object or
as JSON. The first form that the template writes whole is taken. Whether it writes a field is tried: each field gets a
mark of its own, and a mark that is not in the text is a field that would be lost, which is an error.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spp.data.parsing import Conversation, Message
from spp.data.tokens import special_pattern
from spp.errors import DataError

# The prompt for a tokenizer without a chat template: each turn is a heading and, below it, the words; an empty line
# between turns; the end-of-text token after each answer.
PLAIN_HEADINGS = {"system": "### Task", "user": "### Request", "assistant": "### Answer"}

_LINKS = ("role", "tool_call_id")  # say which message answers which call: their order says it too
_ASKED, PROBE, _NEXT = "zqaskedqz", "zqprobeqz", "zqnextqz"  # words that no template writes
_REASONING_END = "</think>"


@dataclass(frozen=True)
class Form:
    """How a template takes messages.

    Args:
        parts: content as a list of parts, not as text.
        text_arguments: the arguments of a call as JSON text, not as an object.
        no_null: content that is null as an empty text.
    """

    parts: bool = False
    text_arguments: bool = False
    no_null: bool = False


@dataclass(frozen=True)
class Closing:
    """The text that a template writes after an answer.

    Args:
        text: at the end of a conversation; None where it cannot be told.
        end: characters of that up to and with the end-of-turn token; 0 where it holds none.
        next_token: the end-of-turn token, where the template writes it before the next turn instead; else "".
    """

    text: str | None
    end: int
    next_token: str


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template, or without.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.is_templated = bool(getattr(tokenizer, "chat_template", None))
        self.end_token: str = getattr(tokenizer, "eos_token", None) or ""
        self.specials = special_pattern(tokenizer)
        self._closings: dict[str, Closing] = {}
        self._form = Form()  # the last that was right: most rows of a file are alike

    def form_of(self, row: Conversation) -> Form:
        """Return the form of a conversation's messages that the template writes whole.

        Raises:
            DataError: the template refuses the conversation, or there is a field that it does not write.
        """
        if not self.is_templated:
            self.render(row, row.messages, Form())
            return Form()
        calls = any("tool_calls" in message for message in row.messages)
        null = any(message["content"] is None for message in row.messages)
        both = (False, True)
        forms = [Form(*form) for form in itertools.product(both, both[: 1 + calls], both[: 1 + null])]
        if self._form in forms:
            forms.insert(0, forms.pop(forms.index(self._form)))
        problem: DataError | None = None
        for form in forms:
            try:
                self._check(row, form)
            except DataError as error:
                if problem is None or (problem.__cause__ and not error.__cause__):  # what is lost says more
                    problem = error
            else:
                self._form = form
                return form
        assert problem is not None
        raise problem

    def render(self, row: Conversation, messages: Sequence[Message], form: Form, *, answer_next: bool = False) -> str:
        """Return the text of messages, those of the row or others in their place.

        Args:
            row: the conversation, for its options.
            messages: what is rendered.
            form: how the template takes them.
            answer_next: end with what the template writes before an answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._text([_shaped(m, form) for m in messages], row.where, row.options, answer_next)

    def closing(self, row: Conversation, form: Form) -> Closing:
        """Return what the template writes after answers, found by three short conversations that it is handed."""
        key = repr((row.options, form))
        if key not in self._closings:
            if len(self._closings) > 1000:  # each row has tools of its own
                self._closings.clear()
            try:
                self._closings[key] = self._find_closing(row, form)
            except DataError:  # it takes other conversations only
                self._closings[key] = Closing(None, 0, "")
        return self._closings[key]

    def shared(self, one: str, other: str) -> int:
        """Return how many characters two texts begin with alike, without half of a special token."""
        length = len(os.path.commonprefix([one, other]))  # noqa: RUF071  character by character is meant
        for text in (one, other):
            for match in self.specials.finditer(text, max(0, length - 100)):
                if match.start() < length < match.end():
                    length = match.start()
                if match.start() >= length:
                    break
        return length

    def _find_closing(self, row: Conversation, form: Form) -> Closing:
        turns = [{"role": r, "content": c} for r, c in (("user", _ASKED), ("assistant", PROBE), ("user", _NEXT))]
        last = self.render(row, turns[:2], form).rpartition(PROBE)[2]
        between = self.render(row, turns, form).partition(PROBE)[2].partition(_NEXT)[0]
        heading = self.render(row, turns[:1], form).partition(_ASKED)[0]
        ends = [match.end() for match in self.specials.finditer(last[: self.shared(last, between)])]
        if ends:
            return Closing(last, ends[-1], "")
        match = self.specials.match(between, len(between) - len(between.lstrip()))
        if match is None or (heading.endswith(between) and match[0] != self.end_token):
            return Closing(last, 0, "")  # nothing, or the heading of the next turn
        return Closing(last, 0, match[0])

    def _check(self, row: Conversation, form: Form) -> None:
        text = self.render(row, row.messages, form)
        for call in _calls_of(row.messages):
            said = call["function"]["arguments"]
            if not form.text_arguments and _json(said) not in (said, repr(said)) and repr(said) in text:
                raise self._lost(row.where, "the arguments of a call as JSON")
        if not form.no_null and any(message["content"] is None for message in row.messages):
            empty = self.render(row, row.messages, Form(form.parts, form.text_arguments, True))
            if text.count("None") > empty.count("None"):
                raise self._lost(row.where, "content that is null")
        for name in ("tools", "documents"):
            if name in row.options:
                without = {key: value for key, value in row.options.items() if key != name}
                try:
                    used = self.render(Conversation(row.where, [], None, without), row.messages, form) != text
                except DataError:
                    used = True
                if not used:
                    raise self._lost(row.where, name)
        self._check_marks(row, form)
        for i, message in enumerate(row.messages):
            for name, value in message.items():
                if name not in ("role", "content", "tool_calls") and not isinstance(value, str):
                    fewer = [*row.messages[:i], {k: v for k, v in message.items() if k != name}]
                    if self.render(row, fewer, form) == self.render(row, row.messages[: i + 1], form):
                        raise self._lost(f"{row.where}, message {i + 1}", name)

    def _check_marks(self, row: Conversation, form: Form) -> None:
        marked, marks = _marked(row.messages)
        try:
            shown = self.render(row, marked, form)
        except DataError:  # it takes the row, but no other words in it
            return
        for mark, (i, name) in marks.items():
            if mark in shown:
                continue
            # Some templates write the reasoning of the last answer alone: each answer then is learned as the last.
            was_last = row.messages[i]["role"] == "assistant" and i + 1 < len(marked)
            if not was_last or mark not in self.render(row, marked[: i + 1], form):
                raise self._lost(f"{row.where}, message {i + 1}", name)

    def _lost(self, where: str, what: str) -> DataError:
        return DataError(
            f"{where}: the tokenizer's chat template does not write {what}, so it would be lost",
            remedy="take it out of the data, or use a tokenizer whose template writes it",
        )

    def _text(self, messages: list[Message], where: str, options: Mapping[str, Any], answer_next: bool) -> str:
        if not self.is_templated:
            return _plain_text(messages, self.end_token, where, options, answer_next)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answer_next, **options
                )
            )
        except Exception as error:  # jinja2 raises its own, and whatever the template's expressions raise
            held = sorted({key for message in messages for key in message} - {"role", "content"}) + sorted(options)
            more = f" (it holds {', '.join(held)} beside role and content)" if held else ""
            raise DataError(
                f"{where}: the tokenizer's chat template refuses this conversation{more}: {error}",
                remedy="mend the row, or use a tokenizer whose template takes it" if held else None,
            ) from error


def _calls_of(messages: Sequence[Message]) -> list[Any]:
    return [call for message in messages for call in message.get("tool_calls", ())]


def _shaped(message: Message, form: Form) -> Message:
    content = message["content"]
    if content is None and form.no_null:
        content = ""
    if form.parts and content is not None:
        content = [{"type": "text", "text": content}]
    shaped = {**message, "content": content}
    if form.text_arguments and "tool_calls" in message:
        shaped["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return shaped


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _marked(messages: Sequence[Message]) -> tuple[list[Message], dict[str, tuple[int, str]]]:
    """Return the messages with a mark in each of their texts, and {mark: (message, name of the field)}."""
    marks: dict[str, tuple[int, str]] = {}
    called = {call["function"]["name"] for call in _calls_of(messages)}

    def mark(i: int, name: str) -> str:
        made = f"zq{len(marks)}qz"
        marks[made] = (i, name)
        return made

    marked = []
    for i, message in enumerate(messages):
        new = dict(message)
        for name, value in message.items():
            if name in _LINKS or not isinstance(value, str) or not value.strip():
                continue
            if name == "name" and message["role"] == "tool" and value in called:
                continue  # the call says it
            before, end, after = value.partition(_REASONING_END)
            if name == "content" and message["role"] == "assistant" and end and before.strip():
                value = before + mark(i, f"the reasoning in content (before {_REASONING_END})") + end + after
            new[name] = value + mark(i, name)
        if "tool_calls" in message:
            new["tool_calls"] = [_marked_call(call, i, j, mark) for j, call in enumerate(message["tool_calls"])]
        marked.append(new)
    return marked, marks


def _marked_call(call: Any, i: int, j: int, mark: Any) -> Any:
    function = dict(call["function"])
    function["name"] += mark(i, f"tool_calls[{j}].function.name")
    said = function["arguments"]
    if isinstance(said, dict) and said:
        made = mark(i, f"tool_calls[{j}].function.arguments")
        function["arguments"] = {**said, made: made}
    elif isinstance(said, str) and said.strip():
        function["arguments"] = said + mark(i, f"tool_calls[{j}].function.arguments")
    return {**call, "function": function}


def _plain_text(messages: list[Message], end: str, where: str, options: Mapping[str, Any], answer_next: bool) -> str:
    turns = []
    for message in messages:
        role, words = message["role"], message["content"]
        lost = sorted(set(message) - {"role", "content"}) + sorted(options)
        if role not in PLAIN_HEADINGS:
            raise DataError(
                f"{where}: the role {role!r} needs a tokenizer with a chat template; without one there are "
                f"{', '.join(PLAIN_HEADINGS)}"
            )
        if lost:
            raise DataError(f"{where}: {lost[0]} needs a tokenizer with a chat template, and this one has none")
        turns.append(f"{PLAIN_HEADINGS[role]}\n{words}{end if role == 'assistant' else ''}")
    if answer_next:
        turns.append(PLAIN_HEADINGS["assistant"] + "\n")
    return "\n\n".join(turns)
