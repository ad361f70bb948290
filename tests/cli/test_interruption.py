"""Ctrl-C and SIGTERM: what was interrupted and how to go on is said, and the exit code is 130."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from spp.cli import console
from spp.cli.main import main
from spp.training.callbacks import ProgressBar, read_log
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer


class TerminatedAtStepTwo(ProgressBar):
    """Stands in for the progress bar."""

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        super().on_step_end(args, state, control, **options)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_tune_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune_nm_(tiny_llama()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    words = ["spp", "tune", str(tmp_path / "model"), str(tmp_path / "run"), "--data", str(tmp_path / "text.txt")]
    words += ["--block-length", "32", "--window", "32", "--steps", "4", "--device", "cpu"]

    def run(arguments: list[str]) -> object:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit_:
            main()
            raise SystemExit(0)
        return exit_.value.code

    with monkeypatch.context() as patch:
        patch.setattr("spp.training.tuning.ProgressBar", TerminatedAtStepTwo)
        assert run(words) == 130
    assert "--resume" in " ".join(capsys.readouterr().err.split())
    assert run([*words, "--resume"]) == 0
    assert [entry["step"] for entry in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4]


def test_a_step_says_that_it_was_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), console.step("merging a into b"):
        raise KeyboardInterrupt
    assert "merging a into b: interrupted after " in capsys.readouterr().err
