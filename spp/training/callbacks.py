"""The callbacks of a tuning run: log.jsonl, a progress bar, and a stop on Ctrl-C or SIGTERM."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from spp.distributed.ranks import is_first
from spp.distributed.sums import largest
from spp.errors import DataError, Marked, NonFiniteError, arg
from spp.files import atomic_file, output_error
from spp.files.recognised import OWN

logger = logging.getLogger(__name__)

_FIELDS = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "sparsity": "sparsity"}


class LogFile(TrainerCallback):
    """Appends one JSON object to log.jsonl for each log: step, loss, lr, grad_norm, sparsity, seconds.

    `seconds` is the time spent in training up to that line, that of the runs before an interruption included.

    Args:
        path: the file. Of several ranks the first one writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = is_first()
        logged = read_log(path)
        self.seconds = self._before = logged[-1]["seconds"] if logged else 0.0
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Drop the lines after the step that training starts from: a killed run logs steps that it never saved."""
        kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
        self._before = self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._start = time.perf_counter()
        if not self._writes:
            return
        with atomic_file(self.path, overwrite=True, kind=OWN) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Take the time."""
        self.seconds = round(self._before + time.perf_counter() - self._start, 3)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **options: Any) -> None:
        """Write a line.

        Raises:
            NonFiniteError: the loss or the gradient's norm is NaN or infinite.
        """
        if not logs or "loss" not in logs:
            return
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if bad:
            raise NonFiniteError(
                f"{bad[0]} is {logs[bad[0]]} at step {state.global_step}: training diverged; use a lower "
                f"{arg('lr')}, {arg('max_grad_norm')} above 0, or bf16 / float32 instead of float16. "
                f"Earlier checkpoints are intact"
            )
        if not self._writes:
            return
        entry: dict[str, float] = {ours: logs[theirs] for theirs, ours in _FIELDS.items() if theirs in logs}
        line = json.dumps({"step": state.global_step, **entry, "seconds": self.seconds})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise output_error(error, self.path) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log.jsonl; a last line that a kill cut off is left out.

    Raises:
        DataError: a line is no entry of a log; the message has its number.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # what follows the last newline is empty or cut off
    entries = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise DataError(f"{path}, line {number}: not a line of a training log")
        entries.append(entry)
    return entries


class ProgressBar(TrainerCallback):
    """A bar on standard error with the last loss.

    Args:
        show: True, False, or None: if standard error is a terminal.
    """

    def __init__(self, show: bool | None = None) -> None:
        self._show = (sys.stderr.isatty() if show is None else show) and is_first()
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Open the bar at the step that training starts from."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="tuning", unit="step", disable=not self._show
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Advance."""
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **options: Any) -> None:
        """Show the loss."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Close the bar."""
        self._bar.close()


# ---- Ctrl-C and SIGTERM: finish the step, save a checkpoint to resume from, stop.

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(Marked, KeyboardInterrupt):
    """Training was stopped by a signal after a resumable checkpoint was saved.

    A KeyboardInterrupt, so that nothing takes it for an error and goes on.

    Args:
        signal_number: SIGINT or SIGTERM.
        checkpoint: the checkpoint that was saved.
        step: optimizer steps done.
    """

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        self.signal_number = signal_number
        self.checkpoint = checkpoint
        self.step = step
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; saved {checkpoint}",
            remedy=f"run the same again with {arg('resume', True)} to continue",
        )


class StopOnSignal(TrainerCallback):
    """A Trainer callback and a context manager: inside it, the first signal asks for a stop after the current step.

    Several ranks agree on it in each step. The second signal is handled as it was before, so that impatience still
    works. Outside the main thread nothing is installed, because Python allows it there only.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there before."""
        self._restore()

    def agree(self) -> int | None:
        """Return the signal that any rank got, the same on all; each calls this at the same point.

        One that comes while the ranks ask each other is kept for the next call: the others do not know of it yet.
        """
        found = largest(self.received or 0)
        if found:
            self.received = found
        return found or None

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
        """Ask the Trainer to save and stop; of several ranks all, after the step in which one got a signal."""
        if self.agree() is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        logger.warning(
            "%s: finishing this step and saving a checkpoint; once more stops at once", signal.Signals(number).name
        )

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
