"""tune by PST, and by SPP with mask updates: from a model and a file to a verified checkpoint, stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.errors import ConfigError, MaskError, OutputError
from spp.evaluation import perplexity
from spp.pst import pst_layers, sparsity_schedule
from spp.training import PSTTrainer, SPPTrainer, TrainingInterrupted, TuneConfig, tune
from spp.training.callbacks import read_log
from spp.training.methods import method_of
from spp.wrapping.wrap import adapter_layers, is_wrapped
from tests.helpers.models import projections, tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_same_bits
from tests.training.helpers import ROWS, TEXT, SignalAt, arguments, bytes_of, config, pruned

PST: dict[str, Any] = {"method": "pst", "lr": 1e-2, "pattern": "2:4"}
# SPP's own options are given by `config`.
SPP_ONLY = {"r": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def by_pst(data: Path, run: Path, **options: Any) -> TuneConfig:
    return config(data, run, **{**SPP_ONLY, **PST, **options})


def updating(data: Path, run: Path, dense: Path, **options: Any) -> TuneConfig:
    return config(data, run, **{"dense_model": dense, "mask_update_every": 2, "mask_update_fraction": 0.3, **options})


@pytest.mark.slow
def test_pst_from_a_directory_to_a_verified_checkpoint(text: Path, dense: Path, tmp_path: Path) -> None:
    result = tune(by_pst(text, tmp_path / "run", model=dense, steps=30))
    assert result.base_dir is None and result.sparsity == 0.5
    log = read_log(tmp_path / "run" / "log.jsonl")
    at = [sparsity_schedule(step, 30, final_sparsity=0.5) for step in range(1, 31)]
    sizes = [layer.weight.numel() for layer in pst_layers(result.model).values()]
    assert [entry["sparsity"] for entry in log] == [sum(int(n * s + 1e-9) for n in sizes) / sum(sizes) for s in at]
    assert [entry["sparsity"] for entry in log][20:] == [0.5] * 10
    assert TuneConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())["tune"]).method == "pst"
    tokenizer, held = tiny_tokenizer(), TEXT[:400]
    tuned = perplexity(result.model, tokenizer, held, window=32)
    loaded = spp.pst.load(tiny_llama(), result.adapter_dir)
    assert perplexity(loaded, tokenizer, held, window=32) == tuned
    assert spp.convert_checkpoint(dense, result.adapter_dir, tmp_path / "sparse").pattern == "2:4"
    assert spp.verify(tmp_path / "sparse").sparsity == 0.5
    converted = type(result.model).from_pretrained(tmp_path / "sparse")
    assert perplexity(converted, tokenizer, held, window=32) == pytest.approx(tuned, rel=1e-5)
    assert tuned < perplexity(tiny_llama(), tokenizer, held, window=32)


def test_pst_unstructured_on_instructions_with_a_chunked_loss(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    c = by_pst(data, tmp_path / "run", pattern=0.7, block_length=64, loss_chunk=16, initial_sparsity=0.1, weight_rank=2)
    model = tiny_llama()
    result = tune(c, model=model, tokenizer=tiny_tokenizer())
    assert result.data.kind == "instruction" and result.sparsity == pytest.approx(0.7, abs=1e-4)
    assert {layer.weight_U.shape[1] for layer in pst_layers(model).values()} == {2}
    assert {layer.sparsity for layer in pst_layers(model).values()} == {0.7}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["pst", "updates"])
def test_interrupted_and_resumed_to_the_same_bytes(
    method: str, text: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(name: str, **others: Any) -> TuneConfig:
        common = {"steps": 6, "save_every": None, "eval_fraction": 0.0, **others}
        if method == "pst":
            return by_pst(text, tmp_path / name, **common)
        return updating(text, tmp_path / name, dense, **common)

    make = tiny_llama if method == "pst" else pruned
    whole = tune(options("whole"), model=make(), tokenizer=tiny_tokenizer())
    model = make()
    with monkeypatch.context() as patch:
        patch.setattr("spp.training.tuning.ProgressBar", SignalAt)
        with pytest.raises(TrainingInterrupted):
            tune(options("cut"), model=model, tokenizer=tiny_tokenizer())
    for (name, parameter), other in zip(model.named_parameters(), make().parameters(), strict=True):
        assert parameter.requires_grad and torch.equal(parameter, other), name  # as it was
    cut = tune(options("cut", resume=True), model=model, tokenizer=tiny_tokenizer())
    if method == "pst":
        assert bytes_of(tmp_path / "cut/adapter") == bytes_of(tmp_path / "whole/adapter")
        return
    assert cut.base_dir == tmp_path / "cut" / "base" and whole.base_dir is not None
    tensors = "adapter_model.safetensors"
    assert bytes_of(tmp_path / "cut/adapter")[tensors] == bytes_of(tmp_path / "whole/adapter")[tensors]
    assert bytes_of(cut.base_dir)["model.safetensors"] == bytes_of(whole.base_dir)["model.safetensors"]


@pytest.mark.slow
def test_mask_updates_from_a_directory_to_a_verified_checkpoint(text: Path, dense: Path, tmp_path: Path) -> None:
    spp.save_model(pruned(), tmp_path / "pruned", tokenizer=tiny_tokenizer())
    c = updating(text, tmp_path / "run", dense, model=tmp_path / "pruned", steps=8)
    result = tune(c)
    assert result.base_dir == tmp_path / "run" / "base" and is_wrapped(result.model)
    base, adapter = result.base_dir, result.adapter_dir
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    with pytest.raises(MaskError):
        spp.merge_checkpoint(tmp_path / "pruned", adapter, tmp_path / "wrong")
    spp.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert spp.verify(base).pattern == spp.verify(base, tmp_path / "merged").pattern == "2:4"
    assert spp.verify(tmp_path / "merged").pattern == "2:4"
    with pytest.raises(MaskError):
        spp.verify(tmp_path / "pruned", tmp_path / "merged")
    tokenizer, held = tiny_tokenizer(), TEXT[:300]
    merged = type(result.model).from_pretrained(tmp_path / "merged")
    assert perplexity(merged, tokenizer, held, window=32) == pytest.approx(
        perplexity(result.model, tokenizer, held, window=32), rel=1e-5
    )
    spp.merge(result.model)
    for (name, one), other in zip(result.model.named_parameters(), merged.parameters(), strict=True):
        assert_same_bits(one.detach(), other.detach(), name)
    again = tune(updating(text, tmp_path / "run", dense, model=tmp_path / "pruned", steps=8, resume=True))
    assert again.perplexity_after == result.perplexity_after
    tune(config(text, tmp_path / "run", model=tmp_path / "pruned", steps=2, overwrite=True))
    assert not base.exists()


def test_mask_updates_of_a_packed_model(text: Path, dense: Path, tmp_path: Path) -> None:
    model = spp.pack(pruned())
    result = tune(updating(text, tmp_path / "run", dense, steps=4), model=model, tokenizer=tiny_tokenizer())
    assert result.base_dir is not None and spp.verify(result.base_dir).pattern == "2:4"
    layers = adapter_layers(model)
    assert all(layer.packed_layout is not None for layer in layers.values())
    base, start = projections(type(model).from_pretrained(result.base_dir)), projections(pruned())
    for path, layer in layers.items():
        assert torch.equal(layer.weight, base[path].weight) and not torch.equal(layer.weight, start[path].weight)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["spp.training.methods.save_model", "spp.training.tuning._Measure.__call__"])
def test_mask_updates_are_taken_back_where_the_end_fails(
    where: str, packed: bool, text: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        if (tmp_path / "run" / "adapter").exists():
            raise OutputError("no room")

    model = spp.pack(pruned()) if packed else pruned()
    monkeypatch.setattr(where, fails)
    with pytest.raises(OutputError):
        tune(updating(text, tmp_path / "run", dense, steps=4), model=model, tokenizer=tiny_tokenizer())
    assert not is_wrapped(model)
    model = spp.unpack(model) if packed else model
    for path, module in projections(pruned()).items():
        assert torch.equal(projections(model)[path].weight, module.weight), path


def test_a_run_that_fails_leaves_the_model_and_the_directory(text: Path, tmp_path: Path) -> None:
    small = tiny_llama(num_hidden_layers=1)
    small.save_pretrained(tmp_path / "small")
    model = pruned()
    with pytest.raises(ConfigError, match="has no weight for 7 layers"):
        tune(updating(text, tmp_path / "run", tmp_path / "small"), model=model, tokenizer=tiny_tokenizer())
    assert not (tmp_path / "run").exists() and not is_wrapped(model)


COMMON: dict[str, Any] = {"data": "train.txt", "output_dir": "run", "model": "m"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "lora"}, "method is 'lora'; known: spp, pst"),
        ({"method": "pst"}, "pattern= is missing"),
        ({"method": "pst", "pattern": "4:2"}, "4:2"),
        ({**PST, "r": 8}, "r is 8, which means nothing to method='pst': it is an option of method='spp'"),
        ({**PST, "dropout": 0.1}, "dropout is 0.1"),
        ({**PST, "saved_activations": "bfloat16"}, "saved_activations is"),
        ({**PST, "mask_update_every": 3}, "mask_update_every is 3"),
        ({**PST, "dense_model": "dense"}, "dense_model is"),
        ({**PST, "initial_sparsity": 0.6}, "sparsity only grows"),
        ({**PST, "initial_warmup": 0.8, "final_warmup": 0.4}, "at most 1"),
        ({**PST, "weight_rank": 0}, "weight_rank is 0"),
        ({**PST, "structured_scale": "x"}, "structured_scale is 'x'"),
        ({"pattern": "2:4"}, "pattern is '2:4', which means nothing to method='spp'"),
        ({"mask_rank": 4}, "mask_rank is 4"),
        ({"dense_model": "dense"}, "no mask updates without mask_update_every="),
        ({"mask_update_drop": "magnitude"}, "no mask updates without mask_update_every="),
        ({"mask_update_every": 4}, "dense_model= is missing"),
        ({"mask_update_every": 0, "dense_model": "d"}, "mask_update_every is 0"),
        ({"mask_update_every": 4, "dense_model": "d", "mask_update_until": 1.5}, "mask_update_until is 1.5"),
        ({"mask_update_every": 4, "dense_model": ""}, "dense_model is ''"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TuneConfig(**{**COMMON, **options})
    assert complaint in str(caught.value)


def test_every_option_reaches_what_trains(text: Path, dense: Path, tmp_path: Path) -> None:
    factors = {"weight_rank": 2, "weight_scale": 0.5, "mask_rank": 3, "low_rank_scale": 0.25, "structured_scale": 4.0}
    schedule = {"initial_sparsity": 0.1, "initial_warmup": 0.2, "final_warmup": 0.4}
    method = method_of(by_pst(text, tmp_path / "run", pattern=0.3, exclude_modules="q_proj", **factors, **schedule))
    model = tiny_llama()
    method.prepare(model)
    assert not any(path.endswith("q_proj") for path in pst_layers(model))
    for layer in pst_layers(model).values():
        assert {name: getattr(layer, name) for name in factors} == factors
    made = method.trainer(model, arguments(tmp_path / "trainer"))
    assert isinstance(made, PSTTrainer) and made.schedule.final_sparsity == 0.3
    assert {name: getattr(made.schedule, name) for name in schedule} == schedule

    given = {"every": 3, "fraction": 0.2, "until": 0.6, "decay": "cubic", "drop": "magnitude", "grow": "saliency"}
    options = {f"mask_update_{name}": value for name, value in given.items()}
    method = method_of(updating(text, tmp_path / "run", dense, **options))
    model = pruned()
    method.prepare(model)
    made = method.trainer(model, arguments(tmp_path / "trainer"))
    assert isinstance(made, SPPTrainer)
    assert asdict(made.mask_updates.options) == given
    assert made.mask_updates is not None
    assert made.mask_updates.fraction_at(3, 10) == pytest.approx(0.2 * 0.5**3)  # half of until · steps
    method.undo(model)


def test_the_learning_rate_and_the_recipes_are_the_methods() -> None:
    assert TuneConfig(**COMMON).lr == 4e-3
    assert TuneConfig(**COMMON, method="pst", pattern=0.5).lr == 1e-4
    for recipe, lr in (("default", 1e-4), ("paper", 1e-4), ("short", 1e-3)):
        c = TuneConfig.from_recipe(recipe, **COMMON, method="pst", pattern="0.50")
        assert (c.lr, c.dropout, c.pattern) == (lr, 0.0, "0.5")
        assert TuneConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    assert TuneConfig.from_recipe("paper", **COMMON, method="pst", pattern=0.5).weight_decay == 0.0
