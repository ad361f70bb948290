"""The options of a benchmark: what is wrong is said before anything is measured."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks import step
from benchmarks.harness import write_rows
from spp.errors import OutputExistsError, SPPError

TINY = ("--shape", "tiny")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(("--rounds", "0"), "--rounds"), (("--tokens", "0"), "--tokens"), (("--device", "abacus"), "abacus")],
)
def test_a_wrong_option_is_named(wrong: tuple[str, str], said: str) -> None:
    with pytest.raises(SPPError, match=said):
        step.main([*TINY, *wrong])


def test_rows_that_are_there_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("mine")
    with pytest.raises(SPPError, match=r"rows\.json.*overwrite"):
        step.main([*TINY, "--out", str(path)])
    assert path.read_text() == "mine"


def test_rows_are_overwritten_by_rows_alone_and_when_asked(tmp_path: Path) -> None:
    path, one, other = tmp_path / "rows.json", *({"a": a, "device": "cpu", "versions": {}} for a in (1, 2))
    write_rows([one], path, overwrite=False)
    with pytest.raises(OutputExistsError):
        write_rows([other], path, overwrite=False)
    assert json.loads(path.read_text()) == {"rows": [one]}
    write_rows([other], path, overwrite=True)
    assert json.loads(path.read_text()) == {"rows": [other]}
    path.write_text('{"rows": [{"text": "mine"}]}')
    with pytest.raises(OutputExistsError, match="no file of measurements"):
        write_rows([one], path, overwrite=True)
    assert "mine" in path.read_text()


@pytest.mark.slow
def test_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    options = ("--batch", "1", "--tokens", "8", "--rounds", "2", "--warmup", "1", "--rank", "4", "--no-memory")
    step.main([*TINY, *options, "--contenders", "spp", "spp-input-dropout", "--out", str(path)])
    assert f"wrote {path}" in capsys.readouterr().out
    assert [row["contender"] for row in json.loads(path.read_text())["rows"]] == ["spp", "spp-input-dropout"]


def test_help_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--help"])
    assert "usage: python -m benchmarks.step" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(Path(step.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_runs_when_all_of_its_file_is_defined(path: Path) -> None:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    assert not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in nodes[:-1])
