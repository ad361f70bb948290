"""The rows that every contender trains on, and the two held-out parts: validation to choose by, test to report."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.comparing import CompareConfig
from spp.data.encoding import read_tokens
from spp.data.tokens import cut_windows, tokenizer_sha256
from spp.errors import DataError, arg
from spp.evaluation import PerplexityResult, rows_perplexity, token_perplexity
from spp.masks.patterns import as_array
from spp.models.tokens import check_ids, check_length
from spp.training.data import Collator, TokenBlocks, TokenRows, TrainingData, batches, check_data, load_data

_TOKENS = 1024  # of one forward pass of a measurement: bounds its logits
_SPLIT_SEED = 0  # of the instruction rows held out: the same for every seed of a study


@dataclass(frozen=True)
class HeldOut:
    """One held-out part: windows of text, or instruction rows, of which the answers count.

    Args:
        tokens: (k · window,) or None.
        rows: or None.
        window: tokens of a window of text.
        collate: makes a batch of rows.
        bos_id: that each window of text begins with; None for none.
    """

    tokens: Tensor | None
    rows: TokenRows | None
    window: int
    collate: Collator
    bos_id: int | None = None

    def measure(self, model: nn.Module) -> PerplexityResult:
        """Return the loss on it."""
        if self.tokens is not None:
            size = max(1, _TOKENS // self.window)
            return token_perplexity(model, self.tokens, window=self.window, batch_size=size, bos_id=self.bos_id)
        assert self.rows is not None
        return rows_perplexity(model, batches(self.rows, self.collate, 4))

    def sha256(self) -> str:
        """Return the hash of its token ids and labels."""
        digest = hashlib.sha256()
        tensors = [self.tokens] if self.tokens is not None else [t for row in self.rows.rows for t in row]  # type: ignore[union-attr]
        for tensor in tensors:
            digest.update(as_array(tensor.contiguous()).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class CompareData:
    """The data that is trained and measured on; the three parts share no row and no window.

    Args:
        train, validation, test: the parts.
        collate: makes a batch of training rows.
        kind: of the held-out parts: "text" or "instruction".
        sha256: of all that was read to train on, before anything was held back.
        tokenizer_sha256: of the tokenizer; None where its kind is not known.
        bos: whether rows and windows of text begin with a BOS token.
    """

    train: TokenBlocks | TokenRows
    validation: HeldOut
    test: HeldOut
    collate: Collator
    kind: str
    sha256: str
    tokenizer_sha256: str | None = None
    bos: bool = False

    def check(self, model: nn.Module, config: CompareConfig, tokenizer: Any) -> None:
        """Raise a DataError where the model cannot read all of the data, before anything is trained."""
        check_data(model, self.train, self.collate, "the training data", "block_length", tokenizer)
        for name, part in (("validation", self.validation), ("test", self.test)):
            if part.rows is not None:
                check_data(model, part.rows, self.collate, f"the {name} rows", "block_length", tokenizer)
            elif part.tokens is not None:
                check_ids(model, part.tokens, f"the {name} text", tokenizer)
                check_length(model, config.window, "windows", "window")

    def hashes(self) -> dict[str, str]:
        """Return the hashes of all data and of each held-out part."""
        held_out = {"validation_sha256": self.validation.sha256(), "test_sha256": self.test.sha256()}
        own = {"tokenizer_sha256": self.tokenizer_sha256} if self.tokenizer_sha256 else {}
        return {"data_sha256": self.sha256, **held_out, **own}


def load(config: CompareConfig, tokenizer: Any) -> CompareData:
    """Read, tokenise and split.

    Test windows are the first of `eval_text`, validation windows those behind them; without it both are the last of
    the training text. Of instruction rows both are drawn.

    Raises:
        DataError: the data is missing, malformed or too short.
    """
    recipe = config.recipe(1.0, 0)
    if recipe.own_tokens is not None:
        raise DataError(
            f"{arg('data')} is {recipe.data_files[0]}: a comparison reads its data; what a model writes is to "
            f"calibrate and to tune on"
        )
    found = load_data(
        recipe.data_files,
        tokenizer,
        block_length=config.block_length,
        data_format=config.data_format,
        completions_only=config.completions_only,
        held_out=0.0,
        bos=config.bos,
    )
    return replace(_parts(config, found, tokenizer), tokenizer_sha256=tokenizer_sha256(tokenizer))


def _parts(config: CompareConfig, found: TrainingData, tokenizer: Any) -> CompareData:
    train = found.train
    if config.eval_text is not None:
        tokens = read_tokens(tokenizer, str(config.eval_text))
        return _split(config, found, train, tokens, str(config.eval_text))
    if isinstance(train, TokenRows):
        return _split_rows(config, found, train)
    aside = 0 if found.bos_id is None else 1  # BOS is no token of the text
    needed = _windows(config) * (config.window - aside)
    blocks = -(-needed // (config.block_length - aside))
    if blocks >= len(train):
        names = ", ".join(config.recipe(1.0, 0).data_files)
        raise DataError(
            f"{names}: too short to hold back {needed} tokens for validation and test and train on the rest: use more "
            f"text, fewer windows, or a text of its own ({arg('eval_text')})"
        )
    rest = train.blocks[len(train) - blocks :, aside:].flatten()
    train = TokenBlocks(train.blocks[: len(train) - blocks])
    return _split(config, found, train, rest, "what was held back")


def _windows(config: CompareConfig) -> int:
    return config.test_windows + config.validation_windows


def _split(
    config: CompareConfig, found: TrainingData, train: TokenBlocks | TokenRows, tokens: Tensor, where: str
) -> CompareData:
    windows = cut_windows(tokens, config.window, found.bos_id)[: _windows(config)]  # (k, window)
    if len(windows) < _windows(config):
        raise DataError(
            f"{where} has {len(tokens)} tokens, fewer than {config.test_windows} test and {config.validation_windows} "
            f"validation windows of {config.window}: give a longer text, or fewer or shorter windows"
        )
    parts = windows.split([config.test_windows, config.validation_windows])
    test, validation = (HeldOut(one.flatten(), None, config.window, found.collate, found.bos_id) for one in parts)
    bos = found.bos_id is not None
    return CompareData(train, validation, test, found.collate, "text", found.summary.sha256, bos=bos)


def _split_rows(config: CompareConfig, found: TrainingData, rows: TokenRows) -> CompareData:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SPLIT_SEED), device="cpu").tolist()
    first, second = config.test_windows, config.test_windows + config.validation_windows
    if second >= len(rows):
        raise DataError(
            f"{len(rows)} instruction rows are too few to hold back {config.test_windows} for test and "
            f"{config.validation_windows} for validation and train on the rest: use more rows, or hold back fewer"
        )
    parts = [TokenRows([rows.rows[i] for i in sorted(some)]) for some in (order[:first], order[first:second])]
    train = TokenRows([rows.rows[i] for i in sorted(order[second:])])
    test, validation = (HeldOut(None, part, config.window, found.collate) for part in parts)
    return CompareData(train, validation, test, found.collate, "instruction", found.summary.sha256)
