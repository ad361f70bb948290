"""The layer benchmark compares like with like: the same pruned weights, the same mathematics, real gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import layer
from benchmarks.adapted import LayerSpec, LayerStep, contenders, make_layer
from spp.errors import ConfigError, OutputError, OutputExistsError
from spp.masks.patterns import is_nm, nonzero_mask
from tests.helpers.tolerances import assert_matches

SPEC = LayerSpec(24, 16, torch.float64, "cpu", "2:4", 5, 2)
M, N, R, P = 24, 16, 5, 2
TRAINED = {
    "spp": R * N + M,
    "spp-input-dropout": R * N + M,
    "spp-alpha-dropout": R * N + M,
    "spp-bf16-saved": R * N + M,
    "spp-packed": R * N + M,
    "lora": P * (M + N),
    "hira": P * (M + N),
    "hira-rule": P * (M + N),
    "masked-lora": P * (M + N),
    "branches": R * N + M,
    "branches-dropout": R * N + M,
    "blocks-dropout": R * N + M,
    "full": M * N,
    "products": M * N,
    "frozen": 0,
}
THREADS = ["--threads", str(torch.get_num_threads())]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    return module.base_layer.weight if hasattr(module, "base_layer") else module.weight


def test_every_contender_trains_what_it_says_on_the_same_weight() -> None:
    pytest.importorskip("peft")
    made = {name: make_layer(name, SPEC) for name in contenders()}
    assert {name: LayerStep(name, SPEC, 3).parameters() for name in made} == TRAINED
    assert is_nm(nonzero_mask(weight_of(made["spp"])), 2, 4)
    for name, module in made.items():
        assert torch.equal(weight_of(module), weight_of(made["spp"])), name


def test_the_rank_that_a_row_tells_is_the_one_that_was_trained() -> None:
    assert {SPEC.rank_of(name) for name, size in TRAINED.items() if size == P * (M + N)} == {P}
    assert {SPEC.rank_of(name) for name, size in TRAINED.items() if size == R * N + M} == {R}
    assert SPEC.rank_of("lora-16bit") == SPEC.rank_of("hira-16bit") == P


def test_no_adapter_is_at_its_start() -> None:
    pytest.importorskip("peft")
    x = torch.randn(3, N, dtype=torch.float64)
    frozen = make_layer("frozen", SPEC)(x)
    for name in contenders():
        if name not in ("full", "frozen", "products"):
            assert not torch.allclose(make_layer(name, SPEC)(x), frozen), name


def test_the_published_forms_compute_what_ours_does() -> None:
    x = torch.randn(7, N, dtype=torch.float64)
    dy = torch.randn(7, M, dtype=torch.float64)
    found = {}
    for name in ("spp-input-dropout", "branches-dropout", "blocks-dropout"):
        module, given = make_layer(name, SPEC), x.clone().requires_grad_()
        if name != "spp-input-dropout":
            ours = make_layer("spp-input-dropout", SPEC)
            with torch.no_grad():
                module.alpha.copy_(ours.spp_alpha)
                module.beta.copy_(ours.spp_beta)
        torch.manual_seed(4)
        y = module(given)
        y.backward(dy)
        found[name] = y, given.grad, *(p.grad for p in module.parameters() if p.requires_grad)
    for name, values in found.items():
        for value, expected in zip(values, found["spp-input-dropout"], strict=True):
            assert_matches(value, expected, torch.float64, what=name)


def test_products_are_the_three_products() -> None:
    products = make_layer("products", SPEC)
    x, dy = torch.randn(3, N, dtype=torch.float64), torch.randn(3, M, dtype=torch.float64)
    products.step(x, dy)
    y, dx = products.outputs
    assert_matches(y, x @ products.weight.t(), torch.float64)
    assert_matches(dx, dy @ products.weight, torch.float64)
    assert_matches(products.gradient, dy.t() @ x, torch.float64)


@pytest.mark.slow
def test_rows_table_and_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "rows.json", tmp_path / "chart.png"
    run = ["--layers", "24x16", "13x8", "--tokens", "3", "5", "--rank", "4", "--rounds", "2", "--warmup", "0"]
    run += ["--contenders", "spp", "full", *THREADS, "--out", str(out), "--plot", str(chart)]
    layer.main(run)
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["out_features"], row["tokens"], row["contender"]) for row in rows] == [
        (m, tokens, name) for m in (24, 13) for tokens in (3, 5) for name in ("spp", "full")
    ]
    assert {"device", "dtype", "threads", "versions", "in_features", "pattern", "rank", "rounds"} <= set(rows[0])
    assert rows[0]["reference_to_this_wall"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert "24 × 16" in printed and f"wrote {chart}" in printed and f"wrote {out}" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError, match=r"chart\.png"):
        layer.main([*run, "--out", str(tmp_path / "other.json")])


@pytest.mark.slow
def test_what_is_kept_for_backward() -> None:
    spec, names = LayerSpec(24, 16, torch.float32, "cpu", "2:4", 4, 2), ("spp", "spp-input-dropout", "spp-bf16-saved")
    rows = {
        name: layer.memory_here(LayerStep(name, spec, 32), "cpu") for name in (*names, "branches", "full", "products")
    }
    x = 32 * 16 * 4
    assert {name: row["saved_beyond_x_bytes"] for name, row in rows.items() if name != "branches"} == {
        "spp": 0,
        "spp-input-dropout": 32 * 16 // 8,
        "spp-bf16-saved": x // 2,
        "full": 0,
        "products": 0,
    }
    assert rows["branches"]["saved_beyond_x_bytes"] >= 24 * 16 * 4  # at least one tensor of the weight's size
    assert [rows[name]["saved_bytes"] for name in ("spp", "spp-bf16-saved", "full")] == [x, x // 2, x]


@pytest.mark.slow
def test_memory_is_measured_in_a_child(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    run = ["--layers", "24x16", "--tokens", "32", "--rank", "4", "--rounds", "1", "--warmup", "0", "--memory"]
    layer.main([*run, *THREADS, "--out", str(out), "--contenders", "spp-input-dropout"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["saved_beyond_x_bytes"] == 32 * 16 // 8
    assert row["peak_bytes"] >= 0
    assert "of it beyond X" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "4096"], "out x in features"),
        (["--layers", "0x4"], "out x in features"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--peft-rank", "0"], "--peft-rank is 0"),
        (["--pattern", "5:4"], "5:4"),
        (["--plot", "chart.gif"], "must end in .png"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--device", "cpux"], "known: cpu, cuda, cuda:N"),
        (["--device", "cuda:x"], "known: cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "--device is cuda:99, but"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=complaint):
        layer.parse([*arguments, *THREADS])


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(option: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    (tmp_path / "file").touch()
    for path in (folder, tmp_path / "file" / "chart.png"):
        with pytest.raises(OutputError, match="cannot write"):
            layer.parse([option, str(path), "--overwrite", *THREADS])
    layer.parse([option, str(tmp_path / "new" / "chart.png"), *THREADS])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
