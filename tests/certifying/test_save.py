"""save_model and certify: plain checkpoints with a certificate of what was really written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp
from spp.certifying import save as module
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify, save_model
from spp.certifying.verify import sparsity, verify
from spp.errors import (
    CheckpointError,
    ConfigError,
    MaskError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    SPPWarning,
    WrapError,
)
from spp.files import mask_sha256
from spp.files.hashes import fingerprint
from tests.helpers.checkpoints import Q0, UP1, grown, pruned_model, rewrite, tensors_of, wrapped_model
from tests.helpers.models import moe_model, projections, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_is_a_plain_checkpoint_with_a_certificate(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pruned_model(dtype)
    folder = save_model(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert folder == tmp_path / "out" and os.listdir(tmp_path) == ["out"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor) and loaded.state_dict()[key].dtype == dtype
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    certificate = Certificate.read(folder)
    assert set(certificate.tensors) == {f"{path}.weight" for path in projections(model)}
    assert certificate.tensors.keys() | certificate.other.keys() == tensors_of(folder).keys()
    assert certificate.base is None
    assert certificate.report().pattern == "2:4" and certificate.report().sparsity == 0.5
    assert verify(folder) == certificate.report() == sparsity(folder) == sparsity(model)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes  # no file is private


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_model(pruned_model(), tmp_path / name, tokenizer=tiny_tokenizer())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_a_merged_model_names_its_base(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    masks = {key: mask_sha256(t) for key, t in tensors_of(base).items() if key in Certificate.read(base).tensors}
    spp.wrap(model, r=4)
    spp.merge(model)
    record = Certificate.read(save_model(model, tmp_path / "out")).base
    assert record is not None
    assert (record.name_or_path, record.fingerprint) == (str(base), fingerprint(masks))
    assert verify(tmp_path / "out").pattern == "2:4"


def test_a_merged_model_that_was_changed_names_no_base(tmp_path: Path) -> None:
    model = wrapped_model()
    spp.merge(model)
    with torch.no_grad():
        model.get_parameter(Q0).copy_(grown(model.get_parameter(Q0)))
    with pytest.warns(SPPWarning, match="names no base"):
        save_model(model, tmp_path / "out")
    assert Certificate.read(tmp_path / "out").base is None
    verify(tmp_path / "out")


def test_names_that_differ_on_disk_are_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped_model()
    spp.merge(model)
    real = model.save_pretrained

    def renaming(folder: Path) -> None:
        real(folder)
        rewrite(folder, {Q0: None, Q0.replace("q_proj", "query_proj"): model.get_parameter(Q0).detach()})

    model.save_pretrained = renaming
    with caplog.at_level("WARNING", logger="spp"):
        save_model(model, tmp_path / "out")  # and no warning that it was changed
    assert "memory and disk name tensors differently" in caplog.text
    assert Certificate.read(tmp_path / "out").base is None
    verify(tmp_path / "out")


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"spp\.save_adapter.*spp\.merge"):
        save_model(wrapped_model(), tmp_path / "out")
    with pytest.raises(ConfigError, match="no save_pretrained"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_weight_that_is_not_finite_gets_no_certificate(tmp_path: Path, base: Path) -> None:
    model = pruned_model()
    with torch.no_grad():
        model.get_parameter(Q0)[1, 2] = math.nan
    with pytest.raises(NonFiniteError, match=Q0):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rewrite(base, {Q0: model.get_parameter(Q0).detach()})
    before = (base / "sparsity.json").read_bytes()
    with pytest.raises(NonFiniteError, match=Q0):
        certify(base)
    assert (base / "sparsity.json").read_bytes() == before


def test_outputs_are_guarded(tmp_path: Path, base: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(OutputExistsError):
        save_model(pruned_model(), base)
    with pytest.raises(OutputError, match="a part of the path is a file"):
        save_model(pruned_model(), base / "config.json" / "out")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    save_model(pruned_model(torch.bfloat16), base, overwrite=True)
    assert not (base / "tokenizer.json").exists()  # the old state is gone as a whole
    assert os.listdir(tmp_path) == ["base"]


def test_a_write_error_of_transformers_leaves_nothing(tmp_path: Path) -> None:
    model = pruned_model()

    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    model.save_pretrained = full
    with pytest.raises(OutputError, match="disk is full"):
        save_model(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_files_whose_zeros_are_not_those_in_memory_are_not_kept(tmp_path: Path) -> None:
    model = pruned_model()
    real = model.save_pretrained

    def careless(folder: Path) -> None:
        real(folder)
        rewrite(folder, {Q0: torch.ones(64, 64)})

    model.save_pretrained = careless
    with pytest.raises(MaskError, match=f"{Q0}: 2048 became non-zero, 0 became zero"):
        save_model(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_experts_that_are_stored_apart_are_compared_with_those_in_memory(tmp_path: Path) -> None:
    model = moe_model("mixtral")  # w1, w2, w3 of each expert on disk
    spp.prune(model, "magnitude", "2:4")
    save_model(model, tmp_path / "right")
    real = model.save_pretrained
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"

    def careless(folder: Path) -> None:
        real(folder)
        rewrite(folder, {key: grown(tensors_of(folder)[key])})

    model.save_pretrained = careless
    with pytest.raises(MaskError, match=f"in 1 tensor:\n  {key}: 2 became non-zero, 1 became zero"):
        save_model(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["right"]


def test_a_model_whose_files_nobody_can_check_is_not_saved(tmp_path: Path) -> None:
    model = pruned_model()
    real = model.save_pretrained

    def quantizing(folder: Path) -> None:
        real(folder)
        rewrite(folder, {Q0: torch.ones(2048, 1, dtype=torch.uint8), f"{Q0}.absmax": torch.ones(64)})

    model.save_pretrained = quantizing
    with pytest.raises(CheckpointError, match=r"1 of its 14 projections cannot be read.*bitsandbytes, 4 bits"):
        save_model(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_certify_writes_what_save_model_writes(base: Path) -> None:
    expected = (base / "sparsity.json").read_bytes()
    (base / "sparsity.json").unlink()
    report = certify(base)
    assert (base / "sparsity.json").read_bytes() == expected
    assert report == verify(base)


def test_certify_with_a_base_proves_its_zeros(base: Path, tmp_path: Path) -> None:
    merged = wrapped_model()
    spp.merge(merged)
    del merged._spp_base
    out = save_model(merged, tmp_path / "out")
    certify(out, base)
    record = Certificate.read(out).base
    assert record is not None and record.name_or_path == str(base)
    assert record.fingerprint == Certificate.read(base).fingerprint()
    certify(out, pruned_model())
    rewrite(base, {UP1: torch.ones(160, 64)})
    with pytest.raises(MaskError, match=UP1):
        certify(out, base)
    verify(out)


def test_a_deep_certificate_holds_sha256_of_everything(base: Path) -> None:
    certify(base, deep=True)
    values = json.loads((base / "sparsity.json").read_text())
    assert values["content_sha256"].keys() == tensors_of(base).keys()
    verify(base, deep=True)


def test_only_checkpoints_are_certified(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model"):
        certify(tmp_path)
    with pytest.raises(CheckpointError):
        certify(tmp_path / "nowhere")


def test_what_is_no_path_or_no_tokenizer_is_said(tmp_path: Path) -> None:
    for call in (spp.verify, spp.certify, lambda what: spp.merge_checkpoint(what, tmp_path, tmp_path / "out")):
        with pytest.raises(ConfigError, match="expected the path of a model, found a int"):
            call(5)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="tokenizer is 'pruned'; expected a tokenizer"):
        spp.save_model(pruned_model(), tmp_path / "out", tokenizer="pruned")


def test_a_folder_that_is_replaced_while_it_is_certified_gets_no_certificate_of_the_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.make_certificate

    def meanwhile(*arguments: object, **options: object) -> Certificate:
        made = real(*arguments, **options)
        monkeypatch.undo()  # of the other process
        save_model(pruned_model(torch.bfloat16), base, overwrite=True)
        return made

    before = pruned_model(torch.bfloat16)
    save_model(before, tmp_path / "expected")
    monkeypatch.setattr(module, "make_certificate", meanwhile)
    with pytest.raises(OutputError, match="was replaced by another process while it was certified"):
        certify(base)
    assert (base / "sparsity.json").read_bytes() == (tmp_path / "expected" / "sparsity.json").read_bytes()
