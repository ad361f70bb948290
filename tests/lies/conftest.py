"""The truth, made once."""

from __future__ import annotations

import pytest

from tests.lies.made import Made


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made.into(tmp_path_factory.mktemp("truth"))
