"""Rows of data: text files, JSON arrays, JSON Lines, tables, and data sets that the package `datasets` can load.

Every row comes with where it is from, for messages; what is malformed is a DataError with the file and the line. The
file's extension says how it is read; an extension that is not known is an error, never text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spp.configs.pruning import JSON_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES
from spp.errors import DataError, DependencyError

logger = logging.getLogger(__name__)

_LONGEST_CELL = 1 << 30  # characters of a field of a CSV file; Python's own limit is 131,072
_BUFFER = 10_000  # rows of a stream that are shuffled at a time

Row = dict[str, Any]


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def file_facts(path: str | os.PathLike[str]) -> tuple[str, int]:
    """Return the sha256 and the size in bytes of what is read of a file.

    Of a text file that is its text, without a byte order mark; of others all there is.
    """
    is_text = Path(path).suffix.lower() in ("", *TEXT_SUFFIXES)
    data = read_text(path).encode() if is_text else Path(path).read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)


def read_file(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row | str]]:
    """Yield (where, row) for each row of a file; of a text file (where, text), once.

    Args:
        path: .txt and the like or without extension: plain text; .json, .jsonl; .csv and .tsv, whose values all are
            strings; .parquet, .arrow.

    Raises:
        DataError: another extension, or the file cannot be read, is empty or malformed.
        DependencyError: pyarrow is needed and not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix in ("", *TEXT_SUFFIXES):
        text = read_text(path)
        if _is_json(text):
            logger.warning("%s holds JSON, and its name says plain text, as which it is read: for rows, .jsonl", path)
        yield str(path), text
    elif suffix in JSON_SUFFIXES:
        yield from read_json_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path, "," if suffix == ".csv" else "\t")
    elif suffix in ROW_SUFFIXES:
        yield from _arrow_rows(path)
    else:
        raise DataError(
            f"{path} ends in {suffix}, which is not understood",
            remedy=f"text is {', '.join(TEXT_SUFFIXES)}, rows are {', '.join(ROW_SUFFIXES)}: convert the file, or "
            f"rename it if it is one of them",
        )


def read_json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row of a JSON array or a JSON Lines file, told apart by the first character."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = _loaded(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {_beyond(error)}") from None
        if not rows:
            raise DataError(f"{path} is an empty JSON array")
        for number, row in enumerate(rows, start=1):
            yield _checked(f"{path}, row {number}", row)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.lstrip("\ufeff")  # of a file that was appended to another
        if line.strip():
            try:
                row = _loaded(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, column {error.colno}: not JSON: {error.msg} "
                    "(a file holds one JSON array, or one JSON object a line)"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {_beyond(error)}") from None
            yield _checked(f"{path}, line {number}", row)


def read_dataset_rows(
    name: str, config: str | None = None, split: str = "train", *, seed: int | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row of a data set.

    Args:
        name: id on the Hugging Face hub, or a folder: of data files, or saved by `datasets`.
        config: which part of a data set that has several.
        split: "train", "validation", …
        seed: draw the rows in another order. A data set is then read as a stream, of which only as much is fetched as
            is asked for, and shuffled 10,000 rows at a time.

    Raises:
        DataError: it cannot be found, reached or read.
        DependencyError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise DependencyError(
            f"there is no file {name}, and to load it as a data set the package datasets is needed: "
            "pip install 'spp[train]'"
        ) from None
    number = 0
    try:
        for row in _rows(datasets, name, config, split, seed):
            number += 1
            yield _checked(f"{name}, row {number}", dict(row))
    except DataError:
        raise
    except Exception as error:  # datasets raises OSError, ValueError, its own and those of the HTTP client
        part = f"config {config!r}, split {split!r}" if config else f"split {split!r}"
        reason = str(error).strip().split("\n")[0]
        what = f"the folder {name}" if Path(name).is_dir() else f"{name} is no file here, and"
        raise DataError(f"{what} cannot be loaded as a data set ({part}): {type(error).__name__}: {reason}") from error


def shown(value: object) -> str:
    """Return a value's type and what it looks like, cut short."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"


def _loaded(text: str) -> Any:
    """Return what JSON says; a key that an object has twice is a ValueError: one of the values would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"an object has the key {twice!r} twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _is_json(text: str) -> bool:
    """Whether a text begins with a row as JSON, or an array of rows."""
    try:
        found = json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return False
    return isinstance(found[0] if isinstance(found, list) and found else found, dict)


def _beyond(error: Exception) -> str:
    # Valid JSON that Python does not read: an integer of thousands of digits, brackets a thousand deep.
    return "values are nested too deep" if isinstance(error, RecursionError) else f"not read as JSON: {error}"


def _table_rows(path: str | os.PathLike[str], delimiter: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table with a line of headings: every value as the text that it is."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not {Path(path).suffix[1:].upper()}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    (_, names), *rest = lines
    logger.info("%s is read as %s, with the fields %s", path, Path(path).suffix[1:].lower(), ", ".join(names))
    named = [name for name in names if name.strip()]  # pandas writes its index below an empty heading
    if len(set(named)) < len(named) or not named:
        raise DataError(f"{path}, line 1: the headings must be names that differ; found {shown(names)}")
    if not rest:
        raise DataError(f"{path} has headings and no row")
    for number, cells in rest:
        if len(cells) != len(names):
            raise DataError(f"{path}, line {number}: {len(cells)} values under {len(names)} headings")
        yield f"{path}, line {number}", {n: c for n, c in zip(names, cells, strict=True) if n.strip()}


def _arrow_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowInvalid, ipc, memory_map, parquet
    except ImportError:
        raise DependencyError(f"to read {path} the package datasets is needed: pip install 'spp[train]'") from None
    number = 0
    try:
        if Path(path).suffix.lower() == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches()
        else:  # the streaming format, which `datasets` writes, or the file format
            try:
                batches = iter(ipc.open_stream(memory_map(str(path))))
            except ArrowInvalid:
                batches = iter(ipc.open_file(memory_map(str(path))).read_all().to_batches())
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, ValueError) as error:  # Arrow's own are these
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{path} cannot be read as {Path(path).suffix[1:]}: {reason}") from None
    if not number:
        raise DataError(f"{path} holds no row")


def _rows(datasets: Any, name: str, config: str | None, split: str, seed: int | None) -> Iterator[Any]:
    if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(name)
        if config is not None:
            raise DataError(f"{name} was saved by datasets and has no config; found {config!r}")
        if isinstance(rows, dict):
            if split not in rows:
                raise DataError(f"{name} has no split {split!r}; it has {', '.join(rows)}")
            rows = rows[split]
        elif split not in ("train", str(rows.split)):
            raise DataError(f"{name} was saved by datasets and has no splits; found {split!r}")
        if seed is None:
            return iter(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
        return (rows[index] for index in order.tolist())
    place = _place(getattr(getattr(datasets, "config", None), "HF_DATASETS_CACHE", None))
    if seed is None:
        return iter(datasets.load_dataset(name, config, split=split, **place))
    found = datasets.load_dataset(name, config, split=split, streaming=True, **place)
    return iter(found.shuffle(seed, buffer_size=_BUFFER))


def _place(usual: str | os.PathLike[str] | None) -> dict[str, str]:
    """Say where prepared data go: nothing for the usual folder, a temporary one where that cannot be written."""
    try:
        if usual is not None:
            os.makedirs(usual, exist_ok=True)
    except OSError:
        return {"cache_dir": _temporary().name}
    writable = usual is None or os.access(usual, os.W_OK | os.X_OK)
    return {} if writable else {"cache_dir": _temporary().name}


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="spp-datasets-")


def _checked(where: str, row: object) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, this is {shown(row)}")
    return where, row
