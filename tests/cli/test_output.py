"""Printing never fails: letters that a terminal lacks, readers that go, no streams at all; and all is given back."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spp.cli import console
from spp.cli.main import main
from spp.errors import SPPError

LETTERS = "a … × α β – 漢 \udc80"


def stream(encoding: str) -> tuple[io.BytesIO, io.TextIOWrapper]:
    """Bytes, and a strict stream into them."""
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, out: Any, err: Any) -> int:
    """What `spp ARGUMENTS` ends with, on these streams; they are the process's own again afterwards."""
    monkeypatch.setattr(sys, "argv", ["spp", *arguments])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert sys.stdout is out and sys.stderr is err, "the streams are not given back"
    return code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_an_encoding_lacks(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    (raw, out), (raw_err, err) = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(logging.getLogger("spp"), "propagate", False)  # pytest cannot report such a letter
    with console.safe_streams(), console.log(), console.step(LETTERS):
        console.say(LETTERS)
        logging.getLogger("spp").info(LETTERS)
        tqdm.write(LETTERS, file=sys.stderr)
        print(LETTERS, end="")
    assert sys.stdout is out and sys.stderr is err
    said, told = raw.getvalue().decode(encoding), raw_err.getvalue().decode(encoding)
    assert said.count("\\udc80") == 2 and told.count("\\udc80") == 4
    if encoding == "ascii":
        assert said.startswith("a ... x alpha beta - \\u6f22 \\udc80\n")
    if encoding == "latin-1":
        assert said.startswith("a ... × alpha")  # what it has stays


def test_an_error_a_warning_and_a_table_in_ascii(monkeypatch: pytest.MonkeyPatch, pruned: Path) -> None:
    (raw, out), (raw_err, err) = stream("ascii"), stream("ascii")
    assert run(monkeypatch, "inspect", str(pruned), out=out, err=err) == 0
    assert b"32x64" in raw.getvalue() and b"reading" in raw_err.getvalue()
    assert run(monkeypatch, "inspect", "/no/such/modèl…", out=out, err=err) == 1
    assert rb"error: there is no model or adapter directory /no/such/mod\xe8l..." in raw_err.getvalue()
    assert run(monkeypatch, "tune", "--help", out=out, err=err) == 0  # rich's panels
    assert run(monkeypatch, "eval", "--wïndow", out=out, err=err) == 2


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch, pruned: Path, tmp_path: Path) -> None:
    text = tmp_path / "tëxt….txt"
    text.write_text("a text " * 40)
    raw, out = stream("ascii")
    code = run(monkeypatch, "eval", str(pruned), "--text", str(text), "--window", "64", "--json", out=out, err=None)
    assert code == 0 and json.loads(raw.getvalue())["text"] == str(text)


def test_a_string_takes_everything_and_none_nothing(monkeypatch: pytest.MonkeyPatch, pruned: Path) -> None:
    out = io.StringIO()
    assert run(monkeypatch, "inspect", str(pruned), out=out, err=None) == 0
    assert "32×64" in out.getvalue()
    for nothing in (None, closed()):
        assert run(monkeypatch, "inspect", str(pruned), out=nothing, err=nothing) == 0
        assert run(monkeypatch, "inspect", "/no/such", out=nothing, err=nothing) == 1


def closed() -> io.StringIO:
    """A stream that somebody has closed."""
    made = io.StringIO()
    made.close()
    return made


class _Failing(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_reader_that_goes_ends_nothing_and_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, pruned: Path) -> None:
    assert run(monkeypatch, "inspect", str(pruned), out=_Failing(BrokenPipeError(32, "Broken pipe")), err=None) == 0
    err = io.StringIO()
    full = _Failing(OSError(28, "No space left on device"))
    assert run(monkeypatch, "inspect", str(pruned), out=full, err=err) == 1
    assert "error: standard output cannot be written: No space left on device" in err.getvalue()
    assert run(monkeypatch, "inspect", str(pruned), out=io.StringIO(), err=full) == 0  # nothing that counts is lost


def test_an_exception_passes_and_the_streams_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(SPPError, match="wrong"), console.safe_streams():
        raise SPPError("wrong")
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes and locales of POSIX")
def test_a_closed_pipe_and_a_bare_locale() -> None:
    code = [sys.executable, "-c", "from spp.cli.main import main; main()", "tune", "--help"]
    bare = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    read, write = os.pipe()
    os.close(read)  # as `| head` that has read enough
    found = subprocess.run(code, stdout=write, stderr=subprocess.PIPE, env=bare)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *code], env=bare).returncode == 0
    found = subprocess.run(code, capture_output=True, env=bare)
    assert found.returncode == 0 and b"Usage: spp tune" in found.stdout
