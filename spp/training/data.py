"""Token data sets for tuning: text packed into blocks, or conversations in rows of their own length.

Text is one long sequence (documents joined by the end-of-text token) cut into blocks of `block_length`, each of which
begins with the BOS token where the tokenizer begins a text with one; what is left at the end is dropped. Conversations
stay one to a row, cut at `block_length`, and are padded to the longest of a batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from spp.data.encoding import EncodedRow, Encoder, example_ids, shown_row
from spp.data.parsing import Source, read_source
from spp.data.templates import PLAIN_HEADINGS
from spp.data.tokens import IGNORED, cut_windows, find_bos
from spp.errors import DataError, SPPWarning, arg
from spp.masks.patterns import as_array
from spp.models.tokens import check_ids, check_length

logger = logging.getLogger(__name__)

Item = dict[str, Tensor]  # "input_ids", "labels": (T,)
Batch = dict[str, Tensor]  # "input_ids", "labels", "attention_mask": (B, T)


class TokenBlocks(Dataset[Item]):
    """Blocks of equal length, every token of which is learned.

    Args:
        blocks: token ids (k, L).
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Item:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class TokenRows(Dataset[Item]):
    """Rows of different lengths with labels.

    Args:
        rows: (input_ids, labels), each (T,).
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        input_ids, labels = self.rows[index]
        return {"input_ids": input_ids, "labels": labels}


@dataclass(frozen=True)
class DataSummary:
    """Counts of the training data.

    Args:
        kind: "text" or "instruction".
        rows: blocks or rows to train on.
        tokens: tokens in them.
        labelled: tokens that are learned.
        truncated: rows that were cut at the block length.
        unlearnable: rows left out because nothing to learn was left of them: an answer beyond the block length.
        empty: rows left out because they were empty, or marked as not to be learned.
        held_out: rows, or tokens of text, held out for the perplexity.
        sha256: of the token ids and labels to train on.
        bos: whether blocks of text, and windows of the text held out, begin with a BOS token.
    """

    kind: str
    rows: int
    tokens: int
    labelled: int
    truncated: int
    unlearnable: int
    empty: int
    held_out: int
    sha256: str
    bos: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingData:
    """Data ready to train on.

    Args:
        train: the rows.
        held_out_tokens: (T,) tokens of text held out; None where there are none.
        held_out_rows: instruction rows held out; None where there are none.
        summary: counts.
        collate: makes a batch of items.
        bos_id: the token that blocks of text, and windows of the text held out, begin with; None for none. It is not in
            `held_out_tokens`.
    """

    train: TokenBlocks | TokenRows
    held_out_tokens: Tensor | None
    held_out_rows: TokenRows | None
    summary: DataSummary
    collate: Collator
    bos_id: int | None = None


class Collator:
    """Pads items on the right to the longest: input_ids with the pad token, labels with −100, the mask with 0.

    Args:
        pad_token_id: any valid id: padding is masked and not learned.

    Example:
        >>> Collator(0)([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}])["input_ids"]
        tensor([[5, 6]])
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Return one batch."""
        ids, labels = [item["input_ids"] for item in items], [item["labels"] for item in items]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def check_data(
    model: nn.Module, rows: TokenBlocks | TokenRows, collate: Collator, where: str, option: str, tokenizer: Any = None
) -> None:
    """Raise unless a model has an embedding for every token of some rows and their padding, and positions for them.

    Args:
        where: what the rows are, for the message.
        option: the argument that says how long they may be.

    Raises:
        DataError: as `check_ids` and `check_length` (spp.models.tokens).
    """
    ids = rows.blocks if isinstance(rows, TokenBlocks) else [row for row, _ in rows.rows]
    check_ids(model, ids, where, tokenizer)
    lengths = {len(row) for row in ids}
    if len(lengths) > 1:
        check_ids(model, torch.tensor([collate.pad_token_id], device="cpu"), f"the padding of {where}", tokenizer)
    check_length(model, max(lengths, default=0), "training rows", option)


def batches(rows: TokenBlocks | TokenRows, collate: Collator, batch_size: int) -> Iterator[Batch]:
    """Yield batches in order."""
    for start in range(0, len(rows), batch_size):
        yield collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])


def load_data(
    paths: Sequence[str],
    tokenizer: Any,
    *,
    block_length: int,
    data_format: str = "auto",
    split: str = "train",
    text_field: str = "text",
    completions_only: bool = True,
    held_out: float = 0.0,
    least_held_out: int = 0,
    seed: int = 0,
    bos: str = "auto",
) -> TrainingData:
    """Read and tokenise training data.

    Args:
        paths: files or hub ids.
        tokenizer: the model's.
        block_length: tokens of a block, and the longest row.
        data_format: "auto", "text", "alpaca" or "chat".
        split: split of a hub data set.
        text_field: field of plain text in a row.
        completions_only: learn only the answers of instruction data.
        held_out: part held out, in [0, 1): the last tokens of text, or rows drawn with `seed`.
        least_held_out: for text, hold out at least this many tokens if anything is held out: one window.
        seed: draws the rows that are held out.
        bos: whether blocks of text begin with a BOS token, as one of their tokens: "auto" does as the tokenizer does
            with a fresh text, "always", "never". Instruction rows have what the chat template writes.

    Returns:
        The rows to train on, what is held out, and counts.

    Raises:
        ConfigError: there is no BOS token for "always".
        DataError: the data is malformed, or too short for one block and what is held out.

    Example:
        >>> data = load_data(["train.txt"], tokenizer, block_length=512, held_out=0.05)  # doctest: +SKIP
    """
    source = read_source(paths, data_format=data_format, split=split, text_field=text_field)
    names = ", ".join(paths)
    first = find_bos(tokenizer, bos)
    if source.is_text:
        data = _text_data(source, tokenizer, names, block_length, held_out, least_held_out, first)
    else:
        data = _row_data(source, tokenizer, names, block_length, completions_only, held_out, seed, first)
    s = data.summary
    logger.info("%s: %d rows of %s, %d tokens, %d to learn", names, s.rows, s.kind, s.tokens, s.labelled)
    if not source.is_text and not getattr(tokenizer, "chat_template", None):
        logger.info("the tokenizer has no chat template: turns begin with %s", ", ".join(PLAIN_HEADINGS.values()))
    if s.truncated or s.unlearnable or s.empty:
        logger.warning(
            "%s: %d rows were cut at %d tokens; left out: %d rows whose answers begin beyond it, %d that are "
            "empty or marked as not to be learned",
            names,
            s.truncated,
            block_length,
            s.unlearnable,
            s.empty,
        )
    return data


def _text_data(
    source: Source,
    tokenizer: Any,
    names: str,
    block_length: int,
    held_out: float,
    least_held_out: int,
    bos: int | None,
) -> TrainingData:
    if len(source.documents) > 1 and tokenizer.eos_token_id is None:
        warnings.warn(
            f"{names}: no end token is ever learned: the tokenizer has none, so {len(source.documents)} documents run "
            "into each other",
            SPPWarning,
            stacklevel=3,
        )
    documents = example_ids(tokenizer, source.documents, closed=len(source.documents) > 1)
    tokens = torch.cat([torch.tensor(ids, dtype=torch.long, device="cpu") for ids in documents])  # (T,)
    held = max(math.ceil(held_out * len(tokens)), least_held_out) if held_out else 0
    train, rest = tokens.split([max(0, len(tokens) - held), min(held, len(tokens))])
    blocks = cut_windows(train, block_length, bos)  # (k, L)
    if not len(blocks):
        first = source.documents[0].text.strip()
        begins = first if len(first) <= 40 else first[:39] + "…"
        raise DataError(
            f"{names}: the text {begins!r} has {len(tokens)} tokens; one block of {block_length} "
            f"({arg('block_length')}) and {held} held out for the perplexity need more: use more text, shorter blocks, "
            f"or a text of its own ({arg('eval_text')})"
        )
    summary = DataSummary(
        kind="text",
        rows=len(blocks),
        tokens=blocks.numel(),
        labelled=len(blocks) * (block_length - 1),
        truncated=0,
        unlearnable=0,
        empty=source.empty,
        held_out=held,
        sha256=tokens_sha256(blocks.flatten()),
        bos=bos is not None,
    )
    return TrainingData(TokenBlocks(blocks), rest if held else None, None, summary, Collator(_pad_id(tokenizer)), bos)


def own_data(
    windows: Tensor, tokenizer: Any, *, held_out: float, least_held_out: int, bos: int | None, seed: int
) -> TrainingData:
    """Return blocks of text that a model wrote, and what is held out of them: the last ones.

    Args:
        windows: (k, L), each beginning with BOS where `bos` is not None.
        held_out, least_held_out: as of `load_data`.
        bos: the token that blocks begin with.
        seed: with which they were written.

    Raises:
        DataError: there are not blocks enough for one to train on and those held out.
    """
    count, length = windows.shape
    held = math.ceil(max(held_out * count, least_held_out / (length - (bos is not None)))) if held_out else 0
    if held >= count:
        raise DataError(
            f"{count} blocks of {length} tokens are too few to hold out {held} for the perplexity and train on the "
            f"rest: let the model write more, or pass a text of its own ({arg('eval_text')})"
        )
    train, rest = windows[: count - held], windows[count - held :, bos is not None :]
    summary = DataSummary(
        kind="text",
        rows=len(train),
        tokens=train.numel(),
        labelled=len(train) * (length - 1),
        truncated=0,
        unlearnable=0,
        empty=0,
        held_out=rest.numel(),
        sha256=tokens_sha256(train.flatten()),
        bos=bos is not None,
    )
    logger.info("text of the model's own (seed %d): %d rows, %d tokens", seed, summary.rows, summary.tokens)
    blocks, apart = TokenBlocks(train), rest.flatten() if held else None
    return TrainingData(blocks, apart, None, summary, Collator(_pad_id(tokenizer)), bos)


def _row_data(
    source: Source,
    tokenizer: Any,
    names: str,
    block_length: int,
    completions_only: bool,
    held_out: float,
    seed: int,
    bos: int | None,
) -> TrainingData:
    encoder = Encoder(tokenizer, block_length=block_length, completions_only=completions_only)
    encoded = [row for example in source.conversations for row in encoder.encode(example)]
    usable = [row for row in encoded if row.has_labels]
    if not usable:
        raise DataError(
            f"{names}: in all {len(encoded)} rows the answer begins beyond {arg('block_length')} {block_length}: "
            f"raise it"
        )
    _check_ends(usable, names, block_length)
    held = math.ceil(held_out * len(usable))
    if held >= len(usable):
        raise DataError(
            f"{names}: {len(usable)} rows are too few to hold out {held} for the perplexity and train on the "
            f"rest: use more rows, a text of its own ({arg('eval_text')}), or {arg('eval_fraction')} 0"
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    aside = set(order[:held])
    train = [row for i, row in enumerate(usable) if i not in aside]
    summary = DataSummary(
        kind="instruction",
        rows=len(train),
        tokens=sum(len(row.input_ids) for row in train),
        labelled=sum(int((row.labels[1:] != IGNORED).sum()) for row in train),
        truncated=sum(row.is_cut for row in usable),
        unlearnable=len(encoded) - len(usable),
        empty=source.empty,
        held_out=held,
        sha256=tokens_sha256(*(t for row in train for t in (row.input_ids, row.labels))),
        bos=bos is not None,
    )
    rest = TokenRows([(usable[i].input_ids, usable[i].labels) for i in sorted(aside)]) if held else None
    rows = TokenRows([(row.input_ids, row.labels) for row in train])
    return TrainingData(rows, None, rest, summary, Collator(_pad_id(tokenizer)), bos)


def _check_ends(rows: list[EncodedRow], names: str, block_length: int) -> None:
    """Name the rows that are cut, and warn where the model learns to end no answer."""
    cut = list(dict.fromkeys(row.where for row in rows if row.is_cut))
    if cut:
        more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
        logger.warning("longer than %d tokens and cut: %s%s", block_length, ", ".join(cut[:3]), more)
    if not any(row.ends for row in rows):
        why = "every answer is cut before its end" if cut else "neither the tokenizer nor its chat template has one"
        warnings.warn(
            f"{names}: no end token is ever learned ({why}), so the tuned model will not know where to stop: use a "
            f"tokenizer with an end-of-text token, or a larger {arg('block_length')} for rows that are cut",
            SPPWarning,
            stacklevel=4,
        )


def shown_rows(data: TrainingData, tokenizer: Any, count: int) -> list[str]:
    """Return the first rows to train on as they will be learned.

    Args:
        data: what `load_data` returns.
        tokenizer: the same.
        count: rows at most.

    Returns:
        Of each row its text on one line: special tokens as they are, what is learned in [+ +].

    Example:
        >>> print("\\n".join(shown_rows(data, tokenizer, 3)))  # doctest: +SKIP
        <|user|>Add 1 and 1.</s><|assistant|>[+2</s>+]
    """
    rows = (data.train[i] for i in range(min(count, len(data.train))))
    return [shown_row(tokenizer, row["input_ids"], row["labels"]) for row in rows]


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0  # padding is masked and not learned: any row of the embedding will do


def tokens_sha256(*tensors: Tensor) -> str:
    """Return the hash of token ids and labels, each (T,)."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(len(tensor).to_bytes(8, "little"))
        digest.update(as_array(tensor.contiguous()).data)
    return digest.hexdigest()
