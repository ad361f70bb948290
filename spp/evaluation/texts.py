"""The texts whose perplexity papers report: WikiText-2 and C4, from the hub or from local files of the same form.

    wikitext2   the raw test split of WikiText-2, its lines joined by empty lines, whole
    c4          the first 1,100 documents of the first validation file of C4, joined by blanks; its first 256 windows

Windows have 2048 tokens, or 4096 for Llama 2 where a paper measures each family at the length it was trained at.

Reference:
    Frantar and Alistarh, SparseGPT (arXiv 2301.00774), and Sun et al., Wanda (arXiv 2306.11695), measure so.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from spp.configs.checks import check_choice
from spp.configs.evaluating import DATASETS
from spp.errors import DataError, DependencyError, SPPWarning, arg
from spp.evaluation.documents import local_splits

WINDOW = 2048
_LLAMA_2 = 4096  # positions of Llama 2, and of no other Llama
_VALIDATION = "c4-validation.00000-of-00008.json.gz"  # the file of C4 that is measured


@dataclass(frozen=True)
class _Text:
    """A data set on the hub, and how its documents become one text.

    Args:
        local: its id, by which local files are found; the owner may be left out.
        config: in the folder of the data set.
        split: that is measured.
        arguments: of `datasets.load_dataset`.
        joined_by: stands between two documents.
        documents: that are read; None for all.
        windows: that are measured; None for all.
    """

    local: str
    config: str
    split: str
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    joined_by: str
    documents: int | None = None
    windows: int | None = None


_TEXTS = {
    "wikitext2": _Text(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", (("Salesforce/wikitext", "wikitext-2-raw-v1"), {}), "\n\n"
    ),
    "c4": _Text(
        "allenai/c4",
        "en",
        "validation",
        (("allenai/c4",), {"data_files": {"validation": f"en/{_VALIDATION}"}}),
        " ",
        documents=1100,
        windows=256,
    ),
}
assert tuple(_TEXTS) == DATASETS


def dataset_text(name: str, data_dir: str | Path | None = None) -> str:
    """Return the text of a data set as papers measure its perplexity.

    Args:
        name: "wikitext2" or "c4".
        data_dir: folder of local files in one of the layouts of spp.evaluation.documents, such as
            DIR/wikitext/wikitext-2-raw-v1/test.parquet or DIR/c4/en/validation.jsonl, whose rows have a field "text";
            of C4 the hub's own c4-validation.00000-of-00008.json.gz will do. None asks the hub.

    Returns:
        The documents, joined: measure it by `perplexity(…, protocol="paper", window=2048)`, of C4 with
        `max_windows=dataset_windows("c4")`.

    Raises:
        ConfigError: there is no such data set here.
        DataError: it cannot be found, reached or read.
        DependencyError: `datasets` is not installed.

    Example:
        >>> text = dataset_text("wikitext2", data_dir="data")  # doctest: +SKIP
        >>> perplexity(model, tokenizer, text, window=2048, protocol="paper")  # doctest: +SKIP
        12.19
    """
    check_choice("dataset", name, DATASETS)
    known = _TEXTS[name]
    rows = _hub_rows(name, known) if data_dir is None else _local_rows(Path(data_dir), name, known)
    found = list(islice(rows, known.documents))
    where = name if data_dir is None else f"{data_dir}, {name}"
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise DataError(f"{where}, row {number} has no field 'text' with a text: it is no row of {known.local}")
    text = known.joined_by.join(row["text"] for row in found)
    if not text.strip():
        raise DataError(f"{where}: the split {known.split} is empty")
    if known.documents is not None and len(found) < known.documents:
        told = f"{where} has {len(found)} documents, and papers measure {known.documents}: no number of theirs compares"
        warnings.warn(told, SPPWarning, stacklevel=2)
    return text


def dataset_windows(name: str) -> int | None:
    """Return how many windows of a data set papers measure; None for all.

    Args:
        name: "wikitext2" or "c4".

    Raises:
        ConfigError: there is no such data set here.

    Example:
        >>> dataset_windows("c4")
        256
    """
    check_choice("dataset", name, DATASETS)
    return _TEXTS[name].windows


def paper_window(model: nn.Module) -> int:
    """Return the window that papers measure a model's family at: 4096 tokens for Llama 2, 2048 for all others.

    Args:
        model: its config says what it is.

    Example:
        >>> paper_window(model)  # doctest: +SKIP
        2048
    """
    config = getattr(model, "config", None)
    is_llama_2 = getattr(config, "model_type", None) == "llama" and config.max_position_embeddings == _LLAMA_2  # type: ignore[union-attr]
    return _LLAMA_2 if is_llama_2 else WINDOW


def _hub_rows(name: str, known: _Text) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise DependencyError(
            f"to load {name} the package datasets is needed: pip install 'spp[eval]'",
            remedy=f"or pass {_local_hint(known)}",
        ) from None
    places, options = known.arguments
    try:
        return iter(datasets.load_dataset(*places, split=known.split, **options))
    except Exception as error:  # OSError, ValueError, those of datasets, of the hub and of the HTTP client
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"the data set {name} cannot be loaded from the hub: {type(error).__name__}: {reason}",
            remedy=f"for local files pass {_local_hint(known)}",
        ) from error


def _local_hint(known: _Text) -> str:
    """Say which option names local files, and where they are in its folder."""
    place = Path("DIR", known.local.rpartition("/")[2], known.config, known.split)
    return f"{arg('data_dir', 'DIR')} with {place}.jsonl, .parquet or .arrow"


def _local_rows(root: Path, name: str, known: _Text) -> Iterable[Any]:
    if not root.is_dir():
        raise DataError(f"{arg('data_dir')} is {str(root)!r}, which is no folder")
    if name == "c4":
        for folder in (root, root / "en", root / "c4" / "en", root / "allenai" / "c4" / "en"):
            for file in (folder / _VALIDATION, folder / _VALIDATION.removesuffix(".gz")):
                if file.is_file():
                    return _lines(file)
    splits = local_splits(root, name, known.local, known.config)
    if known.split not in splits:
        raise DataError(f"{root} lacks the split {known.split!r} of {name}; it has {', '.join(splits)}")
    return iter(splits[known.split])


def _lines(file: Path) -> Iterator[Any]:
    """Yield the rows of a JSON Lines file, compressed or not."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
