"""merge, eval, tune and inspect say whether a base has the values that an adapter was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spp.files import CheckpointReader, save_tensors
from tests.cli.conftest import Outcome
from tests.cli.test_commands import ok

Call = Callable[..., Outcome]
# The program prints warnings, which are errors elsewhere in the tests.
pytestmark = pytest.mark.filterwarnings("always::spp.errors.SPPWarning")
WARNING = "warning: the base's values are not those that"
UP = "model.layers.0.mlp.up_proj"


def other_values(base: Path, to: Path) -> Path:
    """The checkpoint with one layer's values doubled."""
    shutil.copytree(base, to)
    with CheckpointReader(base) as reader:
        tensors = {key: reader.tensor(key).clone() for key in reader}
    tensors[f"{UP}.weight"] *= 2
    save_tensors(to / "model.safetensors", tensors)
    return to


def said_nothing(outcome: Outcome) -> bool:
    return not any(words in outcome.out + outcome.err for words in ("base values", "base's values"))


def test_merge(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    same = ok(spp("merge", pruned, adapter, tmp_path / "same", "--strict"))
    assert said_nothing(same)
    other, out = other_values(pruned, tmp_path / "other"), tmp_path / "out"
    refused = spp("merge", other, adapter, out, "--strict")
    assert refused.code == 1 and "1 of 14 layers" in refused.err and UP in refused.err and not out.exists()
    assert "Nothing was written" in refused.err and "strict_values" not in refused.err
    found = ok(spp("merge", other, adapter, out, "--dry-run"))
    assert found.err.count(WARNING) == 1
    assert f"base values: other: they differ in 1 of 14 layers, first in {UP}" in found.out and not out.exists()
    assert "base values: other" in ok(spp("merge", other, adapter, out)).out


def test_eval(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    measure = ("--adapter", adapter, "--text", text, "--window", 64, "--max-windows", 2)
    for strict in ((), ("--strict",), ("--no-strict",)):
        same = ok(spp("eval", pruned, *measure, *strict))
        assert said_nothing(same)
    assert json.loads(ok(spp("eval", pruned, *measure, "--json")).out)["base_values"] == "same"
    assert "base_values" not in json.loads(ok(spp("eval", pruned, *measure[2:], "--json")).out)
    other = other_values(pruned, tmp_path / "other")
    refused = spp("eval", other, *measure, "--strict")
    assert refused.code == 1 and "1 of 14 layers" in refused.err and "perplexity" not in refused.out
    for strict in ((), ("--no-strict",)):
        found = ok(spp("eval", other, *measure, *strict))
        assert found.err.count(WARNING) == 1
        assert f"base values: other: they differ in 1 of 14 layers, first in {UP}" in found.out
    values = json.loads(ok(spp("eval", other, *measure, "--json")).out)
    assert values["base_values"] == "other" and UP in values["base_values_note"]
    narrow = ok(spp("eval", pruned, *measure, "--dtype", "bfloat16", "--strict"))
    assert "base values: not comparable: trained on float32, this one is bfloat16" in narrow.out
    assert "warning: " not in narrow.err


def test_other_zeros_stay_refused(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    other = other_values(pruned, tmp_path / "other")
    with CheckpointReader(other) as reader:
        tensors = {key: reader.tensor(key).clone() for key in reader}
    tensors[f"{UP}.weight"][0, :8] = 0
    save_tensors(other / "model.safetensors", tensors)
    measure = ("--adapter", adapter, "--text", text, "--window", 64, "--max-windows", 2)
    refused = spp("eval", other, *measure)
    assert refused.code == 1 and "--no-strict" in refused.err
    found = ok(spp("eval", other, *measure, "--no-strict"))
    assert found.err.count("warning: ") == 1 and "base values: other" in found.out


def test_inspect(spp: Call, adapter: Path, tmp_path: Path) -> None:
    assert "14 (float32)" in ok(spp("inspect", adapter)).out
    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    config = json.loads((old / "adapter_config.json").read_text())
    del config["base_values"], config["base_forms"]
    (old / "adapter_config.json").write_text(json.dumps(config))
    assert any(line.split()[:3] == ["base", "values", "unknown"] for line in ok(spp("inspect", old)).out.splitlines())


@pytest.mark.slow
def test_tune_goes_on_with_other_values_only_if_it_may(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    base, run = Path(shutil.copytree(pruned, tmp_path / "base")), tmp_path / "run"
    options = ("--data", text, "--steps", 3, "--batch-size", 2, "--block-length", 64, "--window", 64)
    options = (*options, "--eval-windows", 2, "--device", "cpu", "--no-progress")
    ok(spp("tune", base, run, *options))
    merged = ok(spp("merge", base, run / "adapter", tmp_path / "merged", "--strict"))
    assert said_nothing(merged)
    assert said_nothing(ok(spp("tune", base, run, *options, "--resume", "--strict")))
    shutil.copy(other_values(pruned, tmp_path / "other") / "model.safetensors", base / "model.safetensors")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    refused = spp("tune", base, run, *options, "--resume", "--strict")
    assert refused.code == 1 and "1 of 14 layers" in refused.err
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert WARNING in ok(spp("tune", base, run, *options, "--resume")).err
    refused = spp("tune", base, tmp_path / "pst", *options, "--method", "pst", "--pattern", "2:4", "--strict")
    assert refused.code == 1 and "--strict" in refused.err


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_report_says_what_cannot_be_compared(
    spp: Call, pruned: Path, adapter: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    narrow = Path(shutil.copytree(pruned, tmp_path / "narrow"))
    with CheckpointReader(pruned) as reader:
        save_tensors(narrow / "model.safetensors", {key: reader.tensor(key).to(dtype) for key in reader})
    found = ok(spp("merge", narrow, adapter, tmp_path / "out", "--strict"))
    assert "base values: not comparable: trained on float32, this one is bfloat16" in found.out
    assert WARNING not in found.err
