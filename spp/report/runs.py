"""Sources of a report, as they are on disk: runs of spp tune, checkpoints, comparisons and JSON results of commands.

    models     a directory, or one with an adapter; its stage: dense, pruned, reconstructed, tuned, merged
    measured   a number of a model, with all that it was measured under

Nothing is guessed: a stage follows from a certificate, a run or the zeros.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp.certifying.certificate import Certificate, SparsityReport
from spp.errors import CheckpointError, DataError, some_of
from spp.files import read_json
from spp.files.carry import CERTIFICATE_NAME
from spp.files.jsonio import parse_object
from spp.files.recognised import MODEL, PRUNE_REPORT, RUN
from spp.merging.report import MergeReport
from spp.report.measured import Key, Measured, evaluated, is_number, perplexity_in
from spp.wrapping.adapter_files import CONFIG_NAME

STAGES = ("dense", "pruned", "reconstructed", "tuned", "merged")
COMPARISON_VERSION = 1
_EXPECTED = (
    "expected a run directory of spp tune, a checkpoint (pruned or merged), a directory of spp compare, a folder that "
    "holds some of these, or a JSON file that spp eval --json, spp prune --report or spp merge --json wrote"
)


@dataclass(frozen=True)
class Model:
    """A model that numbers are of.

    Attributes:
        path: its directory without links, or the name that stands in the files.
        adapter: the same of the adapter on it; None for the model alone.
        name: for people, as the files have it.
    """

    path: str
    adapter: str | None
    name: str

    @property
    def key(self) -> Key:
        """Its identity."""
        return self.path, self.adapter


@dataclass
class TuningRun:
    """A run directory of spp tune, finished or not.

    Attributes:
        name: as it was named by who asks.
        config: config.json; options: those of the run; log: the entries; evaluation: eval.json.
        adapter, base: the folders that are there, else None.
        before, after: keys of the model that was tuned, and of the tuned one.
        problems: what is missing or broken, in words.
    """

    name: str
    path: Path
    config: dict[str, Any]
    options: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    base: Path | None = None
    before: Key = ("", None)
    after: Key = ("", None)
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimizer steps that the log has."""
        return max((entry["step"] for entry in self.log), default=0)

    @property
    def planned(self) -> int | None:
        """Optimizer steps that were asked for; None where the files do not say."""
        if isinstance(self.options.get("steps"), int) and is_number(self.options["steps"]):
            return int(self.options["steps"])
        found = (self.options.get("epochs"), self.options.get("batch_size"), self.options.get("gradient_accumulation"))
        rows = self.data.get("rows")
        if not all(is_number(value) and value > 0 for value in (*found, rows)):
            return None
        epochs, batch, accumulation = (float(value) for value in found if value is not None)
        return math.ceil(epochs * math.ceil(math.ceil(float(rows or 0) / batch) / accumulation))

    @property
    def seconds(self) -> float | None:
        """Time in training up to the last line of the log."""
        found = self.log[-1].get("seconds") if self.log else None
        return float(found) if found is not None and is_number(found) else None

    @property
    def data(self) -> dict[str, Any]:
        """Counts and hash of the training data; {} where the files do not say."""
        found = self.config.get("data")
        return found if isinstance(found, dict) else {}


@dataclass
class Checkpoint:
    """A directory of a model; its certificate is None where there is none."""

    name: str
    path: Path
    certificate: Certificate | None


@dataclass(frozen=True)
class Zeros:
    """The zeros of a checkpoint.

    Attributes:
        report: as found or, unverified, as its certificate says; None where neither is known.
        verdict: in words. holds: whether the certificate holds; None where that was not verified.
    """

    name: str
    report: SparsityReport | None
    verdict: str
    holds: bool | None


@dataclass(frozen=True)
class Changes:
    """The change of each weight by an adapter, as a merge into the base's dtype would store it.

    Attributes:
        name: of the run.
        sums: {module path: (Σ |W_eff / W − 1| over kept weights, their number, whether it is finite)}.
        merge: the effect of that merge.
    """

    name: str
    sums: dict[str, tuple[float, int, bool]]
    merge: MergeReport


@dataclass
class Sources:
    """All that was found.

    Attributes:
        dense: path of the dense model, where it was named.
        read: files and runs that were read, without links: each is read once.
        models: by key. checkpoints: by path without links.
        results: (name, object) of each JSON file of spp eval; prunings, merges, comparisons alike.
    """

    dense: str | None = None
    read: set[str] = field(default_factory=set)
    runs: list[TuningRun] = field(default_factory=list)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    models: dict[Key, Model] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    prunings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    merges: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    comparisons: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def model(self, path: object, adapter: object, near: Path) -> Model:
        """Return the model that files in the folder `near` name, made known where it is new."""
        name = str(path) if adapter is None else f"{path} with {adapter}"
        found = Model(located(path, near), None if adapter is None else located(adapter, near), name)
        return self.models.setdefault(found.key, found)

    def base_of(self, key: Key) -> Key | None:
        """Return the model that a tuned, merged or reconstructed one was made of; None where that is not known."""
        path, adapter = key
        found: str | None = path
        if adapter is None:
            certificate = self.certificate(path)
            if certificate is None:
                return None
            base = certificate.base
            found = None if base is None else located(base.name_or_path or "", Path(path).parent)
            if found not in self.checkpoints and (base is not None or Path(path).name == "reconstructed"):
                mask = certificate.fingerprint()
                same = [
                    other
                    for other, one in self.checkpoints.items()
                    if one.certificate is not None and one.certificate.base is None
                    if one.certificate.fingerprint() == mask
                ]
                found = next((other for other in same if other != path), found)
        updated = [run.before for run in self.runs if run.base is not None and os.path.realpath(run.base) == found]
        return updated[0] if updated else None if found is None else (found, None)

    def certificate(self, path: str) -> Certificate | None:
        """Return the certificate of a checkpoint that was found."""
        return self.checkpoints[path].certificate if path in self.checkpoints else None


def is_directory(name: str | Path) -> bool:
    """Return whether there is a directory of that name; of what can be no name of one there is none."""
    with contextlib.suppress(OSError, ValueError):
        return bool(str(name)) and Path(name).is_dir()
    return False


def located(name: object, near: Path) -> str:
    """Return a directory that a file names without links, here or beside the file; of what is no directory its name."""
    for path in (Path(str(name)), near / str(name)):
        if str(name) and is_directory(path):
            return os.path.realpath(path)
    return str(name)


def read_sources(names: Sequence[str | os.PathLike[str]], dense: str | os.PathLike[str] | None = None) -> Sources:
    """Read what a report is to be made of.

    Args:
        names: run directories, checkpoints, folders of these, JSON files.
        dense: the dense model, as results name it, or its directory.

    Raises:
        CheckpointError: a directory is missing, is none of spp, or was written by another version.
        DataError: a file is no result of spp.
    """
    found = Sources()
    if dense is not None:
        found.dense = found.model(os.fspath(dense), None, Path()).path
    for name in names:
        path = Path(name)
        if path.is_file():
            _read_file(found, os.fspath(name), path)
        elif not path.is_dir():
            raise CheckpointError(f"there is no file or directory {os.fspath(name)}; {_EXPECTED}")
        elif not _read_directory(found, os.fspath(name), path):
            _read_folder(found, os.fspath(name), path)
    return found


def _read_directory(found: Sources, name: str, path: Path) -> bool:
    """Read a run, a comparison or a checkpoint; return whether it is one."""
    assert RUN.mark is not None and MODEL.mark is not None
    if RUN.mark(path):
        _read_run(found, name, path)
    elif "format_version" in _first(path / "results.json"):
        _read_comparison(found, name, path / "results.json")
    elif MODEL.mark(path):
        _add_checkpoint(found, name, path)
        for file in sorted(path.glob("*.json")):
            if not MODEL.has_file(file.name) and PRUNE_REPORT.recognises(file):
                _read_file(found, os.path.join(name, file.name), file)
    else:
        return False
    return True


def _read_folder(found: Sources, name: str, path: Path) -> None:
    """Read the stages of one road that are in a folder."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    read = [_read_directory(found, os.path.join(name, entry.name), entry) for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if entry.suffix in (".json", ".jsonl") and entry.is_file()]
    known = [file for file in files if {*map(_kind, _objects(file, strict=False))} - {None, "tune"}]
    for file in known:
        _read_file(found, os.path.join(name, file.name), file)
    if not any(read) and not known:
        adapter = (path / CONFIG_NAME).is_file()
        holds = "an adapter alone" if adapter else some_of(entry.name for entry in entries) or "nothing"
        more = f"; pass its run, {path.parent}" if adapter else ""
        raise CheckpointError(f"{name} is no run: it holds {holds}; {_EXPECTED}{more}")


def _add_checkpoint(found: Sources, name: str, path: Path) -> Checkpoint:
    where = os.path.realpath(path)
    if where not in found.checkpoints:
        certificate = Certificate.read(path) if (path / CERTIFICATE_NAME).exists() else None
        found.checkpoints[where] = Checkpoint(name, path, certificate)
        found.models.setdefault((where, None), Model(where, None, name))
    return found.checkpoints[where]


# ---- Runs of spp tune.


def _known(found: Sources, path: Path) -> bool:
    """Return whether something was read already, and note that it is now."""
    where = os.path.realpath(path)
    before = where in found.read
    found.read.add(where)
    return before


def _read_run(found: Sources, name: str, path: Path) -> None:
    from spp.training.callbacks import read_log  # what trains is not loaded before it is needed
    from spp.training.checkpoints import last_complete
    from spp.training.run_directory import FORMAT

    if _known(found, path):
        return
    config = read_json(path / "config.json", "the run's config")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'config.json'} says format {config.get('format')}; this spp reads {FORMAT}: install the spp that "
            f"wrote the run"
        )
    options = config.get("tune")
    if not isinstance(options, dict):
        raise CheckpointError(f"{path / 'config.json'} is malformed: it has no options of a tuning run (tune)")
    run = TuningRun(name, path, config, options)
    try:
        entries = read_log(path / "log.jsonl")
        losses = [
            {name: v for name, v in entry.items() if "loss" not in name or is_number(v)}
            for entry in entries
            if is_number(entry["step"])
        ]
        run.log = [entry for entry in losses if entry.keys() & {"loss", "eval_loss"}]
    except (DataError, OSError, ValueError) as error:
        run.problems.append(f"the log cannot be read ({error}): no loss curve")
    try:
        run.evaluation = read_json(path / "eval.json", "eval.json") if (path / "eval.json").exists() else {}
    except CheckpointError as error:
        run.problems.append(f"the perplexities cannot be read: {error}")
    run.adapter = path / "adapter" if (path / "adapter" / CONFIG_NAME).is_file() else None
    run.base = path / "base" if (path / "base" / CERTIFICATE_NAME).is_file() else None
    if run.adapter is None:
        saved = last_complete(path / "checkpoints") if (path / "checkpoints").is_dir() else None
        resumes = f"; {saved.name} is there to resume from" if saved is not None else ""
        run.problems.append(f"unfinished: {run.steps} of {run.planned or '?'} steps are in its log, and there is no "
                            f"adapter{resumes}")  # fmt: skip
    elif run.evaluation.get("before") and not run.evaluation.get("after"):
        run.problems.append("unfinished: the perplexity after tuning was not measured")
    model = options.get("model") or f"{name}, before tuning"
    before = found.model(model, None, path.parent)
    run.before = before.key
    if is_directory(before.path) and _is_checkpoint(before.path):
        _add_checkpoint(found, str(model), Path(before.path))
    if run.base is not None:
        _add_checkpoint(found, os.path.join(name, "base"), run.base)
    tuned = Model(
        before.path if run.base is None else os.path.realpath(run.base), str(path.resolve() / "adapter"), name
    )
    found.models.setdefault(tuned.key, tuned)
    run.after = tuned.key
    for key, part in ((run.before, "before"), (run.after, "after")):
        values = run.evaluation.get(part)
        if isinstance(values, dict):
            known = {"text_sha256": run.evaluation.get("text_sha256"), **values}
            found.measured += perplexity_in(key, known, *_text_of(run))
    found.runs.append(run)


def _is_checkpoint(path: str) -> bool:
    assert MODEL.mark is not None
    return MODEL.mark(Path(path))


def _text_of(run: TuningRun) -> tuple[str, str]:
    """Return the name of the text that a run measured on, and its identity: that of held-out data, else of the run."""
    text, data = str(run.evaluation.get("text", "a text")), run.data
    if text.startswith("held out:") and "sha256" in data:
        parts = [f"{name} {run.options.get(name)}" for name in ("eval_fraction", "block_length", "seed")]
        return text, f"of the data {data['sha256']}, {', '.join(parts)}"
    return text, f"as {run.name} read it"


# ---- JSON files.


def _objects(path: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """Return the object in a file, or those in its lines; none, unless strict, where it holds anything else."""
    try:
        data = path.read_bytes()
        try:
            return [parse_object(data, str(path))]
        except CheckpointError:
            lines = [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]
            if len(lines) < 2 or not lines[0][1].rstrip().endswith(b"}"):
                raise
            return [parse_object(line, f"{path}, line {number}") for number, line in lines]
    except (CheckpointError, OSError) as error:
        if strict:
            raise DataError(f"{error}; {_EXPECTED}") from error
        return []


def _first(path: Path) -> dict[str, Any]:
    """Return the object in a file; {} where there is none."""
    return next(iter(_objects(path, strict=False)), {})


def _kind(values: Mapping[str, Any]) -> str | None:
    """Return of which command an object is the result; None for any other object."""
    if isinstance(values.get("model"), str) and values.keys() & {"perplexity", "scores"}:
        return "eval"
    if values.keys() >= {"layers", "method", "pattern", "sparsity", "windows"}:
        return "prune"
    if values.keys() >= {"layers", "survived", "kept"}:
        return "merge"
    if values.keys() >= {"run_dir", "adapter_dir"}:
        return "tune"
    return None


def _read_file(found: Sources, name: str, path: Path) -> None:
    if path.name == "results.json" and "format_version" in _first(path):
        return _read_comparison(found, name, path)
    if _known(found, path):
        return None
    for values in _objects(path):
        kind = _kind(values)
        if kind == "tune":
            run = Path(located(values["run_dir"], path.parent))
            if not is_directory(run) or not _read_directory(found, str(values["run_dir"]), run):
                raise DataError(f"{name} is of the run {run}, which is not there: pass its directory")
            continue
        if kind is None:
            raise DataError(f"{name} is no result of spp: its keys are {some_of(values) or 'none'}; {_EXPECTED}")
        {"eval": found.results, "prune": found.prunings, "merge": found.merges}[kind].append((name, values))
        if kind == "eval":
            model = found.model(values["model"], values.get("adapter"), path.parent)
            if is_directory(model.path) and _is_checkpoint(model.path):
                _add_checkpoint(found, str(values["model"]), Path(model.path))
            found.measured += evaluated(model.key, name, values)
    return None


def _read_comparison(found: Sources, name: str, path: Path) -> None:
    if _known(found, path):
        return
    contents = read_json(path, "the results")
    if contents.get("format_version") != COMPARISON_VERSION:
        raise CheckpointError(
            f"{path} has format_version {contents.get('format_version')!r}; this spp reads {COMPARISON_VERSION}: use "
            f"the spp that wrote it"
        )
    if not isinstance(contents.get("rows"), dict):
        raise CheckpointError(f"{path} is malformed: it has no rows of a comparison")
    found.comparisons.append((name, contents))
