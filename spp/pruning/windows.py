"""Calibration data as token windows (k, L): drawn from texts with a seed, or given."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.configs.pruning import KNOWN, DataSet, check_source, is_data_set, is_ids, is_self
from spp.data.encoding import example_ids
from spp.data.parsing import Example, Text, read_examples
from spp.data.tokens import added_bos, cut_windows, find_bos, tokens_of, without_bos
from spp.errors import CheckpointError, DataError, SPPWarning, arg
from spp.files import CheckpointReader, content_sha256

logger = logging.getLogger(__name__)

Calibration = Tensor | Sequence[str] | str | os.PathLike[str]
_KEY = "input_ids"  # the tensor of a file of token ids that holds several
_PIECE = 32  # characters per token of a window that a long text is cut into before it is drawn from


def check_calibration(calibration: Calibration) -> None:
    """Raise a DataError for what can be no calibration data; no file is read."""
    if isinstance(calibration, Tensor):
        _check_ids(calibration, "calibration")
    elif isinstance(calibration, (str, os.PathLike)):
        check_source(os.fspath(calibration))
    elif not isinstance(calibration, Sequence) or not all(isinstance(text, str) for text in calibration):
        raise DataError(
            f"{arg('calibration')} is a {type(calibration).__name__}; pass token ids (k, L), a list of texts, or a "
            f"path or id: {KNOWN}"
        )


def needs_tokenizer(calibration: Calibration) -> bool:
    """Whether calibration data is text."""
    if isinstance(calibration, (str, os.PathLike)):
        return not is_ids(os.fspath(calibration))
    return not isinstance(calibration, Tensor)


def load_ids(calibration: Calibration) -> Calibration:
    """Return the tensor in a file of token ids; any other calibration data as it is."""
    if isinstance(calibration, Tensor) or needs_tokenizer(calibration):
        return calibration
    path = os.fspath(calibration)  # type: ignore[arg-type]  # a path, or it would need a tokenizer
    ids = read_ids(path)
    _check_ids(ids, path)
    return ids


def describe_calibration(calibration: Calibration | None, windows: Tensor | None = None) -> str:
    """Return what a report says of where the windows are from; of a model's own text the hash of its tokens, too."""
    if is_self(calibration) and windows is not None:
        return f"{calibration}, sha256 {content_sha256(windows)[:16]}"
    if isinstance(calibration, (str, os.PathLike)):
        return os.fspath(calibration)
    return "" if calibration is None else "token ids" if isinstance(calibration, Tensor) else "texts"


def calibration_windows(
    calibration: Calibration,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: str = "auto",
) -> Tensor:
    """Return windows of token ids to calibrate on, the same for the same seed.

    Args:
        calibration: token ids (k, L), whose windows are taken as they are; a list of texts, each a document; or a path
            or the id of a data set (spp.configs.pruning), whose conversations are written by the chat template.
        tokenizer: of the model; needed for text only.
        nsamples: windows at most. Of more rows of ids, as many are drawn; a text that gives less is warned of.
        seqlen: L of windows cut from text.
        seed: of the draw.
        bos: whether windows cut from text begin with the BOS token, as one of their L: "auto" does as the tokenizer
            does with a fresh text, "always", "never".

    Returns:
        Int64 (k, L), at most `nsamples` windows.

    Raises:
        ConfigError: there is no BOS token, or no room beside it.
        DataError: no such data, empty or malformed data, text shorter than one window, no tokenizer.
        DependencyError: a data set is meant, and `datasets` is not installed.

    Example:
        >>> calibration_windows(torch.arange(6).view(3, 2), None, nsamples=3, seqlen=2, seed=0).shape
        torch.Size([3, 2])
    """
    check_calibration(calibration)
    if is_self(calibration):
        raise DataError(
            f"{arg('calibration', 'self')} is written by a model: spp.pruning.own_windows(model, …) gives it"
        )
    calibration = load_ids(calibration)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(calibration, Tensor):
        return _drawn_rows(calibration, nsamples, generator)
    if tokenizer is None:
        raise DataError(
            f"{arg('calibration')} is text, and text needs the model's tokenizer: pass {arg('tokenizer', ...)}, or "
            "token ids (k, L)"
        )
    if not callable(tokenizer):
        raise DataError(
            f"{arg('tokenizer')} is {tokenizer!r}, which cannot be called with a text: pass the model's tokenizer "
            "itself, such as AutoTokenizer.from_pretrained(…)"
        )
    source = os.fspath(calibration) if isinstance(calibration, (str, os.PathLike)) else None
    where = "the list of texts" if source is None else source
    if source is not None and is_data_set(source):
        rows = example_ids(tokenizer, read_source_rows(source, seed))
    elif source is not None:
        rows = _drawn_ids(list(read_source_rows(source, seed)), tokenizer, seqlen, generator)
    else:
        listed = [Text(f"text {number}", text) for number, text in enumerate(calibration, start=1)]  # type: ignore[arg-type]
        rows = _drawn_ids(listed, tokenizer, seqlen, generator)
    windows = _cut(rows, where, nsamples, seqlen, find_bos(tokenizer, bos))
    logger.info("%d calibration windows of %d tokens from %s (seed %d)", *windows.shape, where, seed)
    return windows


def _check_ids(ids: Tensor, where: str) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        kind = str(ids.dtype).removeprefix("torch.")
        raise DataError(f"{where} is a {tuple(ids.shape)} {kind} tensor; expected token ids (k, L), integers")


def _drawn_rows(ids: Tensor, nsamples: int, generator: torch.Generator) -> Tensor:
    ids = ids.detach().to("cpu", torch.int64)
    if len(ids) <= nsamples:
        return ids
    logger.info("drawing %d of the %d calibration windows", nsamples, len(ids))
    return ids[torch.randperm(len(ids), generator=generator, device="cpu")[:nsamples].sort().values]


def _drawn_ids(
    examples: Sequence[Example], tokenizer: Any, seqlen: int, generator: torch.Generator
) -> Iterable[list[int]]:
    """Yield the token ids of examples whole, or of pieces of the only text, in drawn order."""
    if len(examples) == 1 and isinstance(examples[0], Text):
        where = examples[0].where
        pieces = list(_pieces(examples[0].text, _PIECE * seqlen))
        drawn = [pieces[index] for index in torch.randperm(len(pieces), generator=generator, device="cpu").tolist()]
        added = added_bos(tokenizer)
        found = (tokens_of(tokenizer, text, where=where, special=False).ids for text in drawn if text.strip())
        return (without_bos(ids, added) for ids in found)
    order = torch.randperm(len(examples), generator=generator, device="cpu").tolist()
    return example_ids(tokenizer, (examples[index] for index in order))


def _cut(rows: Iterable[list[int]], where: str, nsamples: int, seqlen: int, bos: int | None) -> Tensor:
    """Take token ids until there is enough; cut what came."""
    tokens: list[int] = []
    empty = True
    for ids in rows:
        empty = False
        tokens += ids
        if len(tokens) >= nsamples * seqlen:
            break
    if empty:
        raise DataError(f"calibration text is empty: {where}")
    cut = cut_windows(torch.tensor(tokens, dtype=torch.long, device="cpu"), seqlen, bos)[:nsamples]
    windows = len(cut)
    if windows == 0:
        raise DataError(
            f"calibration text is too short: {where} gives {len(tokens)} tokens, less than one window of "
            f"{arg('seqlen', seqlen)}; pass more text or a smaller {arg('seqlen')}"
        )
    if windows < nsamples:
        warnings.warn(
            f"{where} gives {windows} calibration window{'s' * (windows > 1)} of {seqlen} tokens, not the {nsamples} "
            f"asked for",
            SPPWarning,
            stacklevel=5,
        )
    return cut


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into pieces of at least `size` characters (the last may be shorter)."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


# ---- Calibration data that is named by a path or an id.


def read_ids(source: str) -> Tensor:
    """Return the tensor in a file of token ids, whatever its shape: the only one, or of several that called input_ids.

    Raises:
        DataError: the file is malformed, or holds something else.
    """
    path = Path(source)
    if path.suffix.lower() == ".safetensors":
        try:
            with CheckpointReader(path.parent, file=path.name) as reader:
                return _only(source, {key: reader.tensor(key) for key in reader})
        except CheckpointError as error:
            raise DataError(f"calibration file {source} cannot be read: {error.marked}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"calibration file {source} is none that torch reads without running code: {reason}; write one by "
            f"torch.save(ids, path)"
        ) from None
    return _only(source, {"": found} if isinstance(found, Tensor) else found)


def read_source_rows(source: str, seed: int) -> Iterator[Example]:
    """Yield the documents and conversations of a file or data set; those of a data set in drawn order, as asked for.

    Raises:
        DataError: what is named cannot be read, or a row is malformed.
        DependencyError: it is a data set, and `datasets` is not installed.
    """
    if Path(source).is_file():
        yield from read_examples(source)
        return
    data = DataSet.parse(source)
    assert data is not None
    plain = "auto" if data.field == DataSet.field else "text"  # a field that is named is text
    yield from read_examples(
        data.name, data_format=plain, config=data.config, split=data.split, text_field=data.field, seed=seed
    )


def _only(source: str, found: object) -> Tensor:
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    ids = tensors.get(_KEY, next(iter(tensors.values())) if len(tensors) == 1 else None)
    if ids is None:
        held = f"the tensors {', '.join(map(str, tensors))}" if tensors else f"a {type(found).__name__}"
        raise DataError(f"calibration file {source} holds {held}; expected one tensor of token ids, or one of {_KEY}")
    return ids
