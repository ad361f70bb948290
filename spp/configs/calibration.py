"""What names calibration data: a path, or the id of a data set. Only the name is looked at, nothing is read.

    text.txt, .text, .md, .raw        plain text, one document
    rows.json, .jsonl, .ndjson        rows with a field "text", each a document
    ids.pt, ids.safetensors           token ids (k, L)
    NAME[:CONFIG[:SPLIT[:FIELD]]]     a data set: an id of the Hugging Face hub (owner/name), or a folder that
                                      `datasets` can load; by default its only config, split train, field text

Empty parts stand for the default: "Salesforce/wikitext:wikitext-2-raw-v1", "allenai/c4:en:validation", "folder::test".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from spp.errors import DataError, arg

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
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
        raise DataError(f"{arg('calibration')} is {source[:200]!r}, which is no file; known: {KNOWN}")


def is_ids(source: str) -> bool:
    """Whether a path names a file of token ids."""
    return Path(source).is_file() and Path(source).suffix.lower() in TENSOR_SUFFIXES


def is_data_set(source: str) -> bool:
    """Whether this names a data set rather than a file."""
    return not Path(source).is_file()


def _is_hub_id(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_file = suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TENSOR_SUFFIXES, *_OTHER_SUFFIXES)
    return _HUB_ID.fullmatch(name) is not None and not name.startswith((".", "/", "~")) and not is_file
