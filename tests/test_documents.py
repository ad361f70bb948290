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


def missing_tests(text: str) -> list[str]:
    """Return the tests of a table, path::name, that are not there."""
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    return [f"{p}::{n}" for p, n in named if not re.search(rf"^def {n}\(", (ROOT / p).read_text("utf-8"), re.M)]


def reports_of(text: str) -> set[str]:
    """Return the reports that a text names: owner/repository#number, and further numbers behind a comma or an and."""
    named = re.findall(r"([\w.-]+/[\w.-]+)#(\d+)((?:(?:, | and )#\d+)*)", text)
    return {f"{where}#{n}" for where, first, rest in named for n in (first, *re.findall(r"\d+", rest))}


def test_public_reports_have_their_tests() -> None:
    table = (ROOT / "tests/reports.md").read_text("utf-8")
    assert missing_tests(table) == []
    rows = [line for line in table.splitlines() if line.startswith("| ") and "#" in line]
    assert len(rows) >= 40 and all(reports_of(row) and len(row.split(" | ")) == 4 for row in rows)
    cited = reports_of(
        "\n".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__))
    )
    assert sorted(cited - reports_of(table)) == []


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
    assert missing_tests(
        "tests/test_documents.py::test_what_is_not_there_is_found, tests/test_documents.py::test_no"
    ) == ["tests/test_documents.py::test_no"]
    assert reports_of("one/two#3, #4 and #5; a#6") == {"one/two#3", "one/two#4", "one/two#5"}
    assert missing_names("`LinearHost`, `spp.wrap` and `no_such_name`") == ["no_such_name"]
