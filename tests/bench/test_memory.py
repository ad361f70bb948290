"""The memory benchmark counts what autograd keeps, and measures every contender in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spp.bench import memory
from spp.bench.saved import saved_bytes


def test_saved_bytes_count_memory_once_and_no_parameters() -> None:
    module = nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: module(x), module) == 5 * 8 * 4  # for dW
    assert saved_bytes(lambda: module(x) * module(x), module, [x]) == 2 * 5 * 4 * 4  # both factors, and X not
    assert saved_bytes(lambda: module(x), module, [x]) == 0


def test_rows_of_children(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    threads = str(torch.get_num_threads())
    run = ["--shape", "tiny", "--batch", "2", "--tokens", "64", "--rank", "4", "--threads", threads]
    memory.main([*run, "--contenders", "spp", "spp-low-memory", "--out", str(out)])
    spp, low = json.loads(out.read_text())["rows"]
    assert spp["reference_to_this_peak"] == 1.0
    assert low["saved_bytes"] < 0.9 * spp["saved_bytes"]
    assert low["reference_to_this_saved"] == spp["saved_bytes"] / low["saved_bytes"]
    for row in (spp, low):
        assert row["step_bytes"] == row["peak_bytes"] - row["rest_bytes"]
        assert {"device", "dtype", "threads", "versions", "batch", "tokens", "model", "rank"} <= set(row)
    assert "spp-low-memory" in capsys.readouterr().out
