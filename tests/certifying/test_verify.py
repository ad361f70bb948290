"""verify tells every kind of change apart and lists all of them; sparsity counts."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify
from spp.certifying.verify import sparsity, verify
from spp.errors import CheckpointError, ConfigError, MaskError, NonFiniteError
from tests.helpers.checkpoints import Q0, UP1, grown, pruned_model, rewrite, shard, tensors_of, wrapped_model
from tests.helpers.models import moe_model

NORM = "model.norm.weight"


def edit(folder: Path, change: Any) -> None:
    path = folder / "sparsity.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_directory_passes_its_own_certificate(base: Path, tmp_path: Path) -> None:
    report = verify(base)
    assert report.pattern == "2:4" and report.sparsity == 0.5 and all(t.valid for t in report.tensors.values())
    pieces = shard(base, tmp_path / "shards")
    assert verify(pieces) == report  # how tensors are spread over files does not matter
    assert sparsity(pieces) == report


def test_changed_zeros_are_listed_with_all_tensors(base: Path) -> None:
    tensors = tensors_of(base)
    rewrite(base, {Q0: grown(tensors[Q0]), UP1: grown(tensors[UP1])})
    with pytest.raises(MaskError) as caught:
        verify(base)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [Q0, UP1]
    assert "2047 of 4096, the certificate says 2048" in lines[1]


def test_zeros_that_move_are_changed_zeros(base: Path) -> None:
    rewrite(base, {Q0: tensors_of(base)[Q0].roll(1, 0)})  # as many as before
    with pytest.raises(MaskError, match=Q0):
        verify(base)


def test_a_flipped_bit_in_a_weight_or_elsewhere_is_caught(base: Path) -> None:
    for key in (Q0, NORM):
        fresh = shutil.copytree(base, base.parent / key)
        tensor = tensors_of(base)[key]
        kept = tensor.view(-1).nonzero()[7]
        tensor.view(torch.int32).view(-1)[kept] ^= 1
        rewrite(fresh, {key: tensor})
        with pytest.raises(CheckpointError, match=f"{key}: its contents have changed"):
            verify(fresh)


def test_the_sign_of_a_zero_is_content_not_mask(base: Path) -> None:
    tensor = tensors_of(base)[Q0]
    tensor[tensor == 0] = -0.0
    rewrite(base, {Q0: tensor})
    with pytest.raises(CheckpointError, match="contents have changed"):
        verify(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"{NORM}: missing"),
        ({Q0: None}, f"{Q0}: missing"),
        ({"extra.weight": torch.ones(1)}, r"extra\.weight: not in the certificate"),
    ],
)
def test_missing_and_extra_tensors(base: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    rewrite(base, changes)
    with pytest.raises(CheckpointError, match=message):
        verify(base)


def test_another_shape_or_dtype(base: Path) -> None:
    tensor = tensors_of(base)[Q0]
    rewrite(base, {Q0: tensor.to(torch.bfloat16)})
    with pytest.raises(CheckpointError, match=f"{Q0}: bfloat16; the certificate says float32"):
        verify(base)
    rewrite(base, {Q0: tensor.view(32, 128)})
    with pytest.raises(MaskError, match=r"shape \(32, 128\); the certificate says \(64, 64\)"):
        verify(base)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(base: Path, bad: float) -> None:
    tensor = tensors_of(base)[Q0]
    tensor[tensor != 0] = bad
    rewrite(base, {Q0: tensor})
    with pytest.raises(NonFiniteError, match=f"{Q0}: NaN or infinity"):
        verify(base)
    assert not sparsity(base).tensors[Q0].valid
    model = pruned_model()
    with torch.no_grad():
        model.get_parameter(Q0).copy_(tensor)
    for pair in ((base, model), (pruned_model(), base), (model, pruned_model())):
        with pytest.raises(NonFiniteError, match=Q0):
            verify(*pair)


def test_a_certificate_that_lies(base: Path) -> None:
    def lie(values: dict[str, Any]) -> None:
        values["tensors"][Q0]["pattern"] = "1:4"

    edit(base, lie)
    with pytest.raises(MaskError, match="2048 zeros, 2:4; the certificate says 2048 zeros, 1:4"):
        verify(base)


def test_a_mask_that_is_named_since_may_still_be_called_unstructured(base: Path) -> None:
    """2:4 with half of what it keeps gone: certificates of earlier versions say "unstructured" of it."""
    weight = tensors_of(base)[Q0]
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.55] = 0
    rewrite(base, {Q0: weight})
    assert certify(base).tensors[Q0].pattern == "2:4"
    edit(base, lambda values: values["tensors"][Q0].update(pattern="unstructured"))
    verify(base)
    edit(base, lambda values: values["tensors"][Q0].update(pattern="4:8"))
    with pytest.raises(MaskError, match="zeros, 2:4; the certificate says"):
        verify(base)
    full = next(key for key, t in Certificate.read(base).tensors.items() if t.pattern == "2:4" and key != Q0)
    edit(base, lambda values: values["tensors"][full].update(pattern="unstructured"))
    with pytest.raises(MaskError, match=r"zeros, 2:4; the certificate says \d+ zeros, unstructured"):
        verify(base)


def test_a_base_whose_masks_are_others(base: Path) -> None:
    edit(base, lambda values: values.update(base={"name_or_path": "org/other", "fingerprint": "0" * 64}))
    with pytest.raises(MaskError, match="not those of org/other"):
        verify(base)
    good = Certificate.read(base).fingerprint()
    edit(base, lambda values: values.update(base={"name_or_path": "org/right", "fingerprint": good}))
    verify(base)


def test_a_newer_or_missing_certificate(base: Path) -> None:
    edit(base, lambda values: values.update(format_version=2))
    with pytest.raises(CheckpointError, match="install a newer spp"):
        verify(base)
    (base / "sparsity.json").unlink()
    with pytest.raises(CheckpointError, match=r"no sparsity\.json"):
        verify(base)


def test_deep_compares_sha256(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"certify\(dir, deep=True\)"):
        verify(base, deep=True)
    certify(base, deep=True)
    edit(base, lambda values: values["content_sha256"].update({NORM: "0" * 64}))
    verify(base)
    with pytest.raises(CheckpointError, match=f"{NORM}: the sha256"):
        verify(base, deep=True)
    with pytest.raises(ConfigError, match="deep=True"):
        verify(base, base, deep=True)


def test_two_models_in_every_form(base: Path) -> None:
    wrapped = wrapped_model()
    merged = wrapped_model()
    spp.merge(merged)
    report = sparsity(base)
    for before in (base, str(base), pruned_model(), wrapped):
        for after in (base, pruned_model(torch.bfloat16), wrapped, merged):
            found = verify(before, after)
            assert (found.pattern, found.sparsity, set(found.tensors)) == ("2:4", 0.5, set(report.tensors))
    assert sparsity(wrapped) == report  # α and β are no projections


def test_two_models_that_differ(base: Path) -> None:
    model = pruned_model()
    with torch.no_grad():
        for key in (UP1, Q0):
            model.get_parameter(key).copy_(grown(model.get_parameter(key)))
        model.get_parameter(NORM).zero_()  # no projection: not a matter of the mask
    with pytest.raises(MaskError) as caught:
        verify(base, model)
    assert str(caught.value).splitlines() == [
        f"the zeros of the LlamaForCausalLM are not those of {base}, in 2 tensors:",
        f"  {Q0}: 2 became non-zero, 1 became zero",
        f"  {UP1}: 2 became non-zero, 1 became zero",
    ]


def test_a_model_that_was_pruned_further(base: Path, tmp_path: Path) -> None:
    model, added = pruned_model(), sum(t.zeros for t in sparsity(base).tensors.values()) // 2
    spp.prune(model, "magnitude", "1:4")
    after = spp.save_model(model, tmp_path / "after")
    pieces, packed = shard(after, tmp_path / "pieces"), tmp_path / "packed"
    spp.export_packed(after, packed)
    for before in (base, pruned_model(), wrapped_model()):
        for further in (model, after, pieces, packed):
            report = verify(before, further, more_zeros_allowed=True)
            assert (report.zeros_added, report.pattern, report.to_dict()["zeros_added"]) == (added, "1:4", added)
            with pytest.raises(MaskError, match=r"verify\(before, after, more_zeros_allowed=True\)") as refused:
                verify(before, further)
            assert f"{Q0}: 0 became non-zero, 1024 became zero" in str(refused.value)
            with pytest.raises(MaskError, match=f"{Q0}: 1024 became non-zero, 0 became zero") as turned:
                verify(further, before, more_zeros_allowed=True)
            assert "more_zeros_allowed" not in str(turned.value)
    assert verify(base, pruned_model(), more_zeros_allowed=True).zeros_added == 0
    assert "zeros_added" not in verify(base, pruned_model()).to_dict()
    with pytest.raises(ConfigError, match="more_zeros_allowed=True compares"):
        verify(base, more_zeros_allowed=True)


@pytest.mark.parametrize("key", [UP1, "lm_head.weight"])
def test_one_zero_that_came_back_is_found_among_many_new_ones(tmp_path: Path, key: str) -> None:
    before = pruned_model()
    spp.prune(before, "magnitude", 0.3, target_modules="lm_head")
    spp.prune(model := copy.deepcopy(before), "magnitude", "1:4")
    spp.prune(model, "magnitude", 0.6, target_modules="lm_head")
    weight = model.get_parameter(key)
    place = tuple((before.get_parameter(key) == 0).nonzero()[-1])
    gone = int(((weight == 0) & (before.get_parameter(key) != 0)).sum())
    with torch.no_grad():
        weight[place] = 1e-45  # the smallest number there is
    first, last = spp.save_model(before, tmp_path / "first"), spp.save_model(model, tmp_path / "last")
    verify(last)  # its own certificate knows nothing of the model before
    for one in (before, first):
        for other in (model, last, shard(last, tmp_path / f"shards-{type(one).__name__}")):
            with pytest.raises(MaskError, match="in 1 tensor:") as caught:
                verify(one, other, more_zeros_allowed=True)
            assert str(caught.value).splitlines()[1:] == [f"  {key}: 1 became non-zero, {gone} became zero"]
    with torch.no_grad():
        weight[place] = -0.0
    assert verify(first, model, more_zeros_allowed=True).zeros_added


def test_models_of_other_shapes(base: Path) -> None:
    with pytest.raises(MaskError, match=r"shape \(64, 64\) became \(128, 128\)"):
        verify(base, pruned_model(hidden_size=128))
    with pytest.raises(MaskError, match=r"model\.layers\.2\.mlp\.down_proj\.weight: only in the Llama"):
        verify(base, pruned_model(num_hidden_layers=3))
    with pytest.raises(MaskError, match=r"layers\.1\..*: only in .*base"):
        verify(base, pruned_model(num_hidden_layers=1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_experts_that_are_stored_otherwise_than_they_are_held(tmp_path: Path, wrapped: bool) -> None:
    model = moe_model("mixtral")  # w1, w2, w3 of each expert on disk
    spp.prune(model, "magnitude", "2:4")
    folder = spp.save_model(model, tmp_path / "saved")
    name = "model.layers.1.mlp.experts.down_proj"
    zero = tuple((model.get_parameter(name)[1] == 0).nonzero()[0])
    if wrapped:
        spp.wrap(model, r=2)
    saved = spp.sparsity(folder)
    assert spp.verify(model, folder) == spp.verify(folder, model) == saved
    assert spp.certify(folder, base=model) == saved
    if not wrapped:
        spp.pack(model)
        assert spp.verify(model, folder) == spp.verify(folder, model) == saved
        spp.unpack(model)
    with torch.no_grad():
        model.get_parameter(name)[1][zero] = 1.0
    key = r"block_sparse_moe\.experts\.1\.w2\.weight: "
    with pytest.raises(MaskError, match=rf"in 1 tensor:\n  model\.layers\.1\.{key}1 became non-zero, 0 became zero"):
        spp.verify(folder, model)
    with pytest.raises(MaskError, match=rf"{key}0 became non-zero, 1 became zero"):
        spp.verify(model, folder)


def test_what_is_neither_model_nor_checkpoint(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certificate"):
        verify(pruned_model())
    with pytest.raises(ConfigError, match="found a int"):
        sparsity(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no projection weight"):
        (tmp_path / "empty").mkdir()
        shutil.copy(base / "config.json", tmp_path / "empty")
        rewrite_into(tmp_path / "empty")
        sparsity(tmp_path / "empty")
    with torch.device("meta"), pytest.raises(ConfigError, match="meta device"):
        sparsity(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError):
        verify(tmp_path / "nowhere")


def rewrite_into(folder: Path) -> None:
    from spp.files import save_tensors

    save_tensors(folder / "model.safetensors", {NORM: torch.ones(2)})


def test_subnormal_weights_are_kept_ones_in_any_process(base: Path) -> None:
    tensor = tensors_of(base)[Q0]
    tensor[tensor != 0] = 1e-45
    rewrite(base, {Q0: tensor})
    certify(base)
    assert Certificate.read(base).tensors[Q0].zeros == 2048
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert verify(base).tensors[Q0].zeros == 2048
    finally:
        torch.set_flush_denormal(False)
