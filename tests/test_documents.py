"""ARCHITECTURE.md and CONTRIBUTING.md name files, rooms and names that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_architecture import LEVELS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "CHANGELOG.md")
SOURCE = "\n".join(p.read_text("utf-8") for d in ("spp", "benchmarks") for p in sorted((ROOT / d).rglob("*.py")))
MARKERS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def missing_files(text: str) -> list[str]:
    """Return the paths that a text names and neither the checkout nor spp/ has."""
    named = re.findall(r"(?<![\w./<])((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|json|png|c))?)(?![\w/])", text)
    ours = ("spp/", "tests/", "benchmarks/", "examples/", *(f"{room}/" for room in LEVELS))
    return [n for n in named if n.startswith(ours) and not any((base / n).exists() for base in (ROOT, ROOT / "spp"))]


def missing_names(text: str) -> list[str]:
    """Return the names of the code, in backticks, that the source does not have."""
    named = re.findall(r"`([A-Za-z_][\w.]*)`", text)
    return [n for n in named if not re.search(rf"\b{re.escape(n.rpartition('.')[2])}\b", SOURCE + MARKERS)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_are_there(name: str) -> None:
    assert missing_files((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_names_that_a_document_names_are_there(name: str) -> None:
    assert missing_names((ROOT / name).read_text(encoding="utf-8")) == []


def test_the_rooms_have_their_levels() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    told = {room.rstrip("/"): int(level) for level, rooms in rows for room in re.findall(r"`([\w/]+)`", rooms)}
    assert told == LEVELS


def test_what_is_not_there_is_found() -> None:
    assert missing_files("see spp/rules/adapter.py, `masks/nowhere.py`, spp/nowhere/ and e.g. cp -r a/b.py") == [
        "masks/nowhere.py",
        "spp/nowhere/",
    ]
    assert missing_names("`LinearHost`, `spp.wrap` and `no_such_name`") == ["no_such_name"]
