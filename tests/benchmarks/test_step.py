"""The step benchmark compares like with like: the same pruned weights, the same targets, real training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import harness, step
from benchmarks.trained import Training, contenders, load_model
from spp.errors import CheckpointError
from spp.masks.patterns import is_nm, nonzero_mask
from tests.benchmarks.children import run_here
from tests.helpers.models import projections, tiny_llama

TINY = ["--shape", "tiny", "--batch", "2", "--tokens", "8", "--rank", "4", "--peft-rank", "2", "--threads"]
SHAPES = {
    "q": (64, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 64),
    "gate": (160, 64),
    "up": (160, 64),
    "down": (64, 160),
}


def options(*arguments: str):
    return step.parse([*TINY, str(torch.get_num_threads()), *arguments])


def test_every_contender_trains_what_it_says_on_the_same_targets() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    sizes = {name: Training(options(), name).parameters() for name in contenders(1, 1)}
    spp = 2 * sum(4 * n + m for m, n in SHAPES.values())
    peft = 2 * sum(2 * (m + n) for m, n in SHAPES.values())
    ours = [name for name in sizes if name.startswith("spp")]
    assert len(ours) == 9
    pst = 2 * sum(2 * 2 * (m + n) + m + n for m, n in SHAPES.values())
    low_rank = dict.fromkeys(("lora", "hira", "hira-rule", "masked-lora"), peft)
    assert sizes == {**dict.fromkeys(ours, spp), **low_rank, "pst": pst, "pst-autograd": pst}


def test_the_model_is_pruned_to_the_pattern() -> None:
    weights = [module.weight for module in projections(load_model(options())).values()]
    assert len(weights) == 14
    assert all(is_nm(nonzero_mask(weight), 2, 4) for weight in weights)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot load the model from {tmp_path}"):
        load_model(step.parse(["--model", str(tmp_path)]))


def test_a_model_from_a_directory_has_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    model = load_model(step.parse(["--model", str(tmp_path), "--dtype", "float64"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["spp", "spp-low-memory"])
def test_a_step_trains(name: str) -> None:
    training = Training(options(), name)
    betas = [p for n, p in training.model.named_parameters() if n.endswith("spp_beta")]
    assert all(bool((beta == 0).all()) for beta in betas)
    training.step()
    assert all(bool((beta != 0).any()) for beta in betas)


def test_the_memory_options_change_no_loss() -> None:
    others = ("hira", "spp-nf4", "spp-int8")  # whose weights are others
    names = [name for name in contenders(1, 1) if name not in others]
    losses = {name: float(Training(options(), name).loss().detach()) for name in names}
    assert all(loss == pytest.approx(losses["spp"], rel=1e-5) for loss in losses.values())


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_pst_is_what_autograd_makes_of_its_formula(pattern: str) -> None:
    ours, plain = (Training(options("--pattern", pattern), name) for name in ("pst", "pst-autograd"))
    for training in (ours, plain):
        with torch.no_grad():
            for i, parameter in enumerate(training.trainable):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        training.loss().backward()
    assert float(ours.loss().detach()) == pytest.approx(float(plain.loss().detach()), rel=1e-5)
    for one, other in zip(ours.trainable, plain.trainable, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_rows_and_memory_of_children(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "in_child", run_here)
    path, chart = tmp_path / "rows.json", tmp_path / "chart.png"
    files = ["--out", str(path), "--plot", str(chart)]
    step.main([*TINY, "1", "--rounds", "2", "--warmup", "0", "--contenders", "spp", "spp-alpha-dropout", *files])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert f"wrote {path}" in out and "spp-alpha-dropout" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert rows[0]["reference_to_this_wall"]["median"] == 1.0
    assert all(row["peak_bytes"] >= row["rest_bytes"] > 0 for row in rows)
    assert {"device", "dtype", "threads", "versions", "batch", "tokens", "model", "rank"} <= set(rows[0])
