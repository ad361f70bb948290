"""spp reconstruct, and spp prune --reconstruct: what is written, what is said, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spp.cli import reconstruct as command
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import ok

Call = Callable[..., Outcome]
WINDOWS = ("--nsamples", 4, "--seqlen", 64)


@pytest.fixture
def pruned(spp: Call, dense: Path, tmp_path: Path) -> Path:
    ok(spp("prune", dense, tmp_path / "pruned", "--method", "magnitude"))
    return tmp_path / "pruned"


def test_a_pruned_checkpoint_is_repaired(
    spp: Call, dense: Path, text: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--dense", dense, "--calibration", text, *WINDOWS, "--epochs", 3, "--region", "block")
    output, report = tmp_path / "out", tmp_path / "report.json"
    monkeypatch.setattr(command, "load_and_reconstruct", None)
    found = ok(spp("reconstruct", pruned, output, *arguments, "--report", report))
    assert f"wrote {output}" in found.out and "relative errors on 1 held-out window" in found.out
    told = json.loads(report.read_text())
    assert told["options"]["region"] == "block" and told["options"]["epochs"] == 3 and told["windows"] == 4
    assert all(block["after"] < block["before"] for block in told["blocks"])
    assert "exactly the zeros" in ok(spp("verify", pruned, output)).out
    refused(spp("reconstruct", pruned, output, *arguments), f"{output} exists")
    monkeypatch.undo()
    broken = tmp_path / "pickled"  # which cannot be streamed
    shutil.copytree(pruned, broken)
    torch.save(load_file(pruned / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    assert ": loading both models" in ok(spp("reconstruct", broken, tmp_path / "other", *arguments)).err
    one, other = (load_file(path / "model.safetensors") for path in (output, tmp_path / "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_is_written_that_merge_and_inspect_read(
    spp: Call, dense: Path, text: Path, pruned: Path, tmp_path: Path
) -> None:
    arguments = ("--dense", dense, "--calibration", text, *WINDOWS, "--epochs", 3, "--bos", "always", "--json")
    found = ok(spp("reconstruct", pruned, tmp_path / "out", *arguments, "--train", "adapter", "--rule", "hira"))
    told = json.loads(found.out)
    assert told["bos"] and told["options"]["rule"] == "hira"
    assert all(block["after"] < block["before"] for block in told["blocks"])
    assert "hira" in ok(spp("inspect", tmp_path / "out")).out
    ok(spp("merge", pruned, tmp_path / "out", tmp_path / "merged"))
    assert "exactly the zeros" in ok(spp("verify", pruned, tmp_path / "merged")).out


@pytest.mark.slow
def test_prune_reconstructs_as_it_goes(spp: Call, dense: Path, text: Path, tmp_path: Path) -> None:
    options = ("--calibration", text, *WINDOWS, "--reconstruct", "--reconstruct-epochs", 2, "--reconstruct-lr", 1e-3)
    found = ok(spp("prune", dense, tmp_path / "stream", *options, "--report", tmp_path / "report.json"))
    assert "reconstruction: relative error" in found.out
    ok(spp("prune", dense, tmp_path / "memory", *options, "--in-memory"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "stream"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((tmp_path / "report.json").read_text())["reconstruction"]["options"]["epochs"] == 2
    assert "2:4" in ok(spp("verify", tmp_path / "stream")).out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--reconstruct-epochs", 2), "--reconstruct-epochs is an option of RECONSTRUCT: add --reconstruct"),
        (("--method", "magnitude", "--reconstruct"), "--reconstruct needs calibration data: pass --calibration"),
        (
            ("--reconstruct", "--reconstruct-train", "adapter"),
            "--reconstruct is to train an adapter",
        ),
    ],
)
def test_prune_refuses(spp: Call, dense: Path, tmp_path: Path, options: tuple[Any, ...], complaint: str) -> None:
    refused(spp("prune", dense, tmp_path / "out", *options), complaint)


def test_reconstruct_refuses(spp: Call, dense: Path, text: Path, pruned: Path, tmp_path: Path) -> None:
    needed = ("--dense", dense, "--calibration", text)
    refused(spp("reconstruct", pruned, tmp_path / "out", *needed, "--lr", 0), "--lr is 0.0; it must be")
    (tmp_path / "short.txt").write_text("short")
    refused(
        spp("reconstruct", pruned, tmp_path / "out", "--dense", dense, "--calibration", tmp_path / "short.txt"),
        "too short",
    )
    refused(spp("reconstruct", pruned, pruned / "out", *needed), "lies inside the pruned model")
