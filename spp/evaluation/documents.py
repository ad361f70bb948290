"""The documents of tasks: from local files in the place of data sets of the hub, and which split is measured.

A folder of local files has them under the id of the data set in the task's definition, with or without its owner, or
under the name of the task:

    DIR/<data set>/<config>/<split>.jsonl         or .json, .parquet, .arrow, or <split>-00000-of-00002.parquet, …
    DIR/<data set>/<config>/<split>/              what `save_to_disk` of `datasets` writes
    DIR/<task>/<split>.jsonl

A data set without configs has its splits in DIR/<data set> or in a folder of it such as `none` or `default`; the texts
of a perplexity (texts.py) have the same layouts. Everything is read into memory: nothing is written beside the files or
into a cache, and the hub is not asked.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.data.reading import read_json_rows
from spp.errors import DataError, arg, some_of
from spp.files import read_json

_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_INFORMATION = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SHARD = re.compile(r"-\d+-of-\d+$")
_NO_CONFIG = ("", "default", "none", "main", "plain_text", "data")  # folders of a data set without configs
_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "pandas")  # of `datasets`, for files that a task names itself
# Other ids under which the data of a data set, or of one of its configs, is handed out.
_ALSO = {
    "mmlu": ("hails/mmlu_no_train", "mmlu_no_train"),
    "super_glue/boolq": ("google/boolq", "boolq"),
    "wikitext/wikitext-2-raw-v1": ("wikitext-2-raw-v1",),
}


@dataclass(frozen=True)
class Documents:
    """The documents that a task is measured on.

    Args:
        split: the name of the split.
        sha256: of the documents, each as JSON with sorted keys, whatever the format of their files; None for a stream,
            and for pictures and sounds.
    """

    split: str
    sha256: str | None


class Source:
    """Where the tasks that are loaded meanwhile get their documents from.

    Args:
        data_dir: folder of local files; None leaves it to lm-eval, which asks the hub.
        split: the split to measure on; None for the one of each task's definition.
        shots: number of examples in a prompt; None for that of each task's definition.

    Attributes:
        found: {task: Documents} of the tasks that were loaded.
    """

    def __init__(self, data_dir: Path | None, split: str | None, shots: int | None) -> None:
        self.data_dir, self.split, self.shots = data_dir, split, shots
        self.found: dict[str, Documents] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give lm-eval's tasks their documents from here: a context manager."""
        from lm_eval.api.task import ConfigurableTask, Task

        originals = {kind: kind.download for kind in (Task, ConfigurableTask)}

        def replaced(original: Any) -> Any:
            def download(task: Any, *arguments: Any, **options: Any) -> None:
                self._fill(task, lambda: original(task, *arguments, **options))

            return download

        for kind, original in originals.items():
            kind.download = replaced(original)
        try:
            yield
        finally:
            for kind, original in originals.items():
                kind.download = original

    def _fill(self, task: Any, download: Any) -> None:
        """Set the task's data set, by `download` unless there are local files for it, and the split to measure on."""
        config = getattr(task, "_config", None)
        name = getattr(config, "task", None) or type(task).__name__
        path = task.DATASET_PATH
        made = callable(getattr(config, "custom_dataset", None))
        if self.data_dir is None or made or not path or path in _BUILDERS or Path(path).is_absolute():
            try:
                download()
            except Exception as error:  # OSError, ValueError, those of datasets, of the hub and of the HTTP client
                reason = str(error).strip().split("\n")[0]
                remedy = None if self.data_dir else f"for local files pass {arg('data_dir', ...)}"
                raise DataError(
                    f"the data set {path} of the task {name} cannot be loaded: {type(error).__name__}: {reason}",
                    remedy=remedy,
                ) from error
        else:
            task.dataset = local_splits(self.data_dir, name, path, task.DATASET_NAME)
        own = getattr(config, "test_split", None) or getattr(config, "validation_split", None)
        if own is None and self.split is not None:
            raise DataError(f"the task {name} chooses its split in code; leave out {arg('split')} for it")
        if own is not None:
            self._choose(task, name, own)

    def _choose(self, task: Any, name: str, own: str) -> None:
        """Check the splits that are needed, and set the one to measure on."""
        config, splits = task.config, list(task.dataset)
        wanted = self.split or own
        if wanted not in splits:
            where = self.data_dir or task.DATASET_PATH
            near = difflib.get_close_matches(wanted, splits, 1) or splits or [own]
            raise DataError(
                f"{where} lacks the split {wanted!r} of the task {name}; it has {some_of(splits)}",
                option="split",
                remedy=f"add it, or measure on another one with {arg('split', near[0])}",
            )
        shots = config.num_fewshot if self.shots is None or config.num_fewshot == 0 else self.shots
        examples = _examples_split(config)
        if shots and examples is not None and examples not in splits:
            raise DataError(
                f"{self.data_dir or task.DATASET_PATH} lacks the split {examples!r}, from which the task {name} takes "
                f"the {shots} examples of its prompts; it has {some_of(splits)}",
                remedy=f"add it, or pass {arg('num_fewshot', 0)}",
            )
        if wanted != own:
            config.test_split = wanted
            if examples == wanted:  # told, so that lm-eval leaves the document itself out of its examples
                config.fewshot_config.split = wanted
        documents = task.dataset[wanted]
        if isinstance(task.dataset, _Splits):
            task.dataset.like = documents
        plain = hasattr(documents, "__len__") and config.doc_to_image is None and config.doc_to_audio is None
        self.found[name] = Documents(wanted, _sha256(documents) if plain else None)


def _examples_split(config: Any) -> str | None:
    """Return the split that lm-eval takes a prompt's examples from."""
    few = config.fewshot_config
    if few is not None and few.split is not None:
        return str(few.split)
    if few is not None and few.samples is not None:
        return None
    return config.training_split or config.validation_split or config.test_split


class _Splits(dict[str, Any]):
    """{split: documents}, read when they are asked for; without documents where a split has no file.

    lm-eval reads the split of a prompt's examples even where prompts have none.
    """

    like: Any = None  # documents whose columns an empty split has

    def __init__(self, files: dict[str, list[Path]], mended: Callable[[Any], Any]) -> None:
        super().__init__(files)
        self.mended = mended

    def __getitem__(self, split: str) -> Any:
        if split not in self:
            if self.like is None:
                raise DataError(f"there is no split {split!r}; there are {some_of(self)}")
            return self.like.select(range(0))
        found = super().__getitem__(split)
        if isinstance(found, list):
            found = self.mended(_read(found))
            self[split] = found
        return found


def local_splits(root: Path, task: str, path: str, name: str | None) -> _Splits:
    """Return the splits of a data set, by the first of the folders that has some.

    Raises:
        DataError: none has.
    """
    tried = _folders(root, task, path, name)
    for folder in tried:
        if splits := _splits_of(folder):
            return _Splits(splits, _boolq if (path.rpartition("/")[2], name) == ("super_glue", "boolq") else _as_it_is)
    parents = {file.parent for file in root.rglob("*") if file.suffix in _SUFFIXES}
    folders = {folder.parent if (folder / "state.json").is_file() else folder for folder in parents}
    there = sorted(folder.relative_to(root).as_posix() for folder in folders)
    wanted = [folder.relative_to(root).as_posix() for folder in tried]
    near = [n for w in (wanted[0], task) for n in difflib.get_close_matches(w, there, 3)]
    has = f"nearest: {', '.join(dict.fromkeys(near))}" if near else f"it has {some_of(there) or 'no data'}"
    raise DataError(
        f"{root} has no documents of the task {task}: expected a folder {' or '.join(dict.fromkeys(wanted[:2]))} "
        f"or {task} with a file of each split, such as test.jsonl; {has}"
    )


def _folders(root: Path, task: str, path: str, name: str | None) -> list[Path]:
    """Return the folders that may have the splits of a data set, best first."""
    short = path.rpartition("/")[2]
    ids = [(path, name), (short, name)]
    ids += [(other, name) for other in _ALSO.get(short, ())]
    ids += [(other, None) for other in _ALSO.get(f"{short}/{name}", ())]
    named = [root / data / config for data, config in ids if config]
    plain = [root / data for data, _ in dict.fromkeys([*ids, (task, None)])]
    return list(dict.fromkeys([*named, *(folder / inner for folder in plain for inner in _NO_CONFIG)]))


def _splits_of(folder: Path) -> dict[str, list[Path]]:
    """Return {split: its files in order} of a folder; empty where there are none."""
    if not folder.is_dir():
        return {}
    if (folder / "state.json").is_file():  # one split, saved alone
        split, files = _saved(folder)
        return {split or "train": files}
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if (entry / "state.json").is_file():
                found[entry.name] = _saved(entry)[1]
            elif files := _shards(entry):
                found[entry.name] = files
        elif entry.suffix in _SUFFIXES and entry.name not in _INFORMATION:
            found.setdefault(_SHARD.sub("", entry.stem), []).append(entry)
    return found


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder that is a split; none where they have names of their own, as splits in a config."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
    names = [_SHARD.sub("", file.stem) for file in files]
    return files if all(name in ("data", folder.name) or name.isdigit() for name in names) else []


def _saved(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the split's name and the files of what `save_to_disk` wrote."""
    state = read_json(folder / "state.json", "state of a saved data set")
    try:
        return state.get("_split"), [folder / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{folder / 'state.json'} names no data files; save the data set again") from None


def _read(files: list[Path]) -> Any:
    """Return the documents of files as one data set in memory."""
    import datasets

    parts = []
    for file in files:
        try:
            if file.suffix == ".arrow":
                parts.append(datasets.Dataset.from_file(str(file), in_memory=True))
            elif file.suffix == ".parquet":
                from pyarrow.parquet import read_table

                parts.append(datasets.Dataset(datasets.table.InMemoryTable(read_table(file))))
            else:
                rows = [row for _, row in read_json_rows(file)]
                columns = dict.fromkeys(key for row in rows for key in row)
                parts.append(datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns}))
        except DataError:
            raise
        except Exception as error:  # OSError, those of pyarrow and datasets
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"{file} cannot be read: {type(error).__name__}: {reason}") from error
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _boolq(documents: Any) -> Any:
    """Return BoolQ as SuperGLUE has it, with 0 or 1 as "label"; its authors' own has False or True as "answer"."""
    column = "label" if "label" in documents.column_names else "answer"
    if column not in documents.column_names:
        return documents
    labels = [int(value) for value in documents[column]]
    return documents.remove_columns(column).add_column("label", labels)


def _as_it_is(documents: Any) -> Any:
    return documents


def _sha256(documents: Any) -> str:
    digest = hashlib.sha256()
    for row in documents:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _plain(value: object) -> object:
    """Return a value that JSON has no form for as text; of bytes and of other things the type alone."""
    return str(value) if hasattr(value, "isoformat") else type(value).__name__
