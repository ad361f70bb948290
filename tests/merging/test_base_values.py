"""A merge on disk compares the base's values with those of training: silent on the same base in any shape."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import spp
from spp.certifying import scan
from spp.errors import AdapterError, CheckpointError, MaskError, SPPWarning
from spp.files.hashes import VALUES_PIECE
from spp.kernels import use_kernels
from spp.merging.disk import merge_checkpoint
from spp.weights.base_values import NOT_COMPARABLE, OTHER, SAME, UNKNOWN
from tests.helpers.checkpoints import Q0, UP1, contents, pruned_model, rewrite, shard, tensors_of, wrapped_model
from tests.helpers.models import moe_model
from tests.weights.test_base_values import config_of, edit
from tests.wrapping.test_wrap import stir

BF16, F32 = torch.bfloat16, torch.float32


def copied(base: Path, to: Path) -> Path:
    return Path(shutil.copytree(base, to))


def resharded(base: Path, to: Path) -> Path:
    return shard(base, to, 3)


def widened(base: Path, to: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).save_pretrained(to)
    return to


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("make", [None, copied, resharded, widened])
def test_the_same_base_in_any_shape_is_silent(
    make: Callable[[Path, Path], Path] | None,
    kernels: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = base if make is None else make(base, tmp_path / "other")
    with use_kernels(kernels), caplog.at_level(logging.WARNING, "spp"):
        report = merge_checkpoint(other, adapter, tmp_path / "out", strict_values=True)
    assert report.base.state == report.to_dict()["base_values"] == SAME and report.base.line == ""
    assert caplog.text == ""


def test_the_pieces_of_a_merge_are_those_of_the_format() -> None:
    assert scan.entry_pieces(VALUES_PIECE + 1) == [(0, VALUES_PIECE), (VALUES_PIECE, VALUES_PIECE + 1)]


def scale(base: Path) -> None:
    rewrite(base, {key: t * 1.5 for key, t in tensors_of(base).items() if t.dim() == 2})


def flip_a_bit(base: Path) -> None:
    weight = tensors_of(base)[Q0]
    weight.view(torch.int32).view(-1)[weight.view(-1).nonzero()[0]] ^= 1
    rewrite(base, {Q0: weight})


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("lie", "layers"), [(scale, "14 of 14"), (flip_a_bit, "1 of 14")])
def test_other_values_are_said_and_refused_if_asked(
    lie: Callable[[Path], None], layers: str, dry_run: bool, kernels: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, base_model_name_or_path="the/base")
    lie(base)
    out = tmp_path / "out"
    with use_kernels(kernels):
        with pytest.raises(AdapterError, match=rf"trained on: .* {layers} layers, .*the/base: pass that one"):
            merge_checkpoint(base, adapter, out, dry_run=dry_run, strict_values=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
        with pytest.warns(SPPWarning, match=rf"{layers} layers, first in .*the/base") as caught:
            report = merge_checkpoint(base, adapter, out, dry_run=dry_run)
    assert len(caught) == 1 and out.exists() != dry_run
    assert report.base.state == OTHER and layers in report.base.line


def test_the_base_that_was_passed_is_not_offered_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter, base_model_name_or_path=str(base))
    first = tensors_of(base)[Q0]
    rewrite(base, {Q0: first.masked_fill(first == first[first != 0][0], 0)})  # at its own path, pruned again
    with pytest.raises(MaskError, match=rf"1 layers: .*q_proj; .*{base} as it was in training; this one is from") as e:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert "changed since" in str(e.value) and "pass that one" not in str(e.value)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    with pytest.raises(MaskError, match=rf"the adapter belongs to {base}: pass that one"):
        merge_checkpoint(other, adapter, tmp_path / "out")
    edit(adapter, base_model_name_or_path="/no/such")
    with pytest.raises(MaskError, match="belongs to /no/such, which is no longer there"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(MaskError, match="do not say which: pass the one that it was trained on"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_an_overwritten_output_stays_where_values_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "out")
    before = contents(tmp_path / "out")
    scale(base)
    with pytest.raises(AdapterError):
        merge_checkpoint(base, adapter, tmp_path / "out", overwrite=True, strict_values=True)
    assert contents(tmp_path / "out") == before


def test_edited_malformed_and_missing_hashes(base: Path, adapter: Path, tmp_path: Path) -> None:
    values = config_of(adapter)["base_values"]
    edit(adapter, base_values={**values, UP1.removesuffix(".weight"): "0" * 64})
    with pytest.warns(SPPWarning, match="1 of 14 layers, first in model.layers.1.mlp.up_proj"):
        merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
    for wrong in ([], {Q0: "0" * 10}):
        edit(adapter, base_values=wrong)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: base_values must"):
            merge_checkpoint(base, adapter, tmp_path / "out")
    edit(adapter, base_values=None, base_forms=None)
    scale(base)
    report = merge_checkpoint(base, adapter, tmp_path / "out", strict_values=True)
    assert report.base.state == report.to_dict()["base_values"] == UNKNOWN


@pytest.mark.parametrize(("stored", "trained", "state"), [(F32, BF16, SAME), (BF16, F32, SAME), (BF16, BF16, SAME)])
def test_trained_in_another_dtype_than_is_stored(
    stored: torch.dtype, trained: torch.dtype, state: str, tmp_path: Path
) -> None:
    spp.save_model(pruned_model(stored), tmp_path / "base")
    model = stir(spp.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=trained), r=4))
    adapter = spp.save_adapter(model, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", strict_values=True)
    assert report.base.state == state
    scale(tmp_path / "base")
    if stored == F32 or trained == BF16:
        with pytest.raises(AdapterError, match="14 of 14"):
            merge_checkpoint(tmp_path / "base", adapter, tmp_path / "two", strict_values=True)


def test_what_cannot_be_compared_is_a_fact(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = tmp_path / "narrow"
    AutoModelForCausalLM.from_pretrained(base, dtype=BF16).save_pretrained(narrow)
    with caplog.at_level(logging.INFO, "spp"):
        report = merge_checkpoint(narrow, adapter, tmp_path / "out", strict_values=True)
    assert report.to_dict()["base_values"] == NOT_COMPARABLE
    assert report.base.note == "trained on float32, this one is bfloat16" and report.base.note in caplog.text
    edit(adapter, base_forms=dict.fromkeys(config_of(adapter)["base_values"], "nf4 in blocks of 64"))
    report = merge_checkpoint(base, adapter, tmp_path / "two", strict_values=True)
    assert report.base.line == "base values: not comparable: trained on nf4 in blocks of 64, this one is float32"


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_apart_on_disk_and_fused_in_memory(architecture: str, tmp_path: Path) -> None:
    model = moe_model(architecture)
    spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, tmp_path / "base")
    adapter = spp.save_adapter(stir(spp.wrap(model, r=2)), tmp_path / "adapter")
    assert merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", strict_values=True).base.state == SAME
    key = next(key for key in sorted(tensors_of(tmp_path / "base")) if "experts" in key and "bias" not in key)
    rewrite(tmp_path / "base", {key: tensors_of(tmp_path / "base")[key] * 2})
    with pytest.warns(SPPWarning, match=r"1 of \d+ layers, first in .*experts"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "two")


def test_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)).eval()
    spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, tmp_path / "base")
    for packed in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapter = spp.save_adapter(stir(spp.wrap(loaded, r=2, packed=packed)), tmp_path / f"adapter{packed}")
        report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"out{packed}", strict_values=True)
        assert report.base.state == SAME
    scale(tmp_path / "base")
    with pytest.warns(SPPWarning, match="4 of 4 layers"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "two")


def test_tied_weights(tmp_path: Path) -> None:
    model = pruned_model(tie_word_embeddings=True)
    spp.save_model(model, tmp_path / "base")
    assert "lm_head.weight" not in tensors_of(tmp_path / "base")
    adapter = spp.save_adapter(stir(spp.wrap(model, r=4)), tmp_path / "adapter")
    assert merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", strict_values=True).base.state == SAME


def test_a_packed_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    spp.export_packed(base, tmp_path / "packed")
    model = spp.load_adapter(spp.load_packed(tmp_path / "packed"), adapter, strict_values=True)
    assert spp.merge(model).base.state == SAME
    again = spp.save_adapter(spp.load_adapter(spp.load_packed(tmp_path / "packed"), adapter), tmp_path / "again")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert merge_checkpoint(tmp_path / "dense", again, tmp_path / "out", strict_values=True).base.state == SAME


def test_several_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    wide = spp.save_adapter(wrapped_model(BF16, target_modules=["up_proj"]), tmp_path / "wide")
    parts = [(adapter, 0.5), (wide, 0.5)]
    assert merge_checkpoint(base, parts, tmp_path / "out", strict_values=True).base.state == SAME
    flip_a_bit(base)  # of a layer that only the first has, and that bfloat16 would not show
    with pytest.raises(AdapterError, match=rf"those that {adapter} was.*1 of 14 layers"):
        merge_checkpoint(base, parts, tmp_path / "two", strict_values=True)
    scale(base)
    with pytest.warns(SPPWarning) as caught:
        merge_checkpoint(base, parts, tmp_path / "two")
    assert ["14 of 14" in str(one.message) for one in caught] == [True, False] and "2 of 2" in str(caught[1].message)


def test_mixed_dtypes(tmp_path: Path) -> None:
    model = pruned_model()
    model.get_submodule("model.layers.0.mlp.up_proj").to(BF16)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapter = spp.save_adapter(stir(spp.wrap(model, r=4)), tmp_path / "adapter")
    assert sorted(set(config_of(adapter)["base_forms"].values())) == ["bfloat16", "float32"]
    assert merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", strict_values=True).base.state == SAME
