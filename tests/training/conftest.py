"""One finished run of each kind, to be looked at by many tests, and copies of it for those that go on with it."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

from spp.training import SPPTrainer
from tests.training.helpers import TEXT, trainer


@pytest.fixture(autouse=True)
def _what_is_there_is_no_garbage() -> None:
    """Trainers collect garbage at every start, which costs more than a small run unless older objects are left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SPPTrainer:
    """A run of six steps with a checkpoint every two; for reading only."""
    made = trainer(tmp_path_factory.mktemp("finished"), save_strategy="steps", save_steps=2)
    made.train()
    return made


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text to train on; for reading only."""
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def checkpoints(finished: SPPTrainer, tmp_path: Path) -> Path:
    """A copy of what that run wrote."""
    return Path(shutil.copytree(finished.args.output_dir, tmp_path / "finished"))
