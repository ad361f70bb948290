"""Where calibration data comes from when it is named by a path or an id.

    text.txt, .text, .md, .raw        plain text, one document
    rows.json, .jsonl, .ndjson        rows with a field "text", each a document
    ids.pt, ids.safetensors           token ids (k, L)
    NAME[:CONFIG[:SPLIT[:FIELD]]]     a data set: an id of the Hugging Face hub (owner/name), or a folder that
                                      `datasets` can load; by default its only config, split train, field text

Empty parts stand for the default: "Salesforce/wikitext:wikitext-2-raw-v1", "allenai/c4:en:validation", "folder::test".
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spp.errors import CheckpointError, DataError
from spp.files import CheckpointReader
from spp.files.rows import JSON_SUFFIXES, read_dataset_rows, read_json_rows, read_text, shown

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
TENSOR_SUFFIXES = (".pt", ".safetensors")
_OTHER_SUFFIXES = (
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".gz",
    ".zip",
    ".zst",
    ".npy",
    ".bin",
    ".html",
    ".pdf",
    ".docx",
)
_KEY = "input_ids"  # the tensor of a file that holds several
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN = (
    f"{', '.join(TEXT_SUFFIXES)} (plain text), {', '.join(JSON_SUFFIXES)} (rows with a field text), "
    f"{', '.join(TENSOR_SUFFIXES)} (token ids (k, L)), or a data set: a folder or hub id owner/name, as "
    f"NAME[:CONFIG[:SPLIT[:FIELD]]]"
)


@dataclass(frozen=True)
class DataSet:
    """A data set by name, and what of it is meant.

    Example:
        >>> DataSet.parse("allenai/c4:en::url")
        DataSet(name='allenai/c4', config='en', split='train', field='url')
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"

    @classmethod
    def parse(cls, text: str) -> DataSet | None:
        """Read NAME[:CONFIG[:SPLIT[:FIELD]]]; None where NAME is neither a folder nor like an id of the hub."""
        if Path(text).is_dir():
            return cls(text)
        name, *parts = text.split(":")
        if len(parts) > 3 or not (Path(name).is_dir() or _is_hub_id(name)):
            return None
        config, split, field = [part.strip() for part in parts] + [""] * (3 - len(parts))
        return cls(name, config or None, split or "train", field or "text")


def check_source(source: str) -> None:
    """Raise a DataError where a path or id names nothing that can be read; nothing is.

    Args:
        source: as in the head of this file.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in ("", *TEXT_SUFFIXES, *JSON_SUFFIXES, *TENSOR_SUFFIXES):
            raise DataError(f"calibration file {source} ends in {path.suffix}, which is not understood; known: {KNOWN}")
    elif DataSet.parse(source) is None:
        raise DataError(f"calibration is {source[:200]!r}, which is no file; known: {KNOWN}")


def is_ids(source: str) -> bool:
    """Whether a path names a file of token ids."""
    return Path(source).is_file() and Path(source).suffix.lower() in TENSOR_SUFFIXES


def is_data_set(source: str) -> bool:
    """Whether this names a data set rather than a file."""
    return not Path(source).is_file()


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
            raise DataError(f"calibration file {source} cannot be read: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"calibration file {source} is none that torch reads without running code: {reason}; write one by "
            f"torch.save(ids, path)"
        ) from None
    return _only(source, {"": found} if isinstance(found, Tensor) else found)


def documents(source: str, seed: int) -> Iterator[str]:
    """Yield the documents of a text, JSON or data set; those of a data set in drawn order, as they are asked for.

    Raises:
        DataError: what is named cannot be read, or a row has no text.
        DependencyError: it is a data set, and `datasets` is not installed.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in JSON_SUFFIXES:
            yield read_text(path)
            return
        rows, field = read_json_rows(path), "text"
    else:
        data = DataSet.parse(source)
        assert data is not None
        rows, field = read_dataset_rows(data.name, data.config, data.split, seed=seed), data.field
    for where, row in rows:
        text = row.get(field)
        if not isinstance(text, str):
            found = f"{field} is {shown(text)}" if field in row else f"the row has {', '.join(map(str, row)) or 'none'}"
            raise DataError(f"{where}: expected text in the field {field}; {found}")
        yield text


def _only(source: str, found: object) -> Tensor:
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    ids = tensors.get(_KEY, next(iter(tensors.values())) if len(tensors) == 1 else None)
    if ids is None:
        held = f"the tensors {', '.join(map(str, tensors))}" if tensors else f"a {type(found).__name__}"
        raise DataError(f"calibration file {source} holds {held}; expected one tensor of token ids, or one of {_KEY}")
    return ids


def _is_hub_id(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_file = suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TENSOR_SUFFIXES, *_OTHER_SUFFIXES)
    return _HUB_ID.fullmatch(name) is not None and not name.startswith((".", "/", "~")) and not is_file
