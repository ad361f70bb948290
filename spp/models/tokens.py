"""The one check of token ids and lengths against a model, before anything runs.

An id that the input embedding has no row for, or a position beyond those that a model has learned, is an IndexError
deep inside the model on a CPU and a dead process on a GPU. Padding is no exception: the attention mask and labels of
−100 hide it from the loss, not from the embedding.

Positions that are computed (rotary, ALiBi) have no end: what a config says of them is the length in training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import DataError, SPPWarning, arg
from spp.models.targets import input_embedding, other_sides, text_side

_POSITIONS = re.compile(r"(^|\.)(wpe|positions_embed|embed_positions|position_embeddings?|pos_embed(dings?)?)$")
_TABLES = ("embed_positions", "pos_encoding")  # buffers with a row for each position: GPT-J, CodeGen; CTRL


def embedding_rows(model: nn.Module) -> int | None:
    """Return how many token ids a model has an embedding for; None where it does not say.

    A weight that is sharded or packed has another shape than its module says, a module of another library only the
    weight, and the config may lag behind both.
    """
    embedding = input_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        rows = getattr(_text_config(model), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def position_limit(model: nn.Module) -> int | None:
    """Return how many positions a model has that cannot take more: learned ones, or a table; None for any number."""
    text, others = text_side(model), other_sides(model)
    limits = []
    for path, module in model.named_modules():
        if not _within(path, text) or (others and _within(path, others)):
            continue
        if isinstance(module, nn.Embedding) and _POSITIONS.search(path):
            limits.append(module.num_embeddings - _first_position(module))
        limits += [len(b) for n, b in module.named_buffers(recurse=False) if n in _TABLES and b.ndim == 2]
    config = _text_config(model)
    if getattr(config, "model_type", None) == "mpt":  # ALiBi, of which it makes a table of this size
        limits.append(config.max_seq_len)
    return min(limits, default=None)


def trained_length(model: nn.Module) -> int | None:
    """Return for how many positions a model was made, by its config; None where it does not say."""
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_ids(model: nn.Module, ids: Tensor | Iterable[Tensor], where: str, tokenizer: Any = None) -> None:
    """Raise unless a model's input embedding has a row for every token id.

    Args:
        model: a language model; its weights need not be in memory.
        ids: token ids (T,), rows of them (k, T), or a row (T,) each.
        where: what holds them, such as "the training data", for the message.
        tokenizer: what made them, for the message.

    Raises:
        DataError: an id is negative, or beyond the last row; the message names it, its token and its row.

    Example:
        >>> check_ids(nn.Embedding(4, 2), torch.tensor([0, 3]), "the text")
    """
    rows = embedding_rows(model)
    if rows is not None:
        refuse_ids(rows, ids, where, tokenizer)


def refuse_ids(rows: int, ids: Tensor | Iterable[Tensor], where: str, tokenizer: Any = None) -> None:
    """Raise as `check_ids`, for an embedding of so many rows."""
    if isinstance(ids, Tensor) and _fit(ids, rows):
        return
    for place, row in _rows(ids):
        if _fit(row, rows):
            continue
        bad = row[(row < 0) | (row >= rows)][0].item()
        told = f"{where}{place}: token id {bad}{_token(tokenizer, int(bad))}"
        if bad < 0:
            raise DataError(f"{told} is negative; ids begin with 0, and -100 is a label, which is no token to read")
        raise DataError(
            f"{told} is beyond the model's {rows} embeddings, 0 to {rows - 1}",
            remedy="use the model's own tokenizer; where tokens were added to it (a pad token counts too), the model "
            "needs rows for them: model.resize_token_embeddings(len(tokenizer)), then save both",
        )


def check_length(model: nn.Module, length: int, what: str, option: str | None = None) -> None:
    """Raise where rows are longer than the positions that a model has learned.

    Args:
        model: a language model.
        length: tokens of the longest row.
        what: what has them, such as "calibration windows".
        option: the argument that decides about it; None where they are taken as they are.

    Raises:
        DataError: they are; the message has the limit, and names the argument.
    """
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise DataError(
            f"{what} of {length} tokens are too long: the model has {limit} positions and cannot compute more",
            option=option,
            remedy="cut them" if option is None else f"pass {arg(option, limit)} or less",
        )


def _fit(ids: Tensor, rows: int) -> bool:
    """Whether an embedding has all ids; one look at the values, which a GPU is waited for once."""
    if not ids.numel():
        return True
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    return low >= 0 and high < rows


def warn_length(model: nn.Module, length: int, what: str, *, stacklevel: int = 3) -> None:
    """Warn of rows that are longer than a model was made for, though it computes their positions.

    Args:
        what: what has so many tokens, or the argument that says how many.
    """
    trained = trained_length(model)
    if trained is not None and length > trained:
        told = f"{what} is {length}, but the model was made for {trained} positions: it says little of longer texts"
        warnings.warn(told, SPPWarning, stacklevel=stacklevel)


def _rows(ids: Tensor | Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield where each row is, and the row."""
    if isinstance(ids, Tensor) and ids.ndim < 2:
        yield "", ids.reshape(-1)
    else:
        for number, row in enumerate(ids, 1):
            yield f", row {number}", row.reshape(-1)


def _token(tokenizer: Any, index: int) -> str:
    """Return the token of an id for a message; "" where there is none."""
    try:
        token = tokenizer.convert_ids_to_tokens(index)
    except Exception:  # of None, of a negative id, of any tokenizer's own
        token = None
    return f" ({token!r})" if isinstance(token, str) else ""


def _first_position(embedding: nn.Embedding) -> int:
    """Return the row of the first token: OPT, BART, BioGPT leave two free, RoBERTa's family those up to padding."""
    offset = getattr(embedding, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if embedding.padding_idx is None else embedding.padding_idx + 1


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def _within(path: str, sides: Iterable[str]) -> bool:
    return any(not side or path == side or path.startswith(f"{side}.") for side in sides)
