"""The versions that spp works with are those of pyproject.toml, and others are refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spp.errors import DependencyError
from spp.supported import RANGES, numbers, require_supported

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_ranges_are_those_of_the_package() -> None:
    for package, (oldest, beyond) in RANGES.items():
        assert f'"{package}>={oldest},<{beyond}"' in PYPROJECT


@pytest.mark.parametrize(
    ("package", "version", "works"),
    [
        ("torch", "2.7.1", False),
        ("torch", "2.8.0+cpu", True),
        ("torch", "3.0.0", False),
        ("transformers", "4.57.0", False),
        ("transformers", "5.1.0", True),
        ("transformers", "5.23.0.dev0", True),
        ("transformers", "6.0.0", False),
    ],
)
def test_versions(package: str, version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"torch": "2.13.0", "transformers": "5.23.0", package: version}
    monkeypatch.setattr("importlib.metadata.version", inside.__getitem__)
    if works:
        require_supported()
        return
    oldest, beyond = RANGES[package]
    told = f"spp does not work with {package} {version}: pip install '{package}>={oldest},<{beyond}'"
    with pytest.raises(DependencyError, match=re.escape(told)):
        require_supported()


def test_numbers() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("5.1") == (5, 1)
