"""The directory of a tuning run: what is in it, and who may write there.

.lock           while a process is at work here: which
config.json     format, version, the options of the run, counts and hash of its data, hash of its teacher, peak memory
log.jsonl       one object a log
checkpoints/    checkpoint-N, to resume from
adapter/        the final adapter
base/           after mask updates: the pruned model with its final masks, which the adapter belongs to
eval.json       perplexity before and after
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from spp._version import __version__
from spp.configs.checks import finite, is_number
from spp.configs.tuning import TuneConfig
from spp.distributed.ranks import is_first, world
from spp.errors import CheckpointError, ConfigError, OutputExistsError, arg
from spp.files import atomic_file, output_error, read_json, recover, require_directory, require_replaceable, write_json
from spp.files.leftovers import LOCK_NAME, FolderLock
from spp.files.provenance import Provenance
from spp.files.recognised import ADAPTER, MODEL, OWN, TRAININGS

FORMAT = "spp-tune-1"

# Options that do not change what is computed, and so may differ when a run is resumed.
_FREE = (
    *("output_dir", "overwrite", "resume", "strict_values", "progress", "log_every", "save_every", "save_limit"),
    "show_rows",
)


class RunDirectory:
    """Paths in the directory of a run; creating this object checks, and writes nothing.

    Within `with`, no other process works there: one that tries is refused. The directory of an earlier run is locked
    from the start, a new one when the run begins. Of several ranks the first one checks, locks and writes; to the
    others the directory is what the first finds or makes.

    Args:
        config: options of the run.

    Raises:
        OutputError: another process is at work there.
        OutputExistsError: the directory holds something, and neither `overwrite` nor `resume` fits that; or what
            `overwrite` would replace holds other things than a run writes, which are named.
    """

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir)
        self.config_file = self.path / "config.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.base = self.path / "base"
        self.eval_file = self.path / "eval.json"
        self._lock: FolderLock | None = None
        self.earlier = self._check() if is_first() else None

    def __enter__(self) -> RunDirectory:
        if self.earlier is not None:
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _take(self) -> None:
        """Lock the directory, and look again at what is in it: another process may have been there meanwhile."""
        if self._lock is None:
            self._lock = FolderLock(
                self.path,
                f"another process is at work in {self.path}",
                f"let it finish, or stop it, or choose another {arg('output_dir')}",
            )
            self.earlier = self._check()

    def begin(self, data: dict[str, Any], teacher: dict[str, Any] | None = None) -> None:
        """Create the directory, or compare with the run that is resumed.

        Args:
            data: counts and hash of the training data.
            teacher: its hash; None without one.

        Raises:
            ConfigError: a resumed run had other options, other data or another teacher.
            OutputError: the directory cannot be written, or another process is at work there.
        """
        if not is_first():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise output_error(error, self.path) from error
        if self.earlier is not None and self.config.resume:
            self._compare(self.earlier, data, teacher)
            return
        try:
            if self.earlier is not None:  # overwrite: only what a run writes, and its config.json last
                self._require_replaceable()
                for path in (self.checkpoints, self.adapter, self.base):
                    _remove(path)
                for path in (self.log, self.eval_file, self.config_file):
                    path.unlink(missing_ok=True)
            options = self.config.to_dict()
            made = {"format": FORMAT, "spp_version": __version__, **Provenance.here().to_dict()}
            told = {"data": data} if teacher is None else {"data": data, "teacher": teacher}
            self._write(
                self.config_file, {**made, "ranks": world(), "tune": options, **told}
            )  # first: it says what this is
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(error, self.path) from error

    def write_eval(self, values: dict[str, Any]) -> None:
        """Write eval.json."""
        if is_first():
            self._write(self.eval_file, values)

    def read_eval(self) -> dict[str, Any]:
        """Return eval.json, or {} where there is none yet."""
        return read_json(self.eval_file, "the run's perplexities") if self.eval_file.exists() else {}

    def write_peak(self, peak: int) -> None:
        """Note in config.json the peak memory in bytes; of a resumed run, the largest of its processes'."""
        if not is_first():
            return
        values = read_json(self.config_file, "the run's config")
        earlier: Any = values.get("peak_bytes")
        if is_number(earlier):
            peak = max(peak, int(earlier))
        self._write(self.config_file, {**values, "peak_bytes": peak})

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        with atomic_file(path, overwrite=True, kind=OWN) as temporary:
            write_json(temporary, finite(values))

    def _check(self) -> dict[str, Any] | None:
        """Return config.json of the run that is here already, or None."""
        if not self.path.exists():
            return None
        require_directory(self.path, "the run needs")
        recover(self.config_file)  # a run that was killed when it began leaves its lock, and part of this file
        if all(path.name == LOCK_NAME for path in self.path.iterdir()):
            return None
        try:
            earlier = read_json(self.config_file, "the run's config")
        except CheckpointError:
            earlier = {}
        if earlier.get("format") != FORMAT:
            raise OutputExistsError(
                f"{self.path} is not empty and no earlier run of this kind (its config.json does not say {FORMAT}): "
                f"choose another {arg('output_dir')}; nothing there is overwritten"
            )
        if not (self.config.overwrite or self.config.resume):
            raise OutputExistsError(
                f"{self.path} holds an earlier run",
                remedy=f"continue it with {arg('resume', True)}, replace it with {arg('overwrite', True)}, or choose "
                f"another {arg('output_dir')}",
            )
        if self.config.overwrite:
            self._require_replaceable()
        return earlier

    def _require_replaceable(self) -> None:
        model = self.config.model
        copies = [] if model is None else [model]
        for path, kind in ((self.checkpoints, TRAININGS), (self.adapter, ADAPTER), (self.base, MODEL)):
            require_replaceable(path, copies, kind=kind)

    def _compare(self, earlier: dict[str, Any], data: dict[str, Any], teacher: dict[str, Any] | None) -> None:
        defaults = {field.name: field.default for field in fields(TuneConfig)}  # options that are newer than the run
        before, now = {**defaults, **dict(earlier.get("tune") or {})}, self.config.to_dict()
        if "bos" not in (earlier.get("tune") or {}):  # such a run had no BOS in its windows, as its data tell
            before["bos"] = now["bos"]
        ranks = int(earlier.get("ranks", 1))
        if before["batch_size"] * ranks == now["batch_size"] * world():
            before["batch_size"] = now["batch_size"]  # the same rows in each step, on another number of ranks
        elif ranks != world():
            raise ConfigError(
                f"the run in {self.path} took {before['batch_size']} rows on each of {ranks} ranks, and cannot go on "
                f"with {now['batch_size']} on each of {world()}",
                remedy=f"pass {arg('batch_size', ...)} so that ranks × rows is {before['batch_size'] * ranks} again",
            )
        differing = [
            f"{arg(name)}: {before.get(name)!r} then, {now.get(name)!r} now"
            for name in sorted(set(before) | set(now))
            if name not in _FREE and before.get(name) != now.get(name)
        ]
        if differing:
            raise ConfigError(
                f"the run in {self.path} cannot be resumed with other options:\n  " + "\n  ".join(differing) + "\n"
                f"use the same options, or {arg('overwrite', True)} to start anew"
            )
        if earlier.get("teacher") != teacher:
            raise ConfigError(
                f"the run in {self.path} cannot be resumed: its teacher was another then ({earlier.get('teacher')}) "
                f"than now ({teacher})",
                remedy=f"learn from the same teacher, or use {arg('overwrite', True)} to start anew",
            )
        if {"bos": False, **(earlier.get("data") or {})} != {"bos": False, **data}:
            raise ConfigError(
                f"the run in {self.path} cannot be resumed: its training data was another then ({earlier.get('data')}) "
                f"than now ({data})",
                remedy=f"restore the data (a run of an earlier version, without BOS in its windows: "
                f"{arg('bos', 'never')}), or use {arg('overwrite', True)} to start anew",
            )


def _remove(path: Path) -> None:
    """Remove a folder; of a link to one, what is in it: the link stays."""
    if path.is_symlink():
        for inner in path.iterdir() if path.exists() else ():
            _remove(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
    elif path.exists():
        shutil.rmtree(path)
