"""Streaming pruning equals pruning in memory, resumes where it was killed, and refuses what it cannot stream."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model

import spp.pruning.loop as loop
import spp.pruning.work as work
from spp.certifying.verify import verify
from spp.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    PatternError,
    TargetError,
)
from spp.files import CheckpointReader, save_tensors
from spp.models.projection import Projection
from spp.pruning import prune
from spp.pruning.disk import prune_checkpoint
from tests.helpers.models import moe_model, tiny_llama, tiny_tokenizer


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def _source(tmp_path: Path, **options: Any) -> Path:
    model = tiny_llama(num_hidden_layers=3, **options)
    model.save_pretrained(tmp_path / "model", max_shard_size="150KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _load(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def _expected(source: Path, method: str, pattern: Any) -> tuple[dict[str, torch.Tensor], Any]:
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    report = prune(model, method, pattern, _ids())
    return model.state_dict(), report


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "pattern"), [("wanda", "2:4"), ("sparsegpt", 0.5), ("dsnot", {".*": "1:4"})])
def test_equals_pruning_in_memory(tmp_path: Path, method: str, pattern: Any, tied: bool) -> None:
    source = _source(tmp_path, tie_word_embeddings=tied)
    report = prune_checkpoint(source, tmp_path / "out", method, pattern, _ids())
    expected, in_memory = _expected(source, method, pattern)
    assert _same(_load(tmp_path / "out"), expected)
    assert list(report.layers) == list(in_memory.layers)
    for path, layer in report.layers.items():
        other = in_memory.layers[path]
        assert (layer.sparsity, layer.pattern, layer.shape) == (other.sparsity, other.pattern, other.shape)
        assert layer.relative_error == pytest.approx(other.relative_error)
    assert verify(tmp_path / "out").sparsity == pytest.approx(report.sparsity)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_experts_stream_whatever_the_names_on_disk(tmp_path: Path, architecture: str) -> None:
    source = tmp_path / "model"
    moe_model(architecture).save_pretrained(source)
    report = prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    expected, in_memory = _expected(source, "wanda", "2:4")
    assert _same(_load(tmp_path / "out"), expected)
    assert [(p, layer.sparsity, layer.tokens) for p, layer in report.layers.items()] == [
        (p, layer.sparsity, layer.tokens) for p, layer in in_memory.layers.items()
    ]
    with CheckpointReader(source) as before, CheckpointReader(tmp_path / "out") as after:
        assert {key: before.shape(key) for key in before} == {key: after.shape(key) for key in after}
    patterns = {tensor.pattern for tensor in verify(tmp_path / "out").tensors.values()}
    assert patterns == {"2:4"}


def test_experts_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    moe_model("mixtral").save_pretrained(source)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _kill_at(patch, 9)  # in the second block
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    with monkeypatch.context() as patch:
        seen = _kill_at(patch, 999)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    assert len(seen) == 6
    assert _same(_load(tmp_path / "out"), _expected(source, "wanda", "2:4")[0])


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=3, vocab_size=96, n_positions=64)
    torch.manual_seed(0)
    GPT2Model(config).save_pretrained(tmp_path / "model")  # "h.0.attn…", where the causal model has "transformer.h.0…"
    prune_checkpoint(tmp_path / "model", tmp_path / "out", "sparsegpt", "2:4", _ids())
    assert _same(_load(tmp_path / "out"), _expected(tmp_path / "model", "sparsegpt", "2:4")[0])
    certified = verify(tmp_path / "out").tensors
    assert {tensor.pattern for tensor in certified.values()} == {"2:4"}  # along (in, out) storage
    assert certified["h.0.attn.c_attn.weight"].shape == (32, 96)


def test_magnitude_streams_without_calibration(tmp_path: Path) -> None:
    source = _source(tmp_path)
    prune_checkpoint(source, tmp_path / "out", "magnitude", 0.5)
    model = AutoModelForCausalLM.from_pretrained(source)
    prune(model, "magnitude", 0.5)
    assert _same(_load(tmp_path / "out"), model.state_dict())


def test_bfloat16_stays(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", "wanda", "2:4", _ids())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    prune(model, "wanda", "2:4", _ids())
    tensors = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert _same(tensors, model.state_dict())


class _Killed(BaseException):
    pass


def _kill_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[str]:
    """Let `prune_layer` die at the given call; return the paths that it is called with."""
    seen: list[str] = []
    real = loop.prune_layer

    def counting(layer: Projection, *args: Any) -> Any:
        seen.append(layer.path)
        if len(seen) == calls:
            raise _Killed
        return real(layer, *args)

    monkeypatch.setattr(loop, "prune_layer", counting)
    return seen


def test_a_killed_run_goes_on_at_the_last_finished_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _kill_at(patch, 17)  # in the third block
        prune_checkpoint(source, tmp_path / "out", "sparsegpt", "2:4", _ids())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.pruning", "model"]
    with monkeypatch.context() as patch:
        seen = _kill_at(patch, 999)
        report = prune_checkpoint(source, tmp_path / "out", "sparsegpt", "2:4", _ids())
    assert len(seen) == 7
    assert all(".2." in path for path in seen)
    expected, in_memory = _expected(source, "sparsegpt", "2:4")
    assert _same(_load(tmp_path / "out"), expected)
    assert list(report.layers) == list(in_memory.layers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_full_disk_is_said_and_what_is_finished_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real, written = _source(tmp_path), work.save_tensors, []

    def full(path: Path, tensors: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="space"):
        patch.setattr(work, "save_tensors", full)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        seen = _kill_at(patch, 999)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    assert len(seen) == 14
    assert _same(_load(tmp_path / "out"), _expected(source, "wanda", "2:4")[0])


def test_a_run_that_was_killed_at_the_very_end_only_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)

    def killed(*args: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(work, "carry_files", killed)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    with monkeypatch.context() as patch:
        patch.setattr(loop.BlockRunner, "run", killed)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    assert _same(_load(tmp_path / "out"), _expected(source, "wanda", "2:4")[0])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changed", [None, "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_finished_blocks_are_those_of_the_weights_whatever_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: str | None
) -> None:
    source = _source(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _kill_at(patch, 17)
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    with CheckpointReader(source) as reader:
        shard = source / reader.file_of(changed or "model.embed_tokens.weight")
        tensors = {key: reader.load(key) for key in reader.shards()[shard.name]}
    times = shard.stat()
    if changed is None:  # copied, or fetched again
        os.utime(shard, (2**33, 2**33))
    else:
        tensors[changed].view(-1)[-1] += 1
        save_tensors(shard, tensors)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        seen = _kill_at(patch, 999)
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    assert len(seen) == (7 if changed is None else 21)
    assert ("starting anew" in caplog.text) == (changed is not None)
    assert _same(_load(tmp_path / "out"), _expected(source, "magnitude", "2:4")[0])


def test_another_job_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = _source(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _kill_at(patch, 17)
        prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids())
    prune_checkpoint(source, tmp_path / "out", "wanda", "1:4", _ids())
    assert "another job" in caplog.text
    assert _same(_load(tmp_path / "out"), _expected(source, "wanda", "1:4")[0])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    source, out = _source(tmp_path), tmp_path / "out"
    with pytest.raises(ConfigError, match="needs calibration"):
        prune_checkpoint(source, out)
    with pytest.raises(ConfigError, match="known"):
        prune_checkpoint(source, out, "nonsense")
    with pytest.raises(PatternError, match=r"layers\.0.*nearest"):
        prune_checkpoint(source, out, "wanda", "2:6", _ids())
    with pytest.raises(TargetError, match="no linear"):
        prune_checkpoint(source, out, "wanda", "2:4", _ids(), target_modules=["nothing"])
    with pytest.raises(ConfigError, match="output"):
        prune_checkpoint(source, source / "inside", "wanda", "2:4", _ids())
    with pytest.raises(CheckpointError):
        prune_checkpoint(tmp_path / "missing", out, "magnitude")
    out.mkdir()
    with pytest.raises(OutputExistsError):
        prune_checkpoint(source, out, "magnitude")
    prune_checkpoint(source, out, "magnitude", overwrite=True)
    assert verify(out).sparsity == pytest.approx(0.5, abs=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_weights_under_other_names_or_quantized_are_refused(tmp_path: Path) -> None:
    source = _source(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3"):
        prune_checkpoint(source, tmp_path / "out", "magnitude")
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="another shape"):
        prune_checkpoint(source, tmp_path / "out", "magnitude")
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantized"):
        prune_checkpoint(source, tmp_path / "out", "magnitude")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_bad_weight_is_named_and_no_output_appears(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", "wanda", "2:4", _ids())
    assert not (tmp_path / "out").exists()
