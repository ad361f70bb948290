"""Trainers collect garbage at every start, which costs more than a small run unless what is imported is left out."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    gc.collect()
    gc.freeze()
