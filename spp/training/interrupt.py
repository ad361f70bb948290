"""Ctrl-C and SIGTERM during training: finish the step, save a checkpoint to resume from, stop."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from spp.errors import Marked, arg

logger = logging.getLogger(__name__)

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

    The second one is handled as it was before, so that impatience still works. Outside the main thread nothing is
    installed, because Python allows it there only.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers that were there before."""
        self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
        """Ask the Trainer to save and stop."""
        if self.received is not None:
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
