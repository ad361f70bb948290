"""The memory benchmark counts what autograd keeps, and measures every contender in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import harness, memory, trained
from benchmarks.harness import saved_bytes
from spp.wrapping.wrap import adapter_layers
from tests.benchmarks.children import run_here


def test_saved_bytes_count_memory_once_and_no_parameters() -> None:
    module = nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: module(x), module) == 5 * 8 * 4  # for dW
    assert saved_bytes(lambda: module(x) * module(x), module, [x]) == 2 * 5 * 4 * 4  # both factors, and X not
    assert saved_bytes(lambda: module(x), module, [x]) == 0


@pytest.mark.slow
def test_rows_of_children(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "in_child", run_here)
    out, chart = tmp_path / "rows.json", tmp_path / "chart.png"
    threads = str(torch.get_num_threads())
    run = ["--shape", "tiny", "--batch", "2", "--tokens", "64", "--rank", "4", "--threads", threads]
    memory.main([*run, "--contenders", "spp", "spp-low-memory", "--out", str(out), "--plot", str(chart)])
    spp, low = json.loads(out.read_text())["rows"]
    assert spp["reference_to_this_peak"] == 1.0
    assert low["saved_bytes"] < 0.9 * spp["saved_bytes"]
    assert low["reference_to_this_saved"] == spp["saved_bytes"] / low["saved_bytes"]
    for row in (spp, low):
        assert row["step_bytes"] == row["peak_bytes"] - row["rest_bytes"]
        assert {"device", "dtype", "threads", "versions", "batch", "tokens", "model", "rank"} <= set(row)
    assert "spp-low-memory" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_step_that_needs_no_more_memory_has_a_ratio_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(
        [{"rest_bytes": 5, "peak_bytes": 5, "saved_bytes": 0}, {"rest_bytes": 5, "peak_bytes": 8, "saved_bytes": 2}]
    )
    monkeypatch.setattr(harness, "in_child", lambda module, arguments: next(found))
    none, three = memory.measure(memory.parse(["--shape", "tiny", "--contenders", "spp", "spp-packed"]))
    assert (none["step_bytes"], none["reference_to_this_step"]) == (0, 0.0)
    assert (three["this_to_reference_step"], three["this_to_reference_peak"]) == (3.0, 1.6)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_contenders_on_quantized_weights(form: str) -> None:
    pytest.importorskip("bitsandbytes")
    options = memory.parse(["--shape", "tiny", "--batch", "1", "--tokens", "8", "--rank", "4"])
    training = trained.Training(options, f"spp-{form}")
    layers = adapter_layers(training.model)
    assert len(layers) == 14 and {str(layer.packed_layout) for layer in layers.values()} == {form}
    before = training.loss().item()
    training.step()
    assert training.loss().item() < before
    assert all(float((layer.weight == 0).float().mean()) >= 0.5 for layer in layers.values()), "2:4 stayed"
