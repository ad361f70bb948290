"""spp export packs and unpacks, and every command that takes a model takes a packed one or says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Call = Callable[..., Outcome]


@pytest.fixture
def packed(spp: Call, pruned: Path, tmp_path: Path) -> Path:
    found = spp("export", pruned, tmp_path / "packed", "--packed")
    assert found.code == 0, found.err
    return tmp_path / "packed"


@pytest.mark.sampled(1)
def test_there_and_back(spp: Call, pruned: Path, packed: Path, tmp_path: Path) -> None:
    refused = spp("export", pruned, packed, "--packed")
    assert refused.code == 1 and "--overwrite" in refused.err
    found = spp("export", pruned, packed, "--packed", "--overwrite", "--strict-bits")
    lines = found.out.splitlines()
    assert found.code == 0 and f"wrote {packed}" in found.out
    assert any(line.split()[:3] == ["self_attn.q_proj", "2", "2:4"] for line in lines)
    assert any(line.startswith("all weights: ") for line in lines)
    assert "model.layers.1.self_attn.q_proj.weight" in spp("export", packed, tmp_path / "dense", "--dense", "--all").out
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    assert "exactly the zeros" in spp("verify", pruned, packed).out
    assert "is what its certificate says" in spp("verify", packed).out
    assert spp("inspect", packed).out == spp("inspect", pruned).out


def test_what_is_refused(spp: Call, pruned: Path, packed: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ((pruned, out), "pass one of --packed and --dense"),
        ((packed, out, "--packed", "--dense"), "pass one of"),
        ((packed, out, "--dense", "--strict-bits"), "--strict-bits goes with --packed"),
        ((packed, out, "--packed"), "packed already; spp export DIRECTORY OUTPUT --dense makes it dense"),
        ((pruned, out, "--dense"), "not packed; spp export DIRECTORY OUTPUT --packed packs it"),
    ):
        found = spp("export", *arguments)
        assert found.code == 1 and message in found.err, found.err
    for command in (("merge", packed, adapter, out), ("prune", packed, out, "--method", "magnitude")):
        found = spp(*command)
        assert found.code == 1 and "is packed; spp export DIRECTORY OUTPUT --dense gives" in found.err, found.err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.sampled(1)
def test_eval_and_tune_take_a_packed_model(spp: Call, pruned: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    measure = ("--text", text, "--window", 64, "--max-windows", 2, "--json", "--device", "cpu")
    found, expected = (json.loads(spp("eval", model, *measure).out) for model in (packed, pruned))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    run = tmp_path / "run"
    options = ("--data", text, "--steps", 1, "--r", 2, "--block-length", 16, "--window", 64, "--device", "cpu")
    tuned = spp("tune", packed, run, *options, "--batch-size", 1, "--eval-windows", 1, "--no-progress")
    assert tuned.code == 0, tuned.err
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["packed"] is True
    assert spp("merge", pruned, run / "adapter", tmp_path / "merged").code == 0
    assert spp("verify", packed, tmp_path / "merged").code == 0
