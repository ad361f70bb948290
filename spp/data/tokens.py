"""From text to token ids: every text that is learned, calibrated on or measured becomes tokens here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from spp.errors import DataError

IGNORED = -100  # label of a token that is not predicted; PyTorch's and transformers' convention


@dataclass(frozen=True)
class Tokens:
    """A text in tokens.

    Args:
        ids: T of them.
        offsets: the (start, end) characters of each; empty unless asked for.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


def tokens_of(
    tokenizer: Any, text: str, *, where: str = "the text", special: bool = True, offsets: bool = False
) -> Tokens:
    """Return the tokens of a text of any length, without the tokenizer's warning about its model's length.

    Args:
        tokenizer: the model's.
        text: without lone surrogates.
        where: its file and row, for messages of errors.
        special: let the tokenizer add the special tokens that it always adds; what the text itself begins and ends
            with is not doubled.
        offsets: ask for the characters of each token, which a fast tokenizer alone can tell.

    Raises:
        DataError: the text is no str, or holds a lone surrogate, which is half of a character.
    """
    if not isinstance(text, str):
        raise DataError(f"{where} is a {type(text).__name__}; it must be a str (read the file first)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is {text[error.start]!a}, half of a character (a lone surrogate)",
            remedy="mend what wrote the data, or put U+FFFD in its place",
        ) from None
    asked = {"return_offsets_mapping": True} if offsets else {}
    extra = {} if special else {"add_special_tokens": False}
    found = tokenizer(text, return_attention_mask=False, verbose=False, **extra, **asked)
    ids, spans = list(found["input_ids"]), list(found["offset_mapping"]) if offsets else []
    first, last = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    begin = int(special and first is not None and ids[:2] == [first, first])
    end = len(ids) - int(special and last is not None and ids[-2:] == [last, last] and len(ids) - begin > 1)
    return Tokens(ids[begin:end], spans[begin:end])


def document_ids(tokenizer: Any, text: str, *, where: str = "the text", closed: bool = False) -> list[int]:
    """Return the token ids of a document.

    Args:
        tokenizer, text, where: as for `tokens_of`.
        closed: end with the end-of-text token, once, where the tokenizer has one: another document follows.
    """
    ids = tokens_of(tokenizer, text, where=where).ids
    end = getattr(tokenizer, "eos_token_id", None)
    return [*ids, end] if closed and end is not None and ids[-1:] != [end] else ids


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches each special token of a tokenizer, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
    names.add(getattr(tokenizer, "eos_token", None) or "")
    listed = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, listed)) or r"(?!)")
