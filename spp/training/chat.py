"""From a conversation to token ids and labels: the tokenizer's chat template, or a plain prompt where it has none.

Only the assistant's words are labelled (the end-of-turn token included), unless everything is asked for. They are
found by rendering the conversation turn by turn: what turn i adds to the text of the prompt before it is its answer;
the tokenizer's offsets then say which tokens those characters became, so that the whole row is tokenised once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.errors import DataError, arg
from spp.evaluation import IGNORED
from spp.training.rows import Message

# The prompt for a tokenizer without a chat template: each turn is a heading and, below it, the words; an empty line
# between turns; the end-of-text token after each answer.
PLAIN_HEADINGS = {"system": "### Task", "user": "### Request", "assistant": "### Answer"}


@dataclass(frozen=True)
class EncodedRow:
    """One conversation in tokens.

    Args:
        input_ids: (T,).
        labels: (T,), −100 where nothing is to be learned.
        length: tokens before the cut to the block length.
    """

    input_ids: Tensor
    labels: Tensor
    length: int

    @property
    def is_cut(self) -> bool:
        """Whether the row was longer than the block length."""
        return self.length > len(self.input_ids)

    @property
    def has_labels(self) -> bool:
        """Whether a token after the first is to be learned."""
        return bool((self.labels[1:] != IGNORED).any())


def encode(
    tokenizer: Any, messages: list[Message], *, where: str, block_length: int, completions_only: bool = True
) -> list[EncodedRow]:
    """Tokenise one conversation: into one row, or, with a template that rewrites earlier turns, into one an answer.

    Some templates drop an earlier answer's reasoning once another turn follows. The model never sees such a
    conversation in one piece, so each answer then becomes a row of its own, after the turns as the
    template writes them.

    Args:
        tokenizer: with a chat template, or without.
        messages: {"role", "content"} each.
        where: file and row, for messages of errors.
        block_length: cut to this many tokens.
        completions_only: label the assistant's words only.

    Raises:
        DataError: the chat template refuses the conversation, or renders it so that answers cannot be found.
    """
    if not completions_only:
        return [_row(tokenizer, _text(tokenizer, messages, where), None, block_length)]
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters became which tokens, so the answers cannot be "
            f"told from the prompts: use a fast tokenizer, or {arg('completions_only', False)}"
        )
    text = _text(tokenizer, messages, where)
    ends = [i for i, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    answers = [_answer(tokenizer, messages[:end], where) for end in ends]
    if all(text.startswith(until) for until, _ in answers):
        return [_row(tokenizer, text, [span for _, span in answers], block_length)]
    return [_row(tokenizer, until, [span], block_length) for until, span in answers]


def _answer(tokenizer: Any, messages: list[Message], where: str) -> tuple[str, tuple[int, int]]:
    """Return the text of a conversation that ends with an answer, and the answer's (start, end) characters."""
    text = _text(tokenizer, messages, where)
    prompt = _text(tokenizer, messages[:-1], where, answer_next=True) if messages[:-1] else ""
    if not text.startswith(prompt):
        raise DataError(
            f"{where}: with this tokenizer's chat template an answer does not continue its prompt, so the two cannot "
            f"be told apart: use {arg('completions_only', False)}"
        )
    return text, (len(prompt), len(text))


def _row(tokenizer: Any, text: str, spans: list[tuple[int, int]] | None, block_length: int) -> EncodedRow:
    encoded = tokenizer(
        text,
        add_special_tokens=not _templated(tokenizer),  # a template writes them itself
        return_attention_mask=False,
        return_offsets_mapping=spans is not None,
        verbose=False,
    )
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)  # (T,)
    labels = ids.clone()
    if spans is not None:
        inside = [_overlaps(start, end, spans) for start, end in encoded["offset_mapping"]]
        labels[~torch.tensor(inside, dtype=torch.bool)] = IGNORED
    return EncodedRow(ids[:block_length], labels[:block_length], len(ids))


def _overlaps(start: int, end: int, spans: list[tuple[int, int]]) -> bool:
    # A token that holds the last character of the prompt and the first of the answer is part of the answer.
    return any(start < last and end > first for first, last in spans)


def _templated(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _text(tokenizer: Any, messages: list[Message], where: str, *, answer_next: bool = False) -> str:
    if not _templated(tokenizer):
        return _plain_text(messages, tokenizer.eos_token or "", where, answer_next)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next))
    except Exception as error:  # jinja2 raises its own, and whatever the template's expressions raise
        raise DataError(f"{where}: the tokenizer's chat template refuses this conversation: {error}") from error


def _plain_text(messages: list[Message], end: str, where: str, answer_next: bool) -> str:
    turns = []
    for message in messages:
        role, words = message["role"], message["content"]
        if role not in PLAIN_HEADINGS:
            raise DataError(
                f"{where}: the role {role!r} needs a tokenizer with a chat template; without one there are "
                f"{', '.join(PLAIN_HEADINGS)}"
            )
        turns.append(f"{PLAIN_HEADINGS[role]}\n{words}{end if role == 'assistant' else ''}")
    if answer_next:
        turns.append(PLAIN_HEADINGS["assistant"] + "\n")
    return "\n\n".join(turns)
