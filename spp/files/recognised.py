"""Which outputs `overwrite` may replace: recognised ones, in which nothing foreign lies; whatever else is there stays.

    a folder   empty; or one of KINDS by its marks (what its config.json, adapter_config.json, … says), while every
               file in it is
                 - of a name that spp, transformers, tokenizers, peft or the Trainer gives to a file there, and that
                   nobody gives to a text of their own: a page (README.md, LICENSE, …) or code is known by no name,
                   vocab.txt and its like only where what they belong to stands beside them,
                 - a shard that the folder's index names,
                 - beside a model, a report of spp prune, by its keys, or a model card that PEFT or the Trainer
                   generated, with nothing filled in,
                 - from the hub, and unchanged since: a download keeps a note of each file, with its hash,
                 - or not lost: the same bytes have the same place in what replaces it, or in a folder that it copies.
               Subfolders are judged alike; an adapter's must hold one. What is in another folder's place for its own (a
               home, a cache, the current directory, a repository) is never replaced (places.py).
    a file     empty; or a file of the kind that replaces it, by its keys, or by the mark in each of our charts.

Names are looked at first, contents only of what has no known name. The verdict is an OutputExistsError that names the
first of what would be lost; it comes before any work, and again right before the replacement.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from spp.errors import CheckpointError, OutputError, OutputExistsError
from spp.files.cards import CARD_NAME, is_generated_card
from spp.files.jsonio import read_json
from spp.files.places import why_never

_LISTED = 3  # names in a message
_LONGEST = 80  # characters of a name in a message
_PIECE = 1 << 20  # bytes that are compared at a time
_ENDS = 1 << 16  # bytes at either end of a chart in which its mark is
_REPORT = 1 << 24  # bytes of the largest report that is looked for: some hundred for each layer
_ATTEMPTS = 20  # other writers that may replace a folder while it is looked at


@dataclass(frozen=True)
class Kind:
    """A folder that is recognised.

    Args:
        name: for messages.
        files: regular expressions of the names of its files, in full.
        folders: {regular expression: kind of a subfolder of that name}.
        mark: whether a folder is one; None for one that is only part of another.
        needs: a regular expression; without a file of that name, nothing in it is known.
        whole: nothing in it is anybody's but its writer's, and none of it is looked at.
        model: its index names further files, and it may hold a report or a generated card.
    """

    name: str
    files: Sequence[str] = ()
    folders: Mapping[str, Kind] = field(default_factory=dict)
    mark: Callable[[Path], bool] | None = None
    needs: str = ""
    whole: bool = False
    model: bool = False

    def has_file(self, name: str) -> bool:
        """Whether a file of that name belongs here."""
        return self._names.fullmatch(name) is not None

    def folder(self, path: Path) -> Kind:
        """Return the kind of a subfolder; of a foreign one, the kind to which nothing belongs."""
        kind = next((kind for pattern, kind in self.folders.items() if re.fullmatch(pattern, path.name)), _NOTHING)
        lacks = kind.needs and not any(re.fullmatch(kind.needs, name) for name in _listed(path))
        return _NOTHING if lacks else kind

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.files))


@dataclass(frozen=True)
class FileKind:
    """A single file that is recognised.

    Args:
        name: for messages.
        recognises: whether a file that is not empty is one.
    """

    name: str
    recognises: Callable[[Path], bool]


_JUNK = (".DS_Store", "Thumbs.db", "desktop.ini")  # what systems leave in folders that somebody looks at
_TEMPORARY = r"\..+\.spp-(tmp|new|old)-\w+"  # what a killed writer left
_VARIANT = r"(\.(fp16|bf16|fp32|fp8|int8|int4))?"
_OF = r"(-\d+-of-\d+)?"
_WEIGHTS = (
    rf"(pytorch_)?model{_VARIANT}{_OF}\.(safetensors|bin)",
    rf"(pytorch_)?model\.(safetensors|bin)\.index{_VARIANT}\.json",
    rf"(tf_model{_OF}\.h5|flax_model{_OF}\.msgpack|rust_model\.ot)(\.index\.json)?",
    rf"consolidated([.-]\d+)?{_OF}\.(safetensors|pth)",
)
_ADAPTERS = (r"adapter_config\.json", rf"adapter_model{_OF}\.(safetensors|bin)(\.index\.json)?")
_CONFIGS = (
    r"((generation|(video_)?preprocessor|processor|image_processor|feature_extractor|audio_tokenizer)_)?config\.json",
    r"(quantize|quant|hf_quant)_config\.json|configuration\.json",
    r"sparsity\.json|modelcard\.json|chat_template\.(jinja|json)",
)
_TOKENIZERS = (  # vocab_files_names of transformers' tokenizers, and those of tiktoken and Mistral
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json|tokenizer\.model(\.v\d+)?",
    r"vocab\.json|vocab-(src|tgt)\.json|target_vocab\.json|entity_vocab\.json|encoder\.json",
    r"(source|target)\.spm|[\w-]+\.tiktoken|prophetnet\.tokenizer|normalizer\.json|emoji\.json",
    r"sentencepiece(\.bpe)?\.model|(spiece|spm|spm_char)\.model|byte_maps\.json|word_(pronunciation|shape)\.json",
)
_TEXTS = {  # names that a person may give to a text, and what stands beside those that a library wrote
    r"vocab\.bpe|merges\.txt": r"(vocab(-src)?|encoder)\.json",
    r"zero_to_fp32\.py|latest": r"global_step\d+",
}
_VOCABULARIES = {  # the same of whole vocabularies: which tokenizer_class has one
    r"vocab\.txt": r"\w*(Bert|Phobert|Electra|MPNet|Esm|RoFormer|Funnel|LayoutLM|Splinter|Tapas|Cpm|DPR|Japanese)\w*",
    r"bpe\.codes": r"(Phobert|Bertweet)\w*",
    r"dict\.txt": r"Bartpho\w*",
}
_TRAINING = (  # of the Trainer, accelerate and SPPTrainer
    r"(trainer_state|all_results|(train|eval|predict|test)_results)\.json|training_args\.bin|spp_complete\.json",
    r"optimizer\.(pt|bin)|(scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|masks\.(json|safetensors)",
)

_ALL = Kind("", whole=True)
_NOTHING = Kind("")
_SHARED = {_TEMPORARY: _ALL, r"__pycache__": Kind("", (r".+\.pyc",))}
_MODEL_FILES = (*_WEIGHTS, *_ADAPTERS, *_CONFIGS, *_TOKENIZERS, *_TRAINING, _TEMPORARY)
_BESIDE_WEIGHTS = {
    **_SHARED,
    r"additional_chat_templates": Kind("", (r".+\.jinja",)),
    r"\.cache": Kind("", folders={r"huggingface": _ALL}),
}
_SHARDED = {
    r"(pytorch_model_fsdp|optimizer)_\d+": Kind("", (r"__\d+_\d+\.distcp|\.metadata",)),
    r"global_step\d+": Kind("", (r"\w*(zero_pp_rank|mp_rank|layer)_[\w-]+\.pt",)),
}
# Further adapters, by name, as PEFT's Trainer leaves them.
_NAMED = {r"[\w.-]+": Kind("", _ADAPTERS, needs="|".join(_ADAPTERS), model=True)}
STEP = Kind("a checkpoint of a training", _MODEL_FILES, {**_BESIDE_WEIGHTS, **_SHARDED, **_NAMED}, model=True)
_EVENTS = Kind("", (r"events\.out\.tfevents\..+",), {r"[\w.-]+": Kind("", (r"events\.out\.tfevents\..+",))})
_MODEL_FOLDERS = {**_BESIDE_WEIGHTS, r"checkpoint-\d+": STEP, r"runs": _EVENTS}


def _says(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a folder; {} where there is none."""
    try:
        return read_json(folder / name, name)
    except CheckpointError:
        return {}


def _keys(name: str, *keys: str, rows: Sequence[str] | None = None) -> FileKind:
    """Return the kind of a JSON file of ours that has these keys and, with `rows`, in each of its rows those."""

    def recognises(path: Path) -> bool:
        found = _says(path.parent, path.name)
        if rows is None:
            return found.keys() >= set(keys)
        lines = found.get("rows")
        known = isinstance(lines, list) and all(isinstance(row, dict) and row.keys() >= set(rows) for row in lines)
        return known and found.keys() == set(keys)

    return FileKind(name, recognises)


CHART_MARK = "spp chart"  # what our charts say made them
_CHARTS = {  # first bytes: the mark, as matplotlib writes it
    b"\x89PNG\r\n\x1a\n": f"tEXtSoftware\0{CHART_MARK}".encode(),
    b"%PDF-": f"/Creator ({CHART_MARK})".encode(),
    b"<?xml": f"<dc:title>{CHART_MARK}</dc:title>".encode(),
}


def _is_chart(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(len(head), os.fstat(file.fileno()).st_size - _ENDS))
        tail = file.read(_ENDS)
    return any(head.startswith(first) and (mark in head or mark in tail) for first, mark in _CHARTS.items())


def _is_comparison_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\n## Learning rates\n" in file.read(1 << 22)


PAGE_MARK = '<meta name="generator" content="spp report">'


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return PAGE_MARK.encode() in file.read(1024)


PAGE = FileKind("page of spp report", _is_page)
PICTURE = FileKind("chart that spp drew", _is_chart)
PRUNE_REPORT = _keys("report of spp prune", "layers", "method", "pattern", "sparsity", "windows")
RECONSTRUCTION_REPORT = _keys("report of spp reconstruct", "blocks", "held_out", "options", "seqlen", "windows")
MEASUREMENTS = _keys("file of measurements of spp bench", "rows", rows=("device", "versions"))
EVALUATION = _keys("result of spp eval", "model", "model_fingerprint", "versions")
CERTIFICATE = _keys("certificate of spp", "format_version", "tensors", "totals")
COMPARISON = _keys("file of results of spp compare", "conditions", "format_version", "rows")
COMPARISON_TEXT = FileKind("report of spp compare", _is_comparison_text)
ANY_OUTPUT = FileKind(
    "output of spp",
    lambda path: any(
        kind.recognises(path)
        for kind in (
            *(PAGE, PICTURE, PRUNE_REPORT, RECONSTRUCTION_REPORT, MEASUREMENTS),
            *(CERTIFICATE, COMPARISON, COMPARISON_TEXT),
        )
    ),
)
OWN = FileKind("file", lambda path: True)  # one that spp keeps in a folder of its own, whose name says what it is


def _is_checkpoint(folder: Path) -> bool:
    if _says(folder, "config.json").keys() & {"model_type", "architectures"}:
        return True
    if any(isinstance(_says(folder, f"{name}.index.json").get("weight_map"), dict) for name in _INDEXED):
        return True
    return any(
        re.fullmatch(rf"pytorch_model{_OF}\.bin", name) for name in os.listdir(folder)
    ) or CERTIFICATE.recognises(folder / "sparsity.json")


def _is_adapter(folder: Path) -> bool:
    found = _says(folder, "adapter_config.json")
    weights = any(re.fullmatch(_ADAPTERS[1], name) for name in os.listdir(folder))
    return bool(found) and (weights or bool(found.keys() & {"peft_type", "lora_alpha"}))


def _is_pruning(folder: Path) -> bool:
    found = _says(folder, "progress.json")
    return isinstance(found.get("job"), dict) and isinstance(found.get("blocks"), dict)


_INDEXED = ("model.safetensors", "pytorch_model.bin")
MODEL = Kind("a checkpoint", _MODEL_FILES, _MODEL_FOLDERS, _is_checkpoint, model=True)
_TRAINED = Kind(
    "a checkpoint of a training",
    _MODEL_FILES,
    {**_MODEL_FOLDERS, **_SHARDED, **_NAMED},
    lambda folder: "log_history" in _says(folder, "trainer_state.json"),
    model=True,
)
ADAPTER = Kind("an adapter", _MODEL_FILES, _MODEL_FOLDERS, _is_adapter, model=True)
TRAININGS = Kind("the checkpoints of a run", (_TEMPORARY,), {**_SHARED, r"checkpoint-\d+": STEP, r"runs": _EVENTS})
RUN = Kind(
    "a run of spp tune",
    (r"config\.json|log\.jsonl|eval\.json|\.lock", _TEMPORARY),
    {**_SHARED, r"checkpoints": TRAININGS, r"adapter": ADAPTER, r"base": MODEL},
    lambda folder: str(_says(folder, "config.json").get("format")).startswith("spp-tune-"),
)
RESULTS = Kind(
    "a comparison",
    (r"results\.(json|md)|\.lock", _TEMPORARY),
    {r"\.claims": Kind("", (r"[0-9a-f]{32}",))},
    lambda folder: COMPARISON.recognises(folder / "results.json"),
)
PRUNING = Kind(
    "a pruning in progress", (r"progress\.json|\.lock", rf"model{_OF}\.safetensors", _TEMPORARY), mark=_is_pruning
)
CACHE_HEAD = "teacher_cache.json"
CACHE = Kind(
    "a teacher cache",
    (r"teacher_cache\.(json|safetensors)", _TEMPORARY),
    _SHARED,
    lambda folder: str(_says(folder, CACHE_HEAD).get("format")).startswith("spp-teacher-cache-"),
)
KINDS = (_TRAINED, MODEL, ADAPTER, RUN, RESULTS, PRUNING, CACHE)


def require_replaceable(
    target: str | os.PathLike[str], copies: Sequence[str | os.PathLike[str]] = (), *, kind: Kind | None = None
) -> None:
    """Refuse to replace a folder, or to empty it, where that would lose what is not recognised.

    Args:
        target: a folder, a link to one, or nothing.
        copies: folders in which a file that is there too, with the same path and bytes, is not lost.
        kind: what the folder is, where its place says so; None finds it out by the marks.

    Raises:
        OutputExistsError: something would be lost; the first of it is named.
        OutputError: the folder is one that is never replaced, or permission is denied.
    """
    path = Path(os.path.realpath(target))
    problem: OutputError | None = OutputError(
        f"cannot replace {shown(path)}: other processes keep changing it; let only one write there"
    )
    for _ in range(_ATTEMPTS):
        before = _state(path)
        if before is None:
            return
        try:
            problem = _problem(path, [Path(copy) for copy in copies], kind)
        except FileNotFoundError:
            continue  # another writer has put something in its place
        if problem is None:
            return
        if _state(path) == before:
            break
    if problem is not None:
        raise problem


def require_replaceable_file(path: Path, kind: FileKind) -> None:
    """Refuse to replace a file that is not empty and not of a kind.

    Raises:
        OutputExistsError: it is another kind's, or no regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if not path.is_file():
        raise OutputExistsError(f"{shown(path)} is no regular file, so it is not replaced: choose another path")
    if status.st_size and not kind.recognises(path):
        raise OutputExistsError(
            f"{shown(path)} is no {kind.name}, so it is not replaced: choose another path, or move it away"
        )


def shown(name: str | os.PathLike[str]) -> str:
    """Return a path for a message: on one line, and in quotes where it could be taken for something else."""
    text = os.fspath(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if re.fullmatch(r"[\w./+@~-]*", text) else f"'{text}'"


def foreign(folder: Path, kind: Kind, copies: Sequence[Path] = ()) -> Iterator[str]:
    """Yield the paths inside a folder of what does not belong to its kind and would be lost; subfolders end in /.

    Raises:
        OutputExistsError: a subfolder cannot be read.
        PermissionError: a subfolder cannot be emptied.
    """
    left = [(kind, "")]
    while left:
        kind, inside = left.pop()
        entries = _entries(folder, inside)
        if inside and not entries and kind is _NOTHING and not any((copy / inside).is_dir() for copy in copies):
            yield inside
        named: frozenset[str] | None = None
        below = []
        for entry in entries:
            path = inside + entry.name
            if entry.is_dir(follow_symlinks=False):
                inner = kind.folder(folder / path)
                below += [] if inner.whole else [(inner, f"{path}/")]
                continue
            plain = entry.is_file(follow_symlinks=False) or entry.is_symlink()
            if plain and kind.has_file(entry.name):
                continue
            if plain and kind.model and named is None:
                named = _named(folder / inside)
            if plain and named and entry.name in named:
                continue
            if plain and kind.model and _has_known_content(folder / path):
                continue
            if not (plain and (_is_downloaded(folder, path) or any(_same(folder, copy, path) for copy in copies))):
                yield path
        left += reversed(below)


def _problem(path: Path, copies: Sequence[Path], kind: Kind | None) -> OutputError | None:
    """Return why a folder may not be replaced, or None."""
    reason = why_never(path)
    if reason is not None:
        return OutputError(f"cannot replace {shown(path)}: {reason}; choose another path")
    if not path.is_dir():
        return OutputExistsError(f"{shown(path)} is no folder, so it is not replaced: choose another path")
    _entries(path, "")
    kind = kind or next((one for one in KINDS if one.mark is not None and one.mark(path)), None)
    found = list(islice(foreign(path, kind or _NOTHING, copies), _LISTED + 1))
    if not found:
        return None
    names = ", ".join(map(_shortened, found[:_LISTED])) + (", …" if len(found) > _LISTED else "")
    if kind is None:
        return OutputExistsError(
            f"{shown(path)} holds {names} and is no checkpoint, adapter, run or comparison of spp or transformers, so "
            f"it is not replaced: choose another path, or move these away"
        )
    return OutputExistsError(
        f"{shown(path)} is {kind.name}, but also holds {names}, which would be lost, so it is not replaced: choose "
        f"another path, or move these away"
    )


def _entries(folder: Path, inside: str) -> list[os.DirEntry[str]]:
    """Return what is in a folder, by name."""
    path = folder / inside
    try:
        with os.scandir(path) as found:
            entries = sorted((entry for entry in found if entry.name not in _JUNK), key=lambda entry: entry.name)
    except FileNotFoundError:
        raise  # another writer has put something in its place
    except OSError as error:
        raise OutputExistsError(
            f"{shown(folder)} is not replaced, as nobody knows what would be lost: {_shortened(inside or '.')} cannot "
            f"be read ({error.strerror}); choose another path, or change its permissions"
        ) from error
    if entries and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return entries


def _shortened(name: str) -> str:
    return shown(name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 4 :]}")


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _named(folder: Path) -> frozenset[str]:
    """Return the files that are known by others in a model's folder: shards by the index, texts by what has them."""
    names: set[str] = set()
    for index in _INDEXED:
        weights = _says(folder, f"{index}.index.json").get("weight_map")
        names |= {name for name in weights.values() if isinstance(name, str)} if isinstance(weights, dict) else set()
    there = _listed(folder)
    for text, beside in _TEXTS.items():
        if any(re.fullmatch(beside, name) for name in there):
            names |= {name for name in there if re.fullmatch(text, name)}
    tokenizer = str(_says(folder, "tokenizer_config.json").get("tokenizer_class"))
    for text, classes in _VOCABULARIES.items():
        if re.fullmatch(classes, tokenizer):
            names |= {name for name in there if re.fullmatch(text, name)}
    return frozenset(names)


def _listed(folder: Path) -> list[str]:
    """Return the names in a folder; none where it cannot be read, which is said when its turn comes."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _has_known_content(path: Path) -> bool:
    """Whether a file beside a model is a report of spp prune, or a card in which nobody wrote anything."""
    if path.name == CARD_NAME:
        return is_generated_card(path)
    report = path.suffix == ".json" and path.is_file() and path.stat().st_size <= _REPORT
    return report and (PRUNE_REPORT.recognises(path) or RECONSTRUCTION_REPORT.recognises(path))


def _is_downloaded(folder: Path, path: str) -> bool:
    """Whether the hub's client has fetched a file into the folder, and nobody has changed it since."""
    note = folder / ".cache" / "huggingface" / "download" / f"{path}.metadata"
    try:
        told = note.read_text(encoding="utf-8").splitlines()[1]  # sha256, or what git calls a small file
        with (folder / path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256() if len(told) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest() == told
    except (OSError, ValueError, IndexError):
        return False


def _same(folder: Path, copy: Path, path: str) -> bool:
    """Whether a file has the same bytes in both folders, and does not go with the first."""
    one, other = folder / path, copy / path
    if Path(os.path.realpath(other)).is_relative_to(folder):
        return False
    try:
        if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
            return False
        with one.open("rb") as first, other.open("rb") as second:
            while piece := first.read(_PIECE):
                if piece != second.read(_PIECE):
                    return False
    except OSError:
        return False
    return True
