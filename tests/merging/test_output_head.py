"""An untied output head that was pruned and adapted by name: merged, certified and protected as projections are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spp
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify, save_model
from spp.certifying.verify import verify
from spp.errors import AdapterError, MaskError
from spp.merging.disk import merge_checkpoint
from tests.helpers.checkpoints import Q0, grown, pruned_model, rewrite, same_tensors, tensors_of
from tests.helpers.models import tiny_llama

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TARGETS = ["q_proj", "lm_head"]


def with_pruned_head() -> Any:
    model = pruned_model()
    with torch.no_grad():
        blocks = model.lm_head.weight.view(-1, 16, 4)
        blocks.scatter_(-1, blocks.abs().argsort(dim=-1, stable=True)[..., :2], 0.0)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(with_pruned_head(), tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = spp.wrap(with_pruned_head(), r=4, seed=1, target_modules=TARGETS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.normal_(0, 0.3, generator=generator)
    return spp.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_head_is_merged_as_in_memory(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    report = merge_checkpoint(base, adapter, tmp_path / "out", dtype=dtype)
    model = spp.load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = spp.merge(model, dtype=dtype)
    save_model(model, tmp_path / "expected")
    assert same_tensors(tmp_path / "out", tmp_path / "expected")
    assert "lm_head" in report.layers and report.layers == expected.layers
    before, after = tensors_of(base)[HEAD], tensors_of(tmp_path / "out")[HEAD]
    assert torch.equal(before == 0, after == 0) and not torch.equal(before.to(after.dtype), after)
    one, other = Certificate.read(tmp_path / "out"), Certificate.read(tmp_path / "expected")
    assert HEAD in one.tensors and one.tensors[HEAD].pattern == "2:4"
    assert (one.tensors, one.other) == (other.tensors, other.other)
    assert one.base == other.base and one.base is not None and one.base.fingerprint == one.fingerprint()
    assert verify(tmp_path / "out") == report.sparsity_report == verify(base, tmp_path / "out")


def test_a_changed_mask_of_the_head_is_caught(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "out")
    rewrite(tmp_path / "out", {HEAD: grown(tensors_of(tmp_path / "out")[HEAD])})
    for check in (lambda: verify(tmp_path / "out"), lambda: verify(base, tmp_path / "out")):
        with pytest.raises(MaskError, match=HEAD):
            check()
    with pytest.raises(MaskError, match=HEAD):
        verify(with_pruned_head(), AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with pytest.raises(MaskError, match=HEAD):
        certify(tmp_path / "out", base)


def test_a_pruned_head_that_is_gone_is_caught(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    rewrite(other, {HEAD: None})
    with pytest.raises(MaskError, match=f"{HEAD}: only in {base}"):
        verify(base, other)


def test_a_dense_head_and_an_embedding_may_change(tmp_path: Path) -> None:
    one = pruned_model()
    with torch.no_grad():
        one.model.embed_tokens.weight[:200] = 0.0
        one.lm_head.weight[:25] = 0.0  # of 256 rows: less than a tenth
    other = tiny_llama()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.model.embed_tokens.weight.fill_(1.0)
        other.lm_head.weight.fill_(1.0)
    assert HEAD not in verify(one, other).tensors
    with torch.no_grad():
        one.lm_head.weight[25] = 0.0
    with pytest.raises(MaskError, match=HEAD):
        verify(one, other)


def test_a_wrapped_head_counts_with_its_frozen_weight(base: Path) -> None:
    assert HEAD in verify(base, spp.wrap(with_pruned_head(), r=4, target_modules=TARGETS)).tensors


def test_certify_keeps_what_the_certificate_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoint(base, adapter, out)
    tensors = Certificate.read(out).tensors
    certify(out)
    assert Certificate.read(out).tensors == tensors
    certify(out, base)
    assert Certificate.read(out).tensors == tensors
    (out / "sparsity.json").unlink()
    certify(out, base)
    assert Certificate.read(out).tensors == tensors and EMBEDDING not in tensors


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.sampled(4)
@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_pruned_head_that_is_left_alone_keeps_its_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, certified: bool, kernels: str
) -> None:
    monkeypatch.setenv("SPP_KERNELS", kernels)
    model = with_pruned_head()
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.model.layers[0].self_attn.q_proj.weight):
            weight[:2] *= 1e-9  # nothing in float16
    base = save_model(model, tmp_path / "base")
    if certified:
        certify(base, model)
    model = spp.wrap(model, r=4, seed=1, target_modules=["k_proj"])
    adapter, out = spp.save_adapter(model, tmp_path / "adapter"), tmp_path / "out"
    merge_checkpoint(base, adapter, out, dtype=dtype)
    spp.merge(model, dtype=dtype)
    save_model(model, tmp_path / "expected")
    assert same_tensors(out, tmp_path / "expected")
    assert HEAD in verify(base, out).tensors
    assert (HEAD in verify(out).tensors) == certified


def test_a_merge_that_leaves_a_layer_out_writes_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spp.merging import disk

    find = disk.find_places
    monkeypatch.setattr(disk, "find_places", lambda *given: [p for p in find(*given) if p.keys != (Q0,)])
    with pytest.raises(AdapterError, match=Q0.removesuffix(".weight")):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
