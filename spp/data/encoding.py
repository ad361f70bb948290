"""From an example to token ids and labels.

Only answers are labelled, unless everything is asked for. They are found by rendering the conversation turn by turn:
what turn i adds to the text of the prompt before it is its answer, up to and with one end-of-turn token. The offsets
of the tokenizer then say which tokens those characters became, so that the whole row is tokenised once. An end-of-turn
token that the template writes before the next turn belongs to the answer all the same; where it writes none, the
tokenizer's end-of-text token ends the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.data.parsing import Completion, Conversation, Example, Source, Text, read_measured
from spp.data.templates import PROBE, ChatTemplate, Form
from spp.data.tokens import IGNORED, Tokens, added_bos, document_ids, tokens_of, without_bos
from spp.errors import DataError, arg


@dataclass(frozen=True)
class EncodedRow:
    """One conversation in tokens.

    Args:
        input_ids: (T,).
        labels: (T,), −100 where nothing is to be learned.
        length: tokens before the cut to the block length.
        where: file and row.
        ends: whether an end-of-turn token is learned.
    """

    input_ids: Tensor
    labels: Tensor
    length: int
    where: str = ""
    ends: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the row was longer than the block length."""
        return self.length > len(self.input_ids)

    @property
    def has_labels(self) -> bool:
        """Whether a token after the first is to be learned."""
        return bool((self.labels[1:] != IGNORED).any())


@dataclass(frozen=True)
class _Span:
    """An answer in a text: its first character, the one behind its last, and whether that is an end-of-turn token's."""

    start: int
    end: int
    ends: bool


class Encoder:
    """Tokenises conversations, and prompts with their completions.

    Args:
        tokenizer: with a chat template, or without.
        block_length: cut to this many tokens; None does not cut.
        completions_only: label the answers only.

    Raises:
        DataError: the tokenizer cannot tell answers from prompts.
    """

    def __init__(self, tokenizer: Any, *, block_length: int | None, completions_only: bool = True) -> None:
        self._template = ChatTemplate(tokenizer)
        self._tokenizer = tokenizer
        self._length = block_length
        self._completions_only = completions_only
        if completions_only:
            self._require_offsets()

    def encode(self, row: Conversation | Completion) -> list[EncodedRow]:
        """Tokenise one conversation: into one row, or, with a template that rewrites earlier turns, into one an answer.

        Some templates drop an earlier answer's reasoning once another turn follows, or write no end-of-turn token
        between turns. The model never sees such a conversation in one piece, so each answer then becomes a row of
        its own, after the turns as the template writes them.

        Raises:
            DataError: the chat template refuses the conversation, does not write all of it, or renders it so that
                answers cannot be found.
        """
        if isinstance(row, Completion):
            end = self._template.end_token
            text = row.prompt + row.completion
            text += "" if end and text.endswith(end) else end
            return [self._row(row.where, text, [_Span(len(row.prompt), len(text), bool(end))], special=True)]
        form = self._template.form_of(row)
        whole = self._template.render(row, row.messages, form)
        if not self._completions_only:
            return [self._everything(row, whole, form)]
        answers = [self._answer(row, i, form) for i in row.learned]
        final = [index + 1 == len(row.messages) for index in row.learned]
        spans = [self._within(whole, *answer, last) for answer, last in zip(answers, final, strict=True)]
        found = [span for span in spans if span is not None]
        if len(found) == len(answers):
            if final[-1]:
                whole, found[-1] = self._ended(row, whole, found[-1], form)
            return [self._row(row.where, whole, found)]
        ended = [self._ended(row, *answer, form) for answer in answers]
        return [self._row(row.where, text, [span]) for text, span in ended]

    def _everything(self, row: Conversation, whole: str, form: Form) -> EncodedRow:
        """Return a conversation of which all is learned but the turns that are marked as not to be."""
        asides = []
        for i, learned in enumerate(row.learn or ()):
            if not learned:
                before, upto = (self._template.render(row, row.messages[:j], form) if j else "" for j in (i, i + 1))
                span = (self._template.shared(before, whole), self._template.shared(upto, whole))
                if not span[0] < span[1]:
                    raise self._apart(row.where, f"message {i + 1} cannot be told from the others")
                asides.append(_Span(*span, False))
        if row.messages[-1]["role"] == "assistant":
            last = self._end(row, form, whole, 0)
            whole, _ = self._ended(row, whole, last, form)
            return self._row(row.where, whole, [_Span(0, len(whole), last.ends or last.end < len(whole))], asides)
        return self._row(row.where, whole, [_Span(0, len(whole), False)], asides)

    def _apart(self, where: str, what: str) -> DataError:
        return DataError(f"{where}: with this tokenizer's chat template {what}")

    def _answer(self, row: Conversation, index: int, form: Form) -> tuple[str, _Span]:
        """Return the text of the conversation up to an answer, and where the answer is in it."""
        before = row.messages[:index]
        text = self._template.render(row, row.messages[: index + 1], form)
        prompt = self._template.render(row, before, form, answer_next=True) if before else ""
        start = len(prompt)
        if not prompt or not text.startswith(prompt):
            # Some templates begin the answer in the prompt (<think>), or end every text alike.
            probe = {"role": "assistant", "content": PROBE}
            tried = self._template.render(row, [*before, probe], form)
            start = self._template.shared(prompt, tried) if prompt else max(0, tried.find(PROBE))
            least = self._template.shared(prompt, self._template.render(row, before, form)) if before else 0
            if start < max(1, least) or start > tried.find(PROBE) or not text.startswith(tried[:start]):
                raise self._apart(
                    row.where,
                    f"an answer does not continue its prompt, so the two cannot be told apart: use "
                    f"{arg('completions_only', False)}",
                )
        return text, self._end(row, form, text, start)

    def _end(self, row: Conversation, form: Form, text: str, start: int) -> _Span:
        """Return the span of the answer that a text ends with, up to and with its end-of-turn token if it has one."""
        closing = self._template.closing(row, form)
        if closing.text is not None and text.endswith(closing.text) and (closing.text or closing.next_token):
            body = len(text) - len(closing.text)
            token = closing.text[: closing.end].strip() or closing.next_token
            said = text[start:body].rstrip()
            if token and said.endswith(token):  # the data hold it too
                return _Span(start, start + len(said), True)
            if closing.end:
                return _Span(start, body + closing.end, True)
        said = text[start:].rstrip()
        ends = [match.end() for match in self._template.specials.finditer(said)]
        if ends and ends[-1] == len(said):
            return _Span(start, start + len(said), True)
        return _Span(start, len(text), False)

    def _within(self, whole: str, text: str, span: _Span, last: bool) -> _Span | None:
        """Return where an answer is in the whole conversation; None if it is not there as it ends `text`."""
        if not whole.startswith(text[: span.end]):
            return None
        if span.ends or last:
            return span
        rest = whole[span.end :]
        match = self._template.specials.match(whole, span.end + len(rest) - len(rest.lstrip()))
        if match is not None:  # the end-of-turn token, or the heading of the next turn that ends this one
            return _Span(span.start, match.end(), True)
        return None if self._template.end_token else span

    def _ended(self, row: Conversation, text: str, span: _Span, form: Form) -> tuple[str, _Span]:
        """Return a text that ends with an answer, and the answer's span, with an end-of-turn token."""
        if span.ends:
            return text, span
        token = self._template.closing(row, form).next_token or self._template.end_token
        text = text[: span.end] + token
        return text, _Span(span.start, len(text), bool(token))

    def _row(
        self,
        where: str,
        text: str,
        spans: Sequence[_Span],
        asides: Sequence[_Span] = (),
        *,
        special: bool | None = None,
    ) -> EncodedRow:
        """Tokenise a text and label the spans, without those aside."""
        # A template writes the special tokens itself.
        special = not self._template.is_templated if special is None else special
        told = self._completions_only or bool(asides)
        if told:
            self._require_offsets()
        tokens = tokens_of(self._tokenizer, text, where=where, special=special, offsets=told)
        ids = torch.tensor(tokens.ids, dtype=torch.long, device="cpu")  # (T,)
        kept = len(ids) if self._length is None else self._length
        labels, ends = ids.clone(), any(span.ends for span in spans) and len(ids) <= kept
        if self._completions_only:
            # A token that holds the last character of the prompt and the first of the answer is part of the answer.
            labels[~_inside(tokens, spans)] = IGNORED
            last = {span.end for span in spans if span.ends}
            ends = not last.isdisjoint(end for _, end in tokens.offsets[:kept])
        if asides:
            labels[_inside(tokens, asides)] = IGNORED
        return EncodedRow(ids[:kept], labels[:kept], len(ids), where, ends)

    def _require_offsets(self) -> None:
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self._tokenizer).__name__} cannot say which characters became which tokens, so the answers "
                f"cannot be told from the prompts: use a fast tokenizer, or {arg('completions_only', False)}"
            )


def _inside(tokens: Tokens, spans: Sequence[_Span]) -> Tensor:
    offsets = torch.tensor(tokens.offsets, dtype=torch.long, device="cpu").view(-1, 2)  # (T, 2)
    inside = torch.zeros(len(offsets), dtype=torch.bool, device="cpu")
    for span in spans:
        inside |= (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
    return inside


def encode(
    tokenizer: Any, row: Conversation | Completion, *, block_length: int | None, completions_only: bool = True
) -> list[EncodedRow]:
    """Tokenise one conversation: `Encoder` does the same for many.

    Args:
        tokenizer, block_length, completions_only: as for Encoder.
        row: what is tokenised.
    """
    return Encoder(tokenizer, block_length=block_length, completions_only=completions_only).encode(row)


def example_ids(tokenizer: Any, examples: Iterable[Example], *, closed: bool = True) -> Iterable[list[int]]:
    """Yield the token ids of each example: documents as they are, conversations as the chat template writes them.

    Both are without BOS at their start where the tokenizer puts it before a text: the windows that they are cut into
    begin with it (`cut_windows` of spp.data.tokens).

    Args:
        tokenizer: the model's.
        examples: what is tokenised; those that are empty, or marked as not to be learned, are left out.
        closed: end each document with the end-of-text token: another follows.
    """
    encoder = Encoder(tokenizer, block_length=None, completions_only=False)
    added = added_bos(tokenizer)
    for example in examples:
        if example.is_empty:
            continue
        if not isinstance(example, Text):
            yield from (without_bos(row.input_ids.tolist(), added) for row in encoder.encode(example))
        else:
            yield document_ids(tokenizer, example.text, where=example.where, closed=closed, added=added)


def read_tokens(tokenizer: Any, path: str, *, text_field: str = "text") -> Tensor:
    """Return a file as one sequence of tokens, to measure a perplexity on: those that tuning on it would see.

    BOS is not among them: `cut_windows` (spp.data.tokens) puts it before each window.

    Args:
        tokenizer: the model's.
        path: a file of text or rows, or a folder that `datasets` can load.
        text_field: field of plain text in a row.

    Returns:
        Int64 (T,).

    Raises:
        DataError, DependencyError: as spp.data.parsing.read_source.
    """
    return source_tokens(tokenizer, read_measured(path, text_field=text_field))


def source_tokens(tokenizer: Any, source: Source) -> Tensor:
    """Return what was read as one sequence of tokens (T,), as `read_tokens` does."""
    rows = example_ids(tokenizer, source.documents or source.conversations, closed=len(source.documents) > 1)
    return torch.tensor([token for row in rows for token in row], dtype=torch.long, device="cpu")


def shown_row(tokenizer: Any, input_ids: Tensor, labels: Tensor) -> str:
    """Return a row as it is learned: special tokens as they are, line ends as \\n, learned spans in [+ +].

    Args:
        tokenizer: the model's.
        input_ids: (T,).
        labels: (T,), −100 where nothing is learned.
    """
    learned = (labels != IGNORED).tolist()
    parts, start = [], 0
    for i in range(1, len(learned) + 1):
        if i == len(learned) or learned[i] != learned[start]:
            text = tokenizer.decode(input_ids[start:i].tolist(), skip_special_tokens=False)
            text = text.replace("\\", "\\\\").replace("\n", "\\n")
            parts.append(f"[+{text}+]" if learned[start] else text)
            start = i
    return "".join(parts)
