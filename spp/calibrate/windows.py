"""Calibration data as token windows (k, L): drawn from texts with a seed, or given."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.errors import DataError, SPPWarning

logger = logging.getLogger(__name__)

Calibration = Tensor | Sequence[str] | str | os.PathLike[str]
_PIECE = 32  # characters per token of a window that a long text is cut into before it is drawn from
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def calibration_windows(
    calibration: Calibration,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Return at most `nsamples` windows of token ids, int64 (k, L), the same for the same seed.

    Args:
        calibration: token ids (k, L), whose windows are taken as they are; a list of texts, each a document; or the
            path of a text file or of a JSONL file with one {"text": …} a line.
        tokenizer: of the model; needed for text only.
        nsamples: windows at most. Of more rows of ids, as many are drawn; a text that gives less is warned of.
        seqlen: L of windows cut from text.
        seed: of the draw.

    Raises:
        DataError: no such file, empty or malformed data, text shorter than one window, no tokenizer.
    """
    check_calibration(calibration)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(calibration, Tensor):
        return _drawn_rows(calibration, nsamples, generator)
    if isinstance(calibration, (str, os.PathLike)):
        where, documents = str(calibration), _read(Path(calibration))
    else:
        where, documents = "the list of texts", list(calibration)
    if not any(text.strip() for text in documents):
        raise DataError(f"calibration text is empty: {where}")
    if tokenizer is None:
        raise DataError(
            "calibration is text, and text needs the model's tokenizer: pass tokenizer=, or token ids (k, L)"
        )
    return _cut(documents, where, tokenizer, nsamples, seqlen, generator)


def check_calibration(calibration: Calibration) -> None:
    """Raise a DataError for what can be no calibration data; nothing is read."""
    if isinstance(calibration, Tensor):
        kind = calibration.dtype
        if calibration.dim() != 2 or calibration.numel() == 0 or kind.is_floating_point or kind == torch.bool:
            raise DataError(
                f"calibration is a {tuple(calibration.shape)} {kind} tensor; expected token ids (k, L), integers"
            )
    elif isinstance(calibration, (str, os.PathLike)):
        if not Path(calibration).is_file():
            raise DataError(
                f"calibration is {str(calibration)[:200]!r}, which is no file; pass the path of a text or JSONL file, "
                f"a list of texts, or token ids (k, L)"
            )
    elif not isinstance(calibration, Sequence) or not all(isinstance(text, str) for text in calibration):
        raise DataError(
            f"calibration is a {type(calibration).__name__}; pass token ids (k, L), a list of texts, or a path"
        )


def _drawn_rows(ids: Tensor, nsamples: int, generator: torch.Generator) -> Tensor:
    ids = ids.detach().to("cpu", torch.int64)
    if len(ids) <= nsamples:
        return ids
    logger.info("drawing %d of the %d calibration windows", nsamples, len(ids))
    return ids[torch.randperm(len(ids), generator=generator)[:nsamples].sort().values]


def _read(path: Path) -> list[str]:
    """Return the documents of a file; a plain text is one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"calibration file {path} is no UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"calibration file {path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() not in _JSON_SUFFIXES:
        return [text]
    documents = []
    for where, row in _rows(path, text):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}, {where}: expected {{"text": …}}; found {json.dumps(row)[:80]}')
        documents.append(row["text"])
    return documents


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of JSON lines, or of one JSON list."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is no JSON list: {error}") from None
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                expected = 'expected one JSON object {"text": …} a line'
                raise DataError(f"{path}, line {number}: {expected}: {error}") from None
            yield f"line {number}", row


def _cut(
    documents: list[str], where: str, tokenizer: Any, nsamples: int, seqlen: int, generator: torch.Generator
) -> Tensor:
    """Tokenise documents, or pieces of the only one, in drawn order until there is enough; cut what came."""
    whole = len(documents) > 1
    pieces = documents if whole else list(_pieces(documents[0], _PIECE * seqlen))
    tokens: list[int] = []
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        tokens += tokenizer(pieces[index], add_special_tokens=whole, verbose=False)["input_ids"]
        if len(tokens) >= nsamples * seqlen:
            break
    windows = min(nsamples, len(tokens) // seqlen)
    if windows == 0:
        raise DataError(
            f"calibration text is too short: {where} gives {len(tokens)} tokens, less than one window of "
            f"seqlen={seqlen}; pass more text or a smaller seqlen"
        )
    if windows < nsamples:
        warnings.warn(
            f"{where} gives {windows} calibration windows of {seqlen} tokens, not the {nsamples} asked for",
            SPPWarning,
            stacklevel=5,
        )
    return torch.tensor(tokens[: windows * seqlen]).view(windows, seqlen)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of at least `size` characters (the last may be shorter)."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
