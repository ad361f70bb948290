"""results.json: what a comparison has found so far.

    format_version   1
    conditions       what all rows share (CompareConfig.conditions), whether rows and windows of text begin with BOS,
                     and hashes of the models, their masks, the tokenizer and the data
    baselines        {"pruned", "dense": validation and test perplexity, sparsity}
    rows             {key: one trial}, key = "<contender>, lr …, seed …, … steps"
    costs            {contender: time and memory of a step against the reference's}

Every change is read, added and written again, atomically and under a lock, so that several processes can work on one
file, and a killed one loses no more than the trial that it was in. Such a trial is claimed while it runs: the claim is
a locked file, and the system takes the lock away from a process that ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spp.configs.checks import finite, is_number
from spp.errors import CheckpointError, ConfigError, OutputError, OutputExistsError, arg
from spp.files import atomic_file, check_target, output_error, read_json, write_json
from spp.files.leftovers import lock
from spp.files.recognised import COMPARISON, COMPARISON_TEXT, OWN

NAME, REPORT = "results.json", "results.md"
FORMAT_VERSION = 1
_NEWER = {
    "data_sha256",
    "weights",
    "dense_weights",
    "tokenizer_sha256",
}  # conditions that the first results.json files did not have
_NAMED = {"data": "data_sha256", "eval_text": "test_sha256"}  # file names, which tell nothing where these agree
_PARTS = ("conditions", "baselines", "rows", "costs")
_REMEDY = f"put back a copy of it, begin anew ({arg('overwrite', True)}), or choose another directory"
_NO_RESULTS = "put back a copy of it, move it away, or choose another directory"
_ANY = {"loss": 0.0, "perplexity": 1.0}  # in place of a part that is missing
_LOCK, _CLAIMS = ".lock", ".claims"
_WAIT = 0.05  # seconds between two tries for the lock, which is held for milliseconds


def refuse_existing(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise an OutputExistsError for results that are there, unless it was said what becomes of them.

    A file that holds nothing yet, as a run leaves that failed before its first measurement, counts as none. What is no
    results of a comparison is never replaced; neither is what stands in the place of its report.
    """
    check_target(path.with_name(REPORT), overwrite=True, kind=COMPARISON_TEXT)
    if overwrite:
        check_target(path, overwrite=True, kind=COMPARISON)
    if path.exists() and not (resume or overwrite) and not _holds_nothing(_read(path)):
        raise OutputExistsError(
            f"{path} exists",
            remedy=f"go on with it ({arg('resume', True)}), replace it ({arg('overwrite', True)}), or choose another "
            f"directory",
        )


class Presence:
    """That this process works on a comparison, as others may at the same time; what they work on is not begun anew.

    Args:
        directory: of the results; made if it is not there.

    Attributes:
        alone: whether no other process works on it; none can begin to until `share`.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._handle = _open(directory / _CLAIMS / _claim_name("a process is at work"))
        self.alone = lock(self._handle) is not False
        while not self.alone and lock(self._handle, shared=True) is False:
            time.sleep(_WAIT)  # another one begins

    def __enter__(self) -> Presence:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def share(self) -> None:
        """Let others work on it too."""
        lock(self._handle, shared=True)


class Results:
    """The results in a directory.

    Args:
        directory: of results.json; made if it is not there.
        conditions: what all rows share.
        resume: go on with results that are there. overwrite: begin anew.
        alone: whether no other process works on them (Presence).

    Raises:
        OutputError: another process works on what is to be begun anew.
        OutputExistsError: there are results, and neither option is given.
        ConfigError: those that are there were found under other conditions, which are named.
        CheckpointError: the file is malformed or of a newer version.
    """

    def __init__(
        self,
        directory: Path,
        conditions: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        alone: bool = True,
    ) -> None:
        self.directory = directory
        self.path = directory / NAME
        if overwrite and not alone:
            raise OutputError(
                f"another process is at work on the comparison in {directory}",
                remedy=f"let it finish, join it ({arg('resume', True)}), or choose another directory",
            )
        with self._locked():
            refuse_existing(self.path, resume=resume, overwrite=overwrite)
            found = _read(self.path) if self.path.exists() and not overwrite else None
            if found is not None and not (alone and _holds_nothing(found)):
                _check_conditions(self.path, found["conditions"], conditions)
            else:
                empty: dict[str, Any] = {"baselines": {}, "rows": {}, "costs": {}}
                self._write({"format_version": FORMAT_VERSION, "conditions": dict(conditions), **empty})
            self._conditions = _read(self.path)["conditions"]

    def read(self) -> dict[str, Any]:
        """Return the contents of the file."""
        with self._locked():
            return _read(self.path)

    def add(self, part: str, key: str, value: Mapping[str, Any]) -> None:
        """Add an entry to "rows", "costs" or "baselines".

        Raises:
            ConfigError: another process has begun anew here, under other conditions.
        """
        with self._locked():
            contents = _read(self.path)
            if contents["conditions"] != self._conditions:
                raise ConfigError(f"{self.path} was begun anew under other conditions; choose another output directory")
            contents[part][key] = dict(value)
            self._write(contents)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether this process may work on `key`: no other one does."""
        handle = _open(self.directory / _CLAIMS / _claim_name(key))
        try:
            yield lock(handle) is not False  # None: no such locks here, and then no second process either
        finally:
            os.close(handle)

    def once(self, part: str, key: str, find: Callable[[], Mapping[str, Any]]) -> bool:
        """Find and add an entry, unless it is there or another process is at it; return whether this one did."""
        if key in self.read()[part]:
            return False
        with self.claim(f"{part} {key}") as mine:
            if not mine or key in self.read()[part]:
                return False
            self.add(part, key, find())
        return True

    def _write(self, contents: Mapping[str, Any]) -> None:
        with atomic_file(self.path, overwrite=True, kind=OWN) as temporary:
            write_json(temporary, finite(contents))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = _open(self.directory / _LOCK)
        try:
            while lock(handle) is False:
                time.sleep(_WAIT)
            yield
        finally:
            os.close(handle)


def _claim_name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any]:
    try:
        contents = read_json(path, "the results")
    except CheckpointError as error:
        raise CheckpointError(error.marked, remedy=_NO_RESULTS) from error
    version = contents.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version!r}; this spp reads {FORMAT_VERSION}")
    if not all(isinstance(contents.get(part), dict) for part in _PARTS):
        raise CheckpointError(f"{path} is malformed: it lacks {', '.join(_PARTS)}; {_NO_RESULTS}")
    for part, is_whole in (("baselines", _is_baseline), ("rows", _is_row), ("costs", _is_cost)):
        bad = [key for key, value in contents[part].items() if not (isinstance(value, dict) and is_whole(value))]
        if bad:
            raise CheckpointError(f"{path} is malformed: {part} {bad[0]!r} lacks what it must say; {_REMEDY}")
    return contents


def _holds_nothing(contents: Mapping[str, Any]) -> bool:
    return not any(contents[part] for part in _PARTS if part != "conditions")


def _is_row(row: Mapping[str, Any]) -> bool:
    whole = isinstance(row.get("contender"), str) and isinstance(row.get("diverged"), bool)
    whole &= all(is_number(row.get(name)) for name in ("lr", "seed", "steps", "trainable"))
    whole &= isinstance(row.get("environment"), Mapping) and _is_measured(row.get("test", _ANY))
    return whole and (row["diverged"] or _is_measured(row.get("validation")))


def _is_baseline(one: Mapping[str, Any]) -> bool:
    return isinstance(one.get("pattern"), str) and all(_is_measured(one.get(part)) for part in ("validation", "test"))


def _is_cost(one: Mapping[str, Any]) -> bool:
    ratios = (one.get("this_to_reference_wall"), one.get("reference_to_this_wall"))
    whole = all(isinstance(ratio, Mapping) and is_number(ratio.get("median")) for ratio in ratios)
    return whole and is_number(one.get("peak_bytes")) and isinstance(one.get("environment"), Mapping)


def _is_measured(part: object) -> bool:
    return isinstance(part, Mapping) and all(is_number(part.get(name)) for name in ("loss", "perplexity"))


def _open(path: Path) -> int:
    """Return the handle of a file to lock, made where it is not there; an OutputError where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(error, path) from error


def _check_conditions(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found, wanted = {"bos": False, **found}, {"bos": False, **wanted}  # the first files were made without
    names = {*found, *wanted} - (_NEWER - found.keys())
    names -= {name for name, content in _NAMED.items() if content in found and content in wanted}
    differing = [
        f"{arg(name)}: {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted(names)
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{path} was found under other conditions, so its rows cannot be compared with new ones: "
            f"{'; '.join(differing)}. Choose another output directory, or the same options"
        )
