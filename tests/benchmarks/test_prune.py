"""The prune benchmark runs the passes it says, starts every turn from dense weights, and measures memory above them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import harness, prune
from benchmarks.prune import forward_passes
from spp.errors import ConfigError
from spp.masks.patterns import nonzero_mask
from tests.benchmarks.children import run_here
from tests.helpers.models import projections, tiny_llama

TINY = ["--shape", "tiny", "--windows", "3", "--seqlen", "8", "--threads", str(torch.get_num_threads())]


def options(*arguments: str):
    return prune.parse([*TINY, *arguments])


def test_the_floor_runs_each_block_twice_and_the_last_one_once() -> None:
    model = tiny_llama(num_hidden_layers=3).train()
    runs: Counter[int] = Counter()
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    passes = forward_passes(model, torch.randint(64, (4, 1024)))  # two batches of two windows
    runs.clear()
    passes()
    assert runs == {0: 4, 1: 4, 2: 2}
    assert all(block.training for block in model.model.layers)


def test_the_floor_computes_what_the_model_computes() -> None:
    model = tiny_llama(num_hidden_layers=3).eval()
    ids = torch.randint(64, (2, 24))
    read: list[torch.Tensor] = []
    passes = forward_passes(model, ids)
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    passes()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert torch.equal(*read)


def test_every_turn_starts_from_the_dense_weights() -> None:
    model = prune.load_dense(options())
    windows = prune.load_windows(options(), model)
    assert windows.shape == (3, 8)
    dense = {path: module.weight.clone() for path, module in projections(model).items()}
    restore = prune.restorer(model)
    for method in ("wanda", "magnitude"):
        prune.make_call(options(), method, model, windows)()
        assert all(
            nonzero_mask(module.weight).sum() == module.weight.numel() // 2 for module in projections(model).values()
        )
        restore()
        assert all(torch.equal(module.weight, dense[path]) for path, module in projections(model).items())


@pytest.mark.slow
def test_rows_and_memory_of_children(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "in_child", run_here)
    path, chart = tmp_path / "rows.json", tmp_path / "chart.png"
    files = ["--out", str(path), "--plot", str(chart)]
    prune.main([*TINY, "--rounds", "2", "--warmup", "0", "--methods", "wanda", "sparsegpt", *files])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert f"wrote {path}" in out and "sparsegpt" in out and "peak above the model" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert [row["contender"] for row in rows] == ["floor", "wanda", "sparsegpt"]
    assert (
        rows[0]["this_to_reference_wall"] == rows[0]["this_to_reference_process"] == {"median": 1, "p20": 1, "p80": 1}
    )
    assert all(row["peak_bytes"] >= row["rest_bytes"] > 0 for row in rows)
    assert {"device", "dtype", "threads", "versions", "windows", "seqlen", "model", "pattern"} <= set(rows[0])


def test_text_needs_a_tokenizer(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--calibration is text.*give --model"):
        options("--calibration", str(tmp_path / "text.txt"))
    with pytest.raises(ConfigError, match=r"--windows is 0; it must be at least 1"):
        options("--windows", "0")
