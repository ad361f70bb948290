"""Commands as torchrun starts them: the first rank prints and writes, and an error of one ends all."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import spp.pruning.loop as loop
from spp.cli.main import main
from spp.errors import NonFiniteError
from tests.helpers.models import assert_same_model, prune_nm_, tiny_llama, tiny_tokenizer
from tests.helpers.ranks import values_of_ranks

FEW = ["--calibration", "text.txt", "--nsamples", "3", "--seqlen", "16", "--device", "cpu"]
COMMANDS = {
    "streamed": ["prune", "model", "one", *FEW, "--report", "one.json", "--json"],
    "in memory": ["prune", "model", "two", *FEW, "--in-memory"],
    "by magnitude": ["prune", "model", "three", "--method", "magnitude", "--in-memory", "--device", "cpu"],
    "exists": ["prune", "model", "one", *FEW],
    "fails": ["prune", "model", "four", *FEW],
    "reconstructed": ["reconstruct", "one", "five", "--dense", "model", *FEW, "--epochs", "1"],
}


def _call(arguments: list[str]) -> tuple[object, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["spp", *arguments])
        try:
            main()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def _commands(rank: int, folder: Path) -> dict[str, tuple[object, str, str]]:
    def fail(*_: object) -> None:
        raise NonFiniteError("rank 1 met an infinity")

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        found = {name: _call(arguments) for name, arguments in COMMANDS.items() if name != "fails"}
        if rank == 1:
            patch.setattr(loop, "prune_layer", fail)
        return {**found, "fails": _call(COMMANDS["fails"])}


@pytest.mark.slow
def test_the_first_rank_speaks_and_writes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} says {i * i}." for i in range(200)), encoding="utf-8")
    first, second = values_of_ranks(_commands, 2, tmp_path, group=False, delays=(0, 1))
    assert {name: (code, bool(out)) for name, (code, out, _) in first.items()} == {
        **dict.fromkeys(("in memory", "streamed", "by magnitude", "reconstructed"), (0, True)),
        **dict.fromkeys(("exists", "fails"), (1, False)),
    }
    assert all((out, err) == ("", "") for _, out, err in second.values()), second
    assert {name: code for name, (code, _, _) in second.items()} == {name: f[0] for name, f in first.items()}
    assert "one exists" in first["exists"][2] and "error: rank 1 met an infinity" in first["fails"][2]
    assert json.loads(first["streamed"][1])["wrote"] == ["one", "one.json"]
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(bool((tensor == same[1][key]).all()) for key, tensor in same[0].items())
    assert_same_model(type(tiny_llama()).from_pretrained(tmp_path / "three"), prune_nm_(tiny_llama()))
    names = ["five", "model", "one", "one.json", "text.txt", "three", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
