"""spp certify writes what spp verify checks; spp eval loads an adapter onto other zeros only when told to."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from spp.files import CheckpointReader, save_tensors
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import ok

Call = Callable[..., Outcome]


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    shutil.copytree(pruned, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_certificate(spp: Call, copy: Path) -> None:
    refused(spp("verify", copy), "sparsity.json", "spp certify DIRECTORY")
    found = ok(spp("certify", copy))
    assert f"wrote {copy / 'sparsity.json'}" in found.out and "2:4" in found.out
    assert "is what its certificate says" in ok(spp("verify", copy)).out
    refused(spp("verify", copy, "--deep"), "spp certify DIRECTORY --deep")
    refused(spp("certify", copy, "--deep"), "sparsity.json exists", "--overwrite")
    ok(spp("certify", copy, "--deep", "--overwrite"))
    ok(spp("verify", copy, "--deep"))


def test_a_base(spp: Call, copy: Path, pruned: Path, dense: Path) -> None:
    refused(spp("certify", copy, "--base", dense), "q_proj")
    assert not (copy / "sparsity.json").exists()
    ok(spp("certify", copy, "--base", pruned))
    assert json.loads((copy / "sparsity.json").read_text())["base"]["name_or_path"] == str(pruned)


def test_a_directory_that_is_none(spp: Call, tmp_path: Path) -> None:
    refused(spp("certify", tmp_path / "none"), str(tmp_path / "none"))


# public report: certify a directory in which there is nothing to certify (every weight stored by another format)
def test_a_checkpoint_that_stores_its_projections_otherwise(spp: Call, copy: Path) -> None:
    def as_gptq(wanted: str) -> None:
        with CheckpointReader(copy) as reader:
            tensors = {key: reader.tensor(key).clone() for key in reader}
        of = {key: key.replace("proj.weight", "proj.qweight") if wanted in key else key for key in tensors}
        save_tensors(copy / "model.safetensors", {of[key]: tensor for key, tensor in tensors.items()})

    as_gptq("layers.1.")
    said = "stored as qweight (GPTQ or AWQ): model.layers.1.mlp.down_proj"
    refused(spp("certify", copy), "of its 14 projections cannot be read", said)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = ok(spp("inspect", copy))
    assert "warning: of" in shown.err and said in shown.err
    refused(spp("verify", copy, copy), "cannot be compared in 7 tensors", "its zeros cannot be read")
    as_gptq("")
    for command in ("certify", "verify", "inspect"):
        refused(spp(command, copy), "holds no projection weight that can be read: 14 stored as qweight")
    assert not (copy / "sparsity.json").exists()


def test_an_adapter_of_other_zeros(spp: Call, dense: Path, adapter: Path, text: Path) -> None:
    arguments = ("eval", dense, "--adapter", adapter, "--text", text, "--window", 128)
    refused(spp(*arguments), "--no-strict")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "warning: the zeros of the base differ" in ok(spp(*arguments, "--no-strict")).err
