"""From text to token ids: every text that is learned, calibrated on or measured becomes tokens here.

A model that was trained with a BOS token before each text computes little sense without it, so every window that texts
are cut into begins with it. Documents, and conversations that are joined to a text, come without it; `cut_windows` puts
it before each window, but for one that begins with BOS already. Rows of conversations have what the template writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.configs.checks import BOS, check_choice
from spp.errors import ConfigError, DataError, arg

IGNORED = -100  # label of a token that is not predicted; PyTorch's and transformers' convention
_PROBE = "a"  # a text that begins with no special token


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


def find_bos(tokenizer: Any, bos: str = "auto") -> int | None:
    """Return the BOS token that each window of a text begins with; None where windows have none.

    Args:
        tokenizer: the model's.
        bos: "auto" does as the tokenizer does with a fresh text, "always", or "never".

    Raises:
        ConfigError: `bos` is none of these, or "always", and the tokenizer has no BOS token.
    """
    check_choice("bos", bos, BOS)
    if bos == "never":
        return None
    first: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos == "always":
        if first is None:
            raise ConfigError(
                f"{arg('bos', 'always')}: {type(tokenizer).__name__} has no BOS token",
                remedy=f"set its bos_token, or pass {arg('bos', 'auto')}",
            )
        return first
    return added_bos(tokenizer)


def added_bos(tokenizer: Any) -> int | None:
    """Return the BOS token that a tokenizer puts before a text by itself; None where it puts none."""
    first: int | None = getattr(tokenizer, "bos_token_id", None)
    return first if first is not None and tokens_of(tokenizer, _PROBE).ids[:1] == [first] else None


def without_bos(ids: list[int], added: int | None) -> list[int]:
    """Return token ids without the BOS token at their start that `added_bos` says the tokenizer puts there."""
    return ids[1:] if added is not None and ids[:1] == [added] else ids


def cut_windows(ids: Tensor, window: int, bos: int | None) -> Tensor:
    """Cut token ids into windows; a rest that fills none is dropped.

    Args:
        ids: int64 (T,).
        window: W, tokens of a window.
        bos: token that each window begins with, as one of its W; where the text has it at that place already, it is not
            doubled. None adds none.

    Returns:
        Int64 (k, W).

    Raises:
        ConfigError: a window has no room for a token beside BOS.
    """
    if bos is None:
        return ids[: len(ids) // window * window].view(-1, window)
    room = window - 1
    if room < 1:
        raise ConfigError(
            f"a window of {window} token holds nothing but BOS", remedy=f"make it longer, or pass {arg('bos', 'never')}"
        )
    starts, at = [], 0
    own = set((ids == bos).nonzero().flatten().tolist())
    while at + (size := window if at in own else room) <= len(ids):
        starts.append((at, size))
        at += size
    first = ids.new_tensor([bos])
    rows = [ids[at : at + size] if size == window else torch.cat([first, ids[at : at + size]]) for at, size in starts]
    return torch.stack(rows) if rows else ids.new_empty(0, window)


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Return the hash of all that decides how a tokenizer makes tokens of a text; None for one of an unknown kind.

    The chat template, and how rows are padded or cut, are no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        told = backend.to_str()  # JSON: version, truncation, padding, then what makes the tokens
        told = told[max(0, told.find('"added_tokens"')) :]
    elif callable(getattr(tokenizer, "get_vocab", None)):
        facts = [type(tokenizer).__name__, tokenizer.get_vocab(), getattr(tokenizer, "special_tokens_map", None)]
        told = json.dumps(facts, sort_keys=True, default=str)
    else:
        return None
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def document_ids(
    tokenizer: Any, text: str, *, where: str = "the text", closed: bool = False, added: int | None = None
) -> list[int]:
    """Return the token ids of a document, without BOS.

    Args:
        tokenizer, text, where: as for `tokens_of`.
        closed: end with the end-of-text token, once, where the tokenizer has one: another document follows.
        added: what `added_bos` says of the tokenizer.
    """
    ids = without_bos(tokens_of(tokenizer, text, where=where).ids, added)
    end = getattr(tokenizer, "eos_token_id", None)
    return [*ids, end] if closed and end is not None and ids[-1:] != [end] else ids


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches each special token of a tokenizer, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
    names.add(getattr(tokenizer, "eos_token", None) or "")
    listed = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, listed)) or r"(?!)")
