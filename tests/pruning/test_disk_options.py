"""Streaming pruning in another dtype, by OWL, into one file or several: what pruning in memory and saving gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import spp.pruning.disk as streaming
import spp.pruning.loop as loop
import spp.pruning.work as work
from spp.certifying.save import save_model
from spp.certifying.verify import verify
from spp.errors import ConfigError, NonFiniteError, PatternError, StreamingError
from spp.pruning import OWL, prune
from spp.pruning.disk import prune_checkpoint
from tests.helpers.models import tiny_llama, tiny_tokenizer


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def _source(tmp_path: Path, **options: Any) -> Path:
    tiny_llama(num_hidden_layers=3, **options).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(directory.glob("*.safetensors")) for key, t in load_file(file).items()}


def _in_memory(source: Path, out: Path, *arguments: Any, dtype: Any = "auto", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    report = prune(model, *arguments, **options)
    save_model(model, out)
    return report


def _assert_same(one: Path, other: Path) -> None:
    first, second = _tensors(one), _tensors(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    assert json.loads((one / "sparsity.json").read_text()) == json.loads((other / "sparsity.json").read_text())
    assert AutoConfig.from_pretrained(one).dtype == AutoConfig.from_pretrained(other).dtype


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot", "magnitude+dsnot", "sparsegpt+dsnot"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_files_equal_those_of_pruning_in_memory(tmp_path: Path, method: str, dtype: torch.dtype | None) -> None:
    source = _source(tmp_path)
    report = prune_checkpoint(source, tmp_path / "out", method, "2:4", _ids(), dtype=dtype)
    expected = _in_memory(source, tmp_path / "expected", method, "2:4", _ids(), dtype=dtype or "auto")
    _assert_same(tmp_path / "out", tmp_path / "expected")
    assert report.sparsity == expected.sparsity


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    source = _source(tmp_path)
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    _in_memory(source, tmp_path / "expected", "magnitude", "1:4")
    with pytest.raises(AssertionError):
        _assert_same(tmp_path / "out", tmp_path / "expected")


def test_float16_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", "wanda", 0.5, _ids(), dtype=torch.float16)
    _in_memory(tmp_path / "model", tmp_path / "expected", "wanda", 0.5, _ids(), dtype=torch.float16)
    _assert_same(tmp_path / "out", tmp_path / "expected")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tensors_of_several_dtypes_are_read_as_transformers_does(tmp_path: Path) -> None:
    source = _source(tmp_path)
    tensors = load_file(source / "model.safetensors")
    mixed = {key: t if "norm" in key else t.to(torch.bfloat16) for key, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    _in_memory(source, tmp_path / "expected", "wanda", "2:4", _ids())
    _assert_same(tmp_path / "out", tmp_path / "expected")
    assert {t.dtype for t in _tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_tensor_that_the_model_does_not_have_is_kept(tmp_path: Path) -> None:
    source = _source(tmp_path)
    strange = {"model.layers.0.strange": torch.arange(3.0), "extra.count": torch.arange(3)}
    save_file({**load_file(source / "model.safetensors"), **strange}, source / "model.safetensors")
    prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids(), dtype=torch.bfloat16)
    tensors = _tensors(tmp_path / "out")
    assert torch.equal(tensors["model.layers.0.strange"], torch.arange(3.0).bfloat16())
    assert torch.equal(tensors["extra.count"], torch.arange(3))


@pytest.mark.parametrize("tied", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_what_overflows_in_the_dtype_is_named(tmp_path: Path, tied: str) -> None:
    source = _source(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors[tied].view(-1)[0] = 1e30
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(NonFiniteError, match=f"{tied} overflows in float16"):
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_dtypes_that_make_no_sense(tmp_path: Path) -> None:
    source = _source(tmp_path)
    with pytest.raises(ConfigError, match="known: float64, float32"):
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", dtype=torch.int8)
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for stored in (torch.float8_e4m3fn, torch.int8):
        save_file({**tensors, key: tensors[key].to(stored)}, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=f"{key} is stored as {str(stored)[6:]}: a quantized"):
            prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")


def test_tied_embeddings_stay_tied_and_untouched(tmp_path: Path) -> None:
    source = _source(tmp_path, tie_word_embeddings=True)
    prune_checkpoint(source, tmp_path / "out", "sparsegpt", 0.5, _ids())
    before, after = _tensors(source), _tensors(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def _killed(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_owl(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, owl = _source(tmp_path), OWL(threshold=3.0, spread=0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "prune_layer", _killed)  # behind the pass that counts outliers
        prune_checkpoint(source, tmp_path / "out", method, 0.6, _ids(), owl=owl)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "owl_patterns", _killed)  # which is not repeated
        report = prune_checkpoint(source, tmp_path / "out", method, 0.6, _ids(), owl=owl)
    expected = _in_memory(source, tmp_path / "expected", method, 0.6, _ids(), owl=owl)
    _assert_same(tmp_path / "out", tmp_path / "expected")
    patterns = {path: layer.pattern for path, layer in report.layers.items()}
    assert patterns == {path: layer.pattern for path, layer in expected.layers.items()}
    assert len(set(patterns.values())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "model", "out"]


def test_owl_starts_anew_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "prune_layer", _killed)
        prune_checkpoint(source, tmp_path / "out", "wanda", 0.6, _ids(), owl=OWL(spread=0.1))
    prune_checkpoint(source, tmp_path / "out", "wanda", 0.6, _ids())
    _in_memory(source, tmp_path / "expected", "wanda", 0.6, _ids())
    _assert_same(tmp_path / "out", tmp_path / "expected")


def test_one_file_or_one_for_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    prune_checkpoint(source, tmp_path / "one", "wanda", "2:4", _ids())
    monkeypatch.setattr(work, "_LARGEST_SINGLE", 100_000)
    prune_checkpoint(source, tmp_path / "several", "wanda", "2:4", _ids())
    assert [p.name for p in sorted((tmp_path / "one").glob("model*"))] == ["model.safetensors"]
    names = [f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")]
    index = "model.safetensors.index.json"
    assert [p.name for p in sorted((tmp_path / "several").glob("model*"))] == [*names, index]
    _assert_same(tmp_path / "one", tmp_path / "several")
    values = json.loads((tmp_path / "several" / index).read_text())
    tensors = _tensors(tmp_path / "several")
    assert values["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name in names:
        assert {key for key, file in values["weight_map"].items() if file == name} == load_file(
            tmp_path / "several" / name
        ).keys()
    for directory in (tmp_path / "one", tmp_path / "several"):
        verify(directory)
        state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "one", "several"]


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = _source(tmp_path), []
    real = streaming.StreamedModel.load

    def counting(self: Any, keys: Any, origin: Any) -> None:
        real(self, keys, origin)
        names = [name for name, p in self.model.named_parameters() if not p.is_meta]
        seen.append(sorted({name.split(".")[2] for name in names if ".layers." in name}))
        assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names

    monkeypatch.setattr(streaming.StreamedModel, "load", counting)
    prune_checkpoint(source, tmp_path / "out", "wanda", 0.5, _ids(), owl=OWL())
    assert seen == [[], *2 * [["0"], ["1"], ["2"]]]


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("1 <= N < M", {"pattern": "4:4"}),
        ("fraction", {"pattern": 1.0}),
        ("not a regular expression", {"pattern": {"(": "2:4"}}),
        ("not a regular expression", {"target_modules": "("}),
        ("not a regular expression", {"exclude_modules": "*"}),
        ("one fraction", {"owl": OWL()}),
        ("owl= needs calibration", {"owl": OWL(), "pattern": 0.5}),
        ("nsamples", {"nsamples": 0}),
        ("seed", {"seed": 0.5}),
        ("known", {"method": "guess"}),
    ],
)
def test_options_are_checked_before_anything_is_read(
    tmp_path: Path, match: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "checkpoint_directory", _killed)
    with pytest.raises(ConfigError, match=match):
        prune_checkpoint("nobody/nothing", tmp_path / "out", **{"method": "magnitude", **options})


def test_what_cannot_be_streamed_says_so(tmp_path: Path) -> None:
    source = _source(tmp_path)
    lost = load_file(source / "model.safetensors")
    with pytest.raises(StreamingError, match="outside the decoder blocks"):
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", target_modules=["lm_head", "q_proj"])
    save_file({"base." + key: t for key, t in lost.items()}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StreamingError, match="stored otherwise"):
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_owls_spread_must_leave_something(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="spread below"):
        prune_checkpoint(_source(tmp_path), tmp_path / "out", "wanda", 0.9, _ids(), owl=OWL(spread=0.4))
