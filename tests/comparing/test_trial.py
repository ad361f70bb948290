"""Trials on a small model: every contender trains what it says, and its zeros are counted after its own merge."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import spp
from spp.comparing import measure, trial
from spp.comparing.chart import draw
from spp.comparing.data import load
from spp.comparing.methods import Goal, adapt, masks_of
from spp.comparing.study import _count, _nearest, _shapes, compare
from spp.comparing.trial import Trial, run_trial, zeros
from spp.configs.adapter import ALSO_LR
from spp.configs.comparing import KINDS, CompareConfig, parse_contender
from spp.errors import ConfigError, DataError, DependencyError, NonFiniteError, OutputError
from spp.models.targets import resolve_projections
from spp.training.loading import load_model, load_tokenizer
from spp.training.trainer import set_also_rate
from tests.helpers.models import moe_model, prune_nm_, tiny_llama, tiny_tokenizer

LINES = "".join(f"Line {i}: {i} and {i + 1} are {2 * i + 1}.\n" for i in range(150))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare") / "pruned"
    model = tiny_llama(initializer_range=0.2, num_hidden_layers=1)
    model.save_pretrained(directory.parent / "dense")
    prune_nm_(model).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory.parent / "text.txt").write_text(LINES)
    return directory


def config(pruned: Path, out: Path, **options: object) -> CompareConfig:
    small = {"steps": 2, "block_length": 16, "window": 16, "test_windows": 3, "validation_windows": 2, "cost_rounds": 0}
    given = {"model": pruned, "output_dir": out, "data": pruned.parent / "text.txt", **small, **options}
    return CompareConfig(**given)  # type: ignore[arg-type]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_trains_and_the_merge_keeps_what_it_should(name: str, pruned: Path) -> None:
    if name in ("hira", "lora", "lora-remasked", "ia3"):
        pytest.importorskip("peft")
    contender = parse_contender(name)
    model = load_model(pruned)
    before, start = masks_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        untouched = model(ids).logits
    adapted = adapt(contender, model, seed=0, goal=Goal("2:4", 0.5), dense=pruned.parent / "dense")
    parameters = [p for p in adapted.model.parameters() if p.requires_grad]
    assert adapted.trainable() == sum(p.numel() for p in parameters) > 0
    if name != "spp-random-beta":
        with torch.no_grad():
            torch.testing.assert_close(adapted.model.eval()(ids).logits, untouched, atol=1e-5, rtol=1e-4)
    adapted.model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.settle()
    with torch.no_grad():
        tuned = adapted.model.eval()(ids).logits
        plain = adapted.finish().eval()
        merged = plain(ids).logits
    assert plain.state_dict().keys() == start.keys()
    assert any(not torch.equal(value, start[key]) for key, value in plain.state_dict().items())
    if name != "lora-remasked":
        torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=1e-3)
    found = zeros(plain, before)
    if KINDS[contender.kind].keeps:
        assert found == {"zeros_kept": 1.0, "sparsity": 0.5, "pattern_valid": True}
    elif name == "lora":
        assert found["zeros_kept"] < 0.01 and found["pattern_valid"] is False
    else:
        assert found["zeros_kept"] > 0.2 and found["sparsity"] == 0.5 and found["pattern_valid"] is True


def test_a_contender_also_trains_norms_at_their_own_rate(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []

    def noted(optimizer: Any, *rest: Any) -> None:
        set_also_rate(optimizer, *rest)
        rates.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(trial, "set_also_rate", noted)
    options = config(pruned, tmp_path / "out", contenders=["spp:also_train=norms"])
    (contender,) = options.parsed()
    run_trial(options, contender, Trial(contender.name, 2e-2, 0, 2), load(options, load_tokenizer(pruned)))
    assert rates == [[2e-2, ALSO_LR]]
    model = load_model(pruned)
    adapted = adapt(contender, model, seed=0)
    assert adapted.trainable() == adapt(parse_contender("spp"), load_model(pruned), seed=0).trainable() + 3 * 64


def test_zeros_are_counted_one_by_one() -> None:
    model = prune_nm_(tiny_llama(num_hidden_layers=1))
    masks = masks_of(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    total = sum(int((~mask).sum()) for mask in masks.values())
    with torch.no_grad():
        weight[0, int((weight[0] == 0).nonzero()[0])] = 1.0
    found = zeros(model, masks)
    assert found["zeros_kept"] == (total - 1) / total and found["pattern_valid"] is False


def test_parameters_are_counted_as_they_are(pruned: Path) -> None:
    shapes = _shapes(load_model(pruned))
    assert all((one.rank == "r") == ("r" in one.options) for one in KINDS.values())
    for kind, one in KINDS.items():
        if one.rank is None or (kind in ("hira", "lora", "lora-remasked") and find_spec("peft") is None):
            continue
        contender = parse_contender(kind).with_rank(3)
        adapted = adapt(contender, load_model(pruned), 0, dense=pruned.parent / "dense")
        assert _count(contender, shapes) == adapted.trainable(), kind
    wanted = _count(parse_contender("spp"), shapes)
    nearest = _nearest(parse_contender("masked-lora"), load_model(pruned))
    worse = [abs(_count(nearest.with_rank(nearest.options["r"] + d), shapes) - wanted) for d in (-1, 1)]
    assert abs(_count(nearest, shapes) - wanted) <= min(worse)


@pytest.mark.filterwarnings("ignore:all 12 target layers are dense")
def test_the_matrices_of_fused_experts_are_counted_one_by_one() -> None:
    model = moe_model("mixtral")
    shapes = _shapes(model)
    assert len(shapes) > len(resolve_projections(model))
    for kind in ("spp", "hira-rule", "spp-no-beta"):
        contender = parse_contender(kind).with_rank(2)
        counted = _count(contender, shapes)
        assert counted == adapt(contender, moe_model("mixtral"), 0).trainable(), kind


@pytest.fixture(scope="module", params=["2:4", 0.5])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model and what pruning left of it, o_proj as it was."""
    parent = tmp_path_factory.mktemp("both")
    model = tiny_llama(initializer_range=0.2, num_hidden_layers=1)
    model.save_pretrained(parent / "dense")
    spp.prune(model, "magnitude", request.param, exclude_modules="o_proj")
    model.save_pretrained(parent / "pruned")
    for name in ("dense", "pruned"):
        tiny_tokenizer().save_pretrained(parent / name)
    (parent / "text.txt").write_text(LINES)
    return parent / "dense", parent / "pruned"


def row_of(name: str, both: tuple[Path, Path], out: Path) -> dict[str, Any]:
    given = config(both[1], out, dense=both[0], contenders=(name,), steps=10)
    (contender,) = given.parsed()
    data = load(given, load_tokenizer(both[1]))
    return run_trial(given, contender, Trial(contender.name, 1e-2, 0, 10), data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 7 target layers are dense")
def test_what_moves_the_mask_moves_it_while_it_trains(both: tuple[Path, Path], tmp_path: Path) -> None:
    """By the callbacks that a trial trains with: each ends with as many zeros, in the pruned layers alone."""
    dense, pruned = map(load_model, both)
    goal, report = Goal.of(pruned), spp.sparsity(pruned)
    assert goal.pattern == ("2:4" if ":" in report.tensors["model.layers.0.mlp.up_proj.weight"].pattern else None)
    assert goal.sparsity == 0.5 and len(goal.targets or ()) == 6 and Goal.of(dense) == Goal(None, 0.0)
    names = ("pst", "pst-pruned", "spp-mask-updates:every=2,fraction=0.5", "spp")
    rows = {name: row_of(name, both, tmp_path) for name in names}
    for name, row in rows.items():
        assert row["sparsity"] == report.sparsity, name
        assert row["pattern_valid"] is (True if goal.pattern else None), name
        assert (row["zeros_kept"] == 1) == (name == "spp"), name
    losses = {row["validation"]["loss"] for row in rows.values()}
    assert len(losses) == 4
    assert rows["pst"]["zeros_kept"] < 0.99 and rows["pst"]["test"] != rows["pst-pruned"]["test"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["lora", "spp", "masked-lora", "pst"])
def test_contenders_have_one_loss_with_a_teacher(name: str, pruned: Path, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    dense, contender = pruned.parent / "dense", parse_contender(name)
    given = config(pruned, tmp_path, contenders=(name,), dense=dense, teacher="dense", ce_weight=0.0, kl_weight=1.0)
    data = load(given, load_tokenizer(pruned))
    row = run_trial(given, contender, Trial(contender.name, 1e-3, 0, 2), data)
    alone = run_trial(dataclasses.replace(given, teacher=None, ce_weight=1.0, kl_weight=0.0), contender,
                      Trial(contender.name, 1e-3, 0, 2), data)  # fmt: skip
    # What begins as the dense model has little to learn from it, and what is pruned less than from the text.
    assert 0.01 < row["train_loss"] < (0.3 if name == "pst" else 0.8) * alone["train_loss"]


def test_a_study_tells_its_teacher(pruned: Path, tmp_path: Path) -> None:
    dense = pruned.parent / "dense"
    given = config(pruned, tmp_path, contenders=("spp",), lr=("1e-3",), dense=dense, teacher="dense", kl_weight=0.5)
    conditions = compare(given).read()["conditions"]
    assert conditions["kl_weight"] == 0.5 and conditions["teacher"] == "dense"
    assert len(conditions["teacher_weights"]) == 64
    with pytest.raises(ConfigError, match="kl_weight"):
        compare(dataclasses.replace(given, kl_weight=0.6, resume=True))
    with pytest.raises(ConfigError, match="time of a step without a teacher"):
        config(pruned, tmp_path, budget="time", cost_rounds=1, teacher="dense", kl_weight=0.5)
    with pytest.raises(ConfigError, match=r"kl_weight is 0\.5, but there is no teacher"):
        config(pruned, tmp_path, kl_weight=0.5)
    with pytest.raises(ConfigError, match="has no certificate that names the dense model"):
        compare(config(pruned, tmp_path / "new", contenders=("spp",), teacher="dense", kl_weight=0.5))


@pytest.mark.slow
def test_contenders_get_the_same_batches_whatever_they_draw(pruned: Path, tmp_path: Path) -> None:
    seen: dict[str, list[list[int]]] = {}
    for name in ("spp", "spp-random-beta", "norms"):
        given = config(pruned, tmp_path, contenders=(name,), steps=4)
        data = load(given, load_tokenizer(pruned))
        collate, batches = data.collate, seen.setdefault(name, [])

        def record(items: Any, collate: Any = collate, batches: Any = batches) -> Any:
            batch = collate(items)
            batches.append(batch["input_ids"].flatten().tolist())
            return batch

        (contender,) = given.parsed()
        run_trial(given, contender, Trial(name, 1e-2, 3, 4), dataclasses.replace(data, collate=record))  # type: ignore[arg-type]
    first, second, third = seen.values()
    assert len(first) >= 4 and first == second == third


@pytest.mark.parametrize("kind", ["text", "own text", "instruction"])
def test_validation_and_test_share_nothing_with_training(kind: str, pruned: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {}
    if kind == "own text":
        (tmp_path / "valid.txt").write_text("".join(chr(40 + i % 80) for i in range(200)))
        options = {"eval_text": tmp_path / "valid.txt"}
    if kind == "instruction":
        rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(30)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"data": tmp_path / "rows.jsonl", "block_length": 64}
    data = load(config(pruned, tmp_path / "o", **options), load_tokenizer(pruned))
    if kind == "instruction":
        parts = [
            {bytes(ids.numpy()) for ids, _ in part.rows} for part in (data.train, data.validation.rows, data.test.rows)
        ]
        assert [len(part) for part in parts] == [25, 2, 3]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        return
    assert data.test.tokens.numel() == 48 and data.validation.tokens.numel() == 32
    text = torch.cat([data.test.tokens, data.validation.tokens])
    if kind == "own text":
        assert bytes(text.tolist()) == bytes(
            load_tokenizer(pruned)((tmp_path / "valid.txt").read_text())["input_ids"][:80]
        )
    else:
        whole = load_tokenizer(pruned)(LINES)["input_ids"]
        assert len(data.train) == (len(whole) // 16) - 5
        found = torch.cat([data.train.blocks.flatten(), text])
        assert found.tolist() == whole[: len(found)]


def test_training_data_are_told_apart_by_what_is_in_them(pruned: Path, tmp_path: Path) -> None:
    tokenizer, text = load_tokenizer(pruned), tmp_path / "text.txt"
    found = []
    for first in "ab":
        text.write_text(first + LINES[1:])  # what is held back is the end, and the same
        found.append(load(config(pruned, tmp_path / "o", data=text), tokenizer).hashes())
    differing = {name for name in found[0] if found[0][name] != found[1][name]}
    assert differing == {"data_sha256"}


def test_too_little_data_is_an_error(pruned: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pruned)
    with pytest.raises(DataError, match="too short to hold back"):
        load(config(pruned, tmp_path / "o", test_windows=1000), tokenizer)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="fewer than 3 test and 2 validation"):
        load(config(pruned, tmp_path / "o", eval_text=tmp_path / "short.txt"), tokenizer)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(pruned: Path, tmp_path: Path) -> None:
    given = {"contenders": ("spp", "norms"), "lr": ("spp=1e-2,2e-2", "norms=1e-2"), "extend": 0}
    first = compare(config(pruned, tmp_path / "out", contenders=("spp",), lr=("1e-2",)))
    (key,) = first.read()["rows"]
    before = first.read()["rows"][key]
    whole = compare(config(pruned, tmp_path / "out", resume=True, dense=None, **given)).read()
    assert whole["rows"][key] == before  # not run again
    assert {(r["contender"], r["lr"]) for r in whole["rows"].values()} == {
        ("spp", 0.01),
        ("spp", 0.02),
        ("norms", 0.01),
    }
    again = compare(config(pruned, tmp_path / "other", **given)).read()
    for name, row in whole["rows"].items():  # the same numbers, whoever went first
        for values in (again["rows"][name]["validation"], row["validation"]):
            assert values.pop("seconds") > 0  # the clock's, which is another each time
        assert again["rows"][name]["validation"] == row["validation"]
        assert again["rows"][name]["train_loss"] == row["train_loss"]
    for rows in (again["rows"], whole["rows"]):  # nothing but the best yet is tested
        losses = {row["lr"]: row["validation"]["loss"] for row in rows.values() if row["contender"] == "spp"}
        tested = {row["lr"] for row in rows.values() if row["contender"] == "spp" and "test" in row}
        assert min(losses, key=losses.__getitem__) in tested and 0.01 in tested
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| spp |" in text and "Missing" not in text and str(tmp_path) not in text
    pytest.importorskip("matplotlib")
    draw(whole, tmp_path / "chart.png", overwrite=False)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_another_process_is_at_is_told(pruned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"contenders": ("norms",), "lr": ("1e-2",), "extend": 0, "steps": 1}
    first = compare(config(pruned, tmp_path / "out", **given))
    key = "norms, lr 0.02, seed 0, 1 steps"
    with first.claim(f"rows {key}") as mine:
        assert mine
        found = compare(config(pruned, tmp_path / "out", **given | {"lr": ("1e-2,2e-2",)}, resume=True)).read()
    assert key not in found["rows"] and f"{key} is not there yet: another process was at it" in caplog.text
    assert f"- {key}" in (tmp_path / "out" / "results.md").read_text()


def test_what_cannot_be_is_found_before_anything_is_trained(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"contender 'masked-lora:r=33': .*k_proj: r = 33"):
        compare(config(pruned, tmp_path / "out", contenders=("spp", "masked-lora:r=33")))
    assert not (tmp_path / "out").exists()
    tiny_llama(num_hidden_layers=1, intermediate_size=96).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"not those of .*pruned before pruning"):
        compare(config(pruned, tmp_path / "out", contenders=("spp", "pst"), dense=tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(DependencyError, match="contender ia3 needs peft"):
            compare(config(pruned, tmp_path / "out", contenders=("spp", "ia3")))
        patch.setitem(sys.modules, "peft", ModuleType("peft"))
        with pytest.raises(ConfigError, match="has no HiraConfig; leave hira out"):
            compare(config(pruned, tmp_path / "out", contenders=("spp", "hira")))
        with pytest.raises(ConfigError, match="has no HiraConfig"):  # nothing is there to go on with
            compare(config(pruned, tmp_path / "out", contenders=("spp", "hira"), resume=True))
    fewer = load_model(pruned)
    spp.prune(fewer, "magnitude", "1:4")
    fewer.save_pretrained(tmp_path / "fewer")
    tiny_tokenizer().save_pretrained(tmp_path / "fewer")
    for dense in (pruned, tmp_path / "fewer"):
        with pytest.raises(ConfigError, match=r"has the zeros of .*pruned; it must be the model before pruning"):
            compare(config(pruned, tmp_path / "out", contenders=("spp", "pst"), dense=dense))
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"dense, whose projections have no zeros; .* prune it first"):
        compare(config(tmp_path / "dense", tmp_path / "out", data=pruned.parent / "text.txt", contenders=("spp",)))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    for bad in (
        config(tmp_path / "nan", tmp_path / "out", data=pruned.parent / "text.txt", contenders=("norms",)),
        config(pruned, tmp_path / "out", contenders=("spp", "pst"), dense=tmp_path / "nan"),
    ):
        with pytest.raises(NonFiniteError, match=r"nan: NaN or infinity in model\.norm\.weight; mend it"):
            compare(bad)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; the results need a directory"):
        compare(config(pruned, tmp_path / "file", contenders=("norms",)))


@pytest.mark.slow
def test_only_the_same_models_go_on_and_only_what_is_missing_needs_peft(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"contenders": ("norms",), "lr": ("1e-2",), "extend": 0, "steps": 1}
    compare(config(pruned, tmp_path / "out", **given))
    moved = tmp_path / "pruned"
    shutil.copytree(pruned, moved)
    (tmp_path / "another.txt").write_text(LINES)
    compare(config(moved, tmp_path / "out", **given, data=tmp_path / "another.txt", resume=True))  # only names differ
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match="contender ia3 needs peft"):
        compare(config(pruned, tmp_path / "out", **given | {"contenders": ("spp", "ia3")}, resume=True))
    model = load_model(moved)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(moved)
    with pytest.raises(ConfigError, match=r"found under other conditions.* weights: "):
        compare(config(moved, tmp_path / "out", **given, data=tmp_path / "another.txt", resume=True))


@pytest.mark.slow
def test_divergence_is_a_row(pruned: Path, tmp_path: Path) -> None:
    rows = compare(config(pruned, tmp_path / "out", contenders=("spp",), lr=("1e30",), extend=0)).read()["rows"]
    (row,) = rows.values()
    assert row["diverged"] and "test" not in row and "merged weight" in row["reason"]


@pytest.mark.slow
def test_a_budget_of_time_gives_slow_steps_fewer(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"spp": 1.0, "norms": 2.0}
    monkeypatch.setattr(
        trial,
        "measure_cost",
        lambda _, c: {
            "reference_to_this_wall": {"median": ratios[c.name]},
            "peak_bytes": 1,
            "this_to_reference_wall": {"median": 1 / ratios[c.name]},
            "environment": measure.environment("cpu", torch.float32).to_dict(),
        },
    )
    given = {"contenders": ("spp", "norms"), "lr": ("1e-2",), "cost_rounds": 1, "steps": 2}
    rows = compare(config(pruned, tmp_path / "out", budget="time", **given)).read()["rows"]
    assert {row["contender"]: row["steps"] for row in rows.values()} == {"spp": 2, "norms": 4}


@pytest.mark.slow
def test_a_budget_of_parameters_chooses_the_rank(pruned: Path, tmp_path: Path) -> None:
    shapes = _shapes(load_model(pruned))
    names = ("spp:r=4", "masked-lora:r=2", "norms")
    given = {"contenders": names, "lr": ("spp:r=4=1e-2", "2e-2"), "extend": 0, "steps": 2}
    found = compare(config(pruned, tmp_path / "out", budget="parameters", **given)).read()["rows"]
    rows = {row["contender"]: row for row in found.values()}
    nearest = _nearest(parse_contender("masked-lora"), load_model(pruned))
    assert nearest.options["r"] != 2 and rows.keys() == {"spp", nearest.name, "norms"}
    assert rows["spp"]["lr"] == 1e-2  # of the name that was asked for
    wanted = _count(parse_contender("spp"), shapes)
    assert rows["spp"]["trainable"] == wanted and abs(rows[nearest.name]["trainable"] / wanted - 1) < 0.1
    assert "where there is no rank to choose: norms." in (tmp_path / "out" / "results.md").read_text()


def test_the_scaling_of_lora_is_that_of_the_rules(pruned: Path) -> None:
    pytest.importorskip("peft")
    for name, expected in (("lora", 2.0), ("lora:r=4,scaling=3", 3.0), ("lora-remasked:scaling=0.5", 0.5)):
        adapted = adapt(parse_contender(name), load_model(pruned), 0)
        layers = [module for module in adapted.model.modules() if hasattr(module, "lora_A")]
        found = {value for layer in layers for value in layer.scaling.values()}
        assert found == {expected}


@pytest.mark.filterwarnings("ignore:all 12 target layers are dense")
def test_norms_train_biases_of_every_name() -> None:
    model = tiny_llama(num_hidden_layers=1, attention_bias=True)
    mlp = model.model.layers[0].mlp
    mlp.down_proj_bias = torch.nn.Parameter(torch.zeros(2, 8))  # as fused experts call theirs
    adapted = adapt(parse_contender("norms"), model, 0, Goal(None, 0.0))
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    attention = {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkvo"}
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert trained == attention | norms | {"model.layers.0.mlp.down_proj_bias"} and len(norms) == 3


@pytest.mark.slow
def test_cost_of_a_step(pruned: Path) -> None:
    given = {"model": str(pruned), "dense": None, "contender": "norms", "dtype": "float32", "device": "cpu"}
    given |= {"batch_size": 1, "block_length": 8, "rounds": 2, "threads": torch.get_num_threads()}
    found = measure.in_child("spp.comparing.trial", [json.dumps(given)])
    assert found["reference"] == "spp" and found["peak_bytes"] >= found["rest_bytes"] > 0
    assert found["this_to_reference_wall"]["median"] > 0 and found["trainable"] == 3 * 64
