"""One pruned checkpoint and one adapter, made once; tests that change them copy them first."""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import spp
from spp.certifying.save import save_model
from tests.helpers.checkpoints import pruned_model, wrapped_model
from tests.helpers.models import tiny_tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_model(pruned_model(), folder / "base", tokenizer=tiny_tokenizer())
    spp.save_adapter(wrapped_model(), folder / "adapter")
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """gc.get_objects() tells of objects from here on, and takes no time for the hundred thousands that there are."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, also where the shell that started this in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
