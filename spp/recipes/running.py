"""The directory of a run: what is recorded of each step, and which steps are carried out again.

    .lock                   while a process is at work here: which
    run.json                format, recipe, and of each step its state, options, and hashes of what it read and wrote
    pruned/ tuned/ merged/  what the stages wrote
    eval/NAME.json          one object a measurement, as spp eval --json prints it

A step is skipped when it is finished with the same options and the same inputs, its output is there and valid, and no
step that it reads was made again. Valid is a checkpoint whose certificate verifies, a run whose adapter has the bytes
that it ended with, a file of the recorded hash. An output is replaced only where the record says that the run wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.certifying.verify import examine
from spp.errors import CheckpointError, OutputExistsError, SPPError, arg
from spp.files import atomic_file, output_error, read_json, recover, write_json
from spp.files.carry import CERTIFICATE_NAME
from spp.files.leftovers import LOCK_NAME, FolderLock
from spp.files.provenance import Provenance
from spp.files.recognised import CACHE_HEAD, EVALUATION, OWN
from spp.recipes.stages import CACHE, CHECKPOINT, FILE, RESULT, RUN, Plan, Step, python_reference

FORMAT = "spp-run-1"
RECORD = "run.json"
_PIECE = 1 << 20  # bytes that are hashed at a time
_TOLD = 3  # changes in a message
_TEMPORARY = re.compile(r"\..+\.spp-(tmp|new|old)-\w+")
# The file of an output that says who wrote it; of what is a single file, itself.
_OWNER = {CHECKPOINT: CERTIFICATE_NAME, RUN: "config.json", CACHE: CACHE_HEAD}


@dataclass(frozen=True)
class Decision:
    """Whether a step is carried out.

    Args:
        runs: whether it is. why: or why not.
        replaces: there is an output of it. resumes: which goes on from where it was.
    """

    runs: bool
    why: str
    replaces: bool = False
    resumes: bool = False


class RunFolder:
    """The directory of a run; within `working`, no other process works there.

    Args:
        plan: what the run does. overwrite: make every step again.

    Raises:
        OutputExistsError: the directory holds something else than a run.
        CheckpointError: its record is of a newer version, or malformed.
    """

    def __init__(self, plan: Plan, *, overwrite: bool = False) -> None:
        self.plan = plan
        self.path = plan.out
        self._overwrite = overwrite
        self._again: set[str] = set()  # steps that this process has carried out, or would
        self._known: dict[str, str] = {}  # hashes of files outside of the run
        self._record = self._read()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Make the directory and lock it: a context manager.

        Raises:
            OutputError: another process is at work there, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(error, self.path) from error
        told = f"another process is at work in {self.path}"
        lock = FolderLock(self.path, told, f"let it finish, or stop it, or choose another {arg('out')}")
        try:
            recover(self.path / RECORD)
            self._record = self._read()
            yield
        finally:
            lock.release()

    def decide(self, step: Step) -> Decision:
        """Return whether a step is carried out; the steps before it were decided, and carried out where they run.

        Raises:
            OutputExistsError: in the place of its output is something that this run did not write.
        """
        decision = self._decide(step)
        if decision.runs:
            self._again.add(step.name)
        return decision

    def _decide(self, step: Step) -> Decision:
        there = [path for path in step.writes if os.path.lexists(path)]
        found = self._record["steps"].get(step.name)
        if found is None:
            if there and (step.kind == FILE or not self._overwrite):
                raise self._foreign(there[0], "and this run did not write it")
            return Decision(True, "not made yet", bool(there))
        finished = found.get("state") == "done"
        if finished and (step.kind == FILE or not self._overwrite):
            self._require_own(step, found)
        changes = [] if self._overwrite else self._changes(step, found)
        if self._overwrite or changes:
            return Decision(True, "; ".join(changes[:_TOLD]) or "made again, as asked", bool(there))
        if not finished:
            old = found.get("before")
            resumes = step.kind == RUN and bool(there) and (old is None or old != _owner(step.writes[0], RUN))
            return Decision(True, "it was interrupted", bool(there), resumes)
        problem = self._problem(step, found)
        if problem is not None:
            return Decision(True, problem, bool(there))
        return Decision(False, "made with the same options")

    def finished(self, step: Step) -> bool:
        """Whether a step was carried out before: with whichever options, and whatever became of its output."""
        found = self._record["steps"].get(step.name, {})
        return found.get("state") == "done" and not self._overwrite

    @contextlib.contextmanager
    def making(self, step: Step, decision: Decision) -> Iterator[None]:
        """Record that a step begins and, if it comes to its end, that it is finished: a context manager.

        A step that fails before it has changed its output leaves the record as it was.
        """
        before = self._record["steps"].get(step.name)
        then = None
        if decision.resumes and before is not None:
            then = before.get("before")
        elif decision.replaces and step.kind == RUN:
            then = _owner(step.writes[0], RUN)
        self._note(step, {"state": "begun", "before": then, **self._made_of(step)})
        start = time.perf_counter()
        try:
            yield
        except (Exception, KeyboardInterrupt):
            marks = [None if before is None else self._marks(before, path)[0] for path in step.writes]
            if marks == [_owner(path, step.kind) for path in step.writes]:
                self._note(step, before)
            raise
        self.finish(step, time.perf_counter() - start)

    def finish(self, step: Step, seconds: float) -> None:
        """Record that a step is finished, and hashes of what it wrote."""
        marks = {self._inside(path): [_owner(path, step.kind), _content(path, step.kind)] for path in step.writes}
        made = Provenance.here(seconds=seconds).to_dict()
        self._note(step, {"state": "done", "marks": marks, **self._made_of(step), **made})

    def write_texts(self, step: Step) -> None:
        """Write the texts of Python's reference."""
        for path, text in zip(step.writes, python_reference(), strict=True):
            with atomic_file(path, overwrite=True, kind=OWN) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def write_result(self, step: Step, values: Mapping[str, Any], decision: Decision) -> None:
        """Write what was measured."""
        with atomic_file(step.writes[0], overwrite=decision.replaces, kind=EVALUATION) as temporary:
            write_json(temporary, values)

    def result(self, step: Step) -> dict[str, Any]:
        """Return what was measured."""
        return read_json(step.writes[0], "the result")

    def _read(self) -> dict[str, Any]:
        """Return the record that is here; an empty one where nothing is."""
        if not os.path.lexists(self.path):
            return {"steps": {}}
        try:
            names = [name for name in os.listdir(self.path) if name != LOCK_NAME and not _TEMPORARY.fullmatch(name)]
        except NotADirectoryError:
            raise OutputExistsError(f"{self.path} is a file; choose the name of a directory") from None
        except OSError as error:
            raise output_error(error, self.path) from error
        if RECORD not in names:
            if names:
                raise OutputExistsError(
                    f"{self.path} is not empty and no run of a recipe (it has no {RECORD})",
                    remedy=f"choose another {arg('out')}; nothing there is overwritten",
                )
            return {"steps": {}}
        found = read_json(self.path / RECORD, "the record of the run")
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path / RECORD} has the format {found.get('format')!r}, not {FORMAT!r}: another version of spp "
                f"wrote it, or another program; choose another {arg('out')}"
            )
        steps: Any = found.get("steps")
        parts = (
            [one.get(key) for one in steps.values() for key in ("options", "reads")] if _all_dicts(steps) else [None]
        )
        if not _all_dicts(dict(enumerate(parts))):
            raise CheckpointError(f"{self.path / RECORD} is not what a run wrote; choose another {arg('out')}")
        return found

    def _note(self, step: Step, values: Mapping[str, Any] | None) -> None:
        """Write the record with what it says of a step; None says nothing."""
        self._record["steps"].pop(step.name, None)
        if values is not None:
            self._record["steps"][step.name] = dict(values)
        self._record |= {"format": FORMAT, "recipe": self.plan.recipe, "model": self.plan.model}
        with atomic_file(self.path / RECORD, overwrite=True, kind=OWN) as temporary:
            write_json(temporary, self._record)

    def _made_of(self, step: Step) -> dict[str, Any]:
        return {"options": step.options(), "reads": self._reads(step)}

    def _reads(self, step: Step) -> dict[str, str]:
        return {what: self._identity(name) for what, name in step.reads.items()}

    def _identity(self, name: str) -> str:
        """Return what an input is: the hash of its contents; of an id of the hub, itself."""
        path = Path(name)
        maker = self._maker(path)
        if maker is not None:
            marks = self._record["steps"].get(maker.name, {}).get("marks", {})
            own = next(one for one in maker.writes if path.is_relative_to(one))
            return str(marks.get(self._inside(own), [None, None])[1])
        if not path.exists():
            return name
        if name not in self._known:
            self._known[name] = _tree(path)
        return self._known[name]

    def _maker(self, path: Path) -> Step | None:
        """Return the step that writes a path."""
        return next((one for one in self.plan.steps if any(path.is_relative_to(own) for own in one.writes)), None)

    def _changes(self, step: Step, found: Mapping[str, Any]) -> list[str]:
        """Return why a step is made again though it was made."""
        then, now = {**step.usual(), **found["options"]}, step.options()
        names = [name for name in now if then.get(name) != now[name]]
        changes = [f"{step.stage}.{name} was {then.get(name)!r} and is {now[name]!r}" for name in names]
        makers = {what: self._maker(Path(name)) for what, name in step.reads.items()}
        again = dict.fromkeys(one.name for one in makers.values() if one is not None and one.name in self._again)
        changes += [f"{name} is made again" for name in again]
        read, reads = found["reads"], self._reads(step)
        for what in {**read, **reads}:
            maker = makers.get(what)
            if (maker is None or maker.name not in again) and read.get(what) != reads.get(what):
                changes.append(f"{what} ({step.reads.get(what, 'none')}) is another than then")
        return changes

    def _require_own(self, step: Step, found: Mapping[str, Any]) -> None:
        """Raise unless what is in the place of a finished step's output was written by this run."""
        for path in step.writes if step.kind != RESULT else ():
            if os.path.lexists(path) and _owner(path, step.kind) != self._marks(found, path)[0]:
                inside = f"its {_OWNER[step.kind]} is" if step.kind in _OWNER else "it is"
                raise self._foreign(path, f"and is not what this run wrote there: {inside} another, or missing")

    def _problem(self, step: Step, found: Mapping[str, Any]) -> str | None:
        """Return why the output of a finished step is not valid, or None."""
        for path in step.writes:
            if not path.exists():
                return f"{path} is missing"
            if _content(path, step.kind) != self._marks(found, path)[1]:
                return f"{path} has changed since"
            if step.kind == CHECKPOINT and self._marks(found, path)[0] is not None:
                try:
                    examine(str(path)).require()
                except SPPError as error:
                    return f"{path} is damaged: {str(error).splitlines()[0]}"
        return None

    def _marks(self, found: Mapping[str, Any], path: Path) -> list[Any]:
        marks = found.get("marks")
        value = marks.get(self._inside(path)) if isinstance(marks, dict) else None
        return value if isinstance(value, list) and len(value) == 2 else [None, None]

    def _foreign(self, path: Path, why: str) -> OutputExistsError:
        return OutputExistsError(f"{path} exists, {why}", remedy=f"move it away, or choose another {arg('out')}")

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def _all_dicts(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())


def _owner(path: Path, kind: str) -> str | None:
    """Return the hash of what says who wrote an output; None where it is not there."""
    mark = path / _OWNER[kind] if kind in _OWNER else path
    return _tree(mark) if mark.is_file() else None


def _content(path: Path, kind: str) -> str | None:
    """Return the hash of what a later step reads of an output; None where it is not there."""
    if kind != RUN:
        return _owner(path, kind) or (_tree(path) if path.is_dir() else None)  # no certificate: a quantized model
    adapter, base = path / "adapter", _owner(path / "base", CHECKPOINT)
    return f"{_tree(adapter)}{'' if base is None else f' on {base}'}" if adapter.is_dir() else None


def _tree(path: Path) -> str:
    """Return the sha256 of a file, or of the names and hashes of the files in a folder but hidden ones."""
    digest = hashlib.sha256()
    try:
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
            return digest.hexdigest()
        for one in sorted(path.rglob("*")):
            inside = one.relative_to(path)
            if one.is_file() and not any(part.startswith(".") for part in inside.parts):
                digest.update(f"{inside.as_posix()}\0{_tree(one)}\0".encode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
