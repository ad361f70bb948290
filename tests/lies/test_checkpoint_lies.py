"""What is changed in a checkpoint's weights is caught, or is not promised: verify, certify, merge_checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.errors import AdapterError, CheckpointError, MaskError, NonFiniteError, SPPWarning
from tests.lies.made import (
    CERTIFICATE,
    DENORMAL,
    EMBEDDING,
    INDEX,
    INFINITY,
    MINUS_ZERO,
    NAN,
    NORM,
    NORM0,
    O0,
    Q0,
    Q1,
    SINGLE,
    UP1,
    Lie,
    Made,
    Raw,
    Said,
    Tell,
    bits,
    coded,
    copied,
    emptied,
    exchange,
    kept,
    move_in_group,
    put,
    quantized,
    relabel,
    rename,
    shortened,
    widened,
    zero,
)

Expected = tuple[Said, str]

CALLS: dict[str, Callable[[Path, Made], Any]] = {
    "verify(dir)": lambda folder, made: spp.verify(folder),
    "verify(base, dir)": lambda folder, made: spp.verify(made.base, folder),
    "certify(dir, base)": lambda folder, made: spp.certify(folder, made.base),
    "merge_checkpoint(dir, adapter)": lambda folder, made: spp.merge_checkpoint(
        folder, made.adapter, folder.parent / "out"
    ),
}

VALUES = (None, "two models may differ in values, and a new certificate is of what is there")
OTHERS = (None, "of two models the projections are compared")
NO_MATTER = (None, "a merge leaves alone what the adapter does not touch")
BASE_VALUES = (SPPWarning, "differ in 1 of 14 layers, first in model.layers.0.self_attn.q_proj")
CHANGED = "its contents have changed"
GPTQ = "stored as g_idx, qweight, scales (GPTQ)"


def everywhere(error: Said, says: str) -> tuple[Expected, Expected, Expected, Expected]:
    """The same from each of CALLS."""
    return ((error, says),) * 4  # type: ignore[return-value]  # four of them


# what is done: what each of CALLS must say of it, in their order
TABLE: dict[str, tuple[Tell, Expected, Expected, Expected, Expected]] = {
    "one bit of a kept weight": (
        bits(Q0, kept(7, flip=1)),
        (CheckpointError, f"{Q0}: {CHANGED}"),
        VALUES,
        VALUES,
        BASE_VALUES,
    ),
    "one bit of a norm": (
        bits(NORM, kept(3, flip=1)),
        (CheckpointError, f"{NORM}: {CHANGED}"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "a kept weight zeroed": (
        bits(Q0, kept(7, 0)),
        (MaskError, f"{Q0}: its zeros have changed: 513 of 1024, the certificate says 512"),
        (MaskError, f"{Q0}: 0 became non-zero, 1 became zero"),
        (MaskError, f"{Q0}: 0 became non-zero, 1 became zero"),
        (MaskError, "in 1 layers: model.layers.0.self_attn.q_proj"),
    ),
    "a zero filled": (
        bits(UP1, zero(40, 0x3F80)),
        (MaskError, f"{UP1}: its zeros have changed"),
        (MaskError, f"{UP1}: 1 became non-zero, 0 became zero"),
        (MaskError, f"{UP1}: 1 became non-zero, 0 became zero"),
        (MaskError, "in 1 layers: model.layers.1.mlp.up_proj"),
    ),
    "zeros moved within a group": (
        bits(Q0, move_in_group),
        (MaskError, f"{Q0}: its zeros have changed: 512 of 1024, the certificate says 512"),
        (MaskError, f"{Q0}: 1 became non-zero, 1 became zero"),
        (MaskError, f"{Q0}: 1 became non-zero, 1 became zero"),
        (MaskError, "in 1 layers: model.layers.0.self_attn.q_proj"),
    ),
    "a projection renamed": (
        rename(Q0, Q0.replace("q_proj", "p_proj")),
        (CheckpointError, f"{Q0}: missing"),
        (MaskError, f"{Q0}: only in"),
        (MaskError, f"{Q0}: only in"),
        (AdapterError, "model.layers.0.self_attn.q_proj: the base has no model.layers.0.self_attn.q_proj.weight"),
    ),
    "a norm renamed": (
        rename(NORM, "model.last_norm.weight"),
        (CheckpointError, "model.last_norm.weight: not in the certificate"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "two projections of a shape swapped": (
        exchange(Q0, O0),
        (MaskError, f"{O0}: its zeros have changed"),
        (MaskError, f"{Q0}: "),
        (MaskError, f"{O0}: "),
        (MaskError, "in 2 layers: model.layers.0.self_attn.o_proj, model.layers.0.self_attn.q_proj"),
    ),
    "two norms swapped": (exchange(NORM, NORM0), (CheckpointError, f"{NORM0}: {CHANGED}"), OTHERS, OTHERS, NO_MATTER),
    "a header that transposes a projection": (
        relabel(UP1, shape=[32, 64]),
        (MaskError, f"{UP1}: shape (32, 64); the certificate says (64, 32)"),
        (MaskError, f"{UP1}: shape (64, 32) became (32, 64)"),
        (MaskError, f"{UP1}: shape (64, 32) became (32, 64)"),
        (AdapterError, "model.layers.1.mlp.up_proj: weight is (32, 64)"),
    ),
    "a header with another dtype for a projection": (
        relabel(Q0, dtype="F16"),
        (CheckpointError, f"{Q0}: float16; the certificate says bfloat16"),
        (None, "two models may differ in dtypes"),
        (None, "a new certificate is of what is there"),
        (None, "float16 does not hold what was trained on, so nothing can be compared: logged"),
    ),
    "a header that transposes the embedding": (
        relabel(EMBEDDING, shape=[32, 64]),
        (CheckpointError, f"{EMBEDDING}: shape (32, 64); the certificate says (64, 32)"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "a header with another shape for a norm": (
        relabel(NORM, shape=[4, 8]),
        (CheckpointError, f"{NORM}: shape (4, 8); the certificate says (32,)"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "a header with another dtype for a norm": (
        relabel(NORM, dtype="F16"),
        (CheckpointError, f"{NORM}: float16; the certificate says bfloat16"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "everything converted, value for value": (
        widened,
        (CheckpointError, f"{Q0}: float32; the certificate says bfloat16"),
        (None, "two models may differ in dtypes"),
        (None, "a new certificate is of what is there"),
        (None, "the values are those of the base"),
    ),
    "NaN for a kept weight": (
        bits(Q0, kept(7, NAN)),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        (NonFiniteError, Q0),
        (NonFiniteError, Q0),
    ),
    "infinity for a zero": (
        bits(Q0, zero(7, INFINITY)),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        (MaskError, f"{Q0}: NaN or infinity"),
        (NonFiniteError, Q0),
        (NonFiniteError, Q0),
    ),
    "NaN in a norm": (
        bits(NORM, kept(3, NAN)),
        (CheckpointError, f"{NORM}: {CHANGED}"),
        OTHERS,
        (None, "NaN is looked for in projections alone"),
        NO_MATTER,
    ),
    "−0.0 for a zero": (
        bits(Q0, zero(7, MINUS_ZERO)),
        (CheckpointError, f"{Q0}: {CHANGED}"),
        (None, "−0.0 is a zero"),
        (None, "−0.0 is a zero"),
        (None, "−0.0 is a zero"),
    ),
    "a denormal for a kept weight": (
        bits(Q0, kept(7, DENORMAL)),
        (CheckpointError, f"{Q0}: {CHANGED}"),
        (None, "a denormal is not zero"),
        (None, "a denormal is not zero"),
        BASE_VALUES,
    ),
    "a denormal for a zero": (
        bits(Q0, zero(7, DENORMAL)),
        (MaskError, f"{Q0}: its zeros have changed"),
        (MaskError, f"{Q0}: 1 became non-zero, 0 became zero"),
        (MaskError, f"{Q0}: 1 became non-zero, 0 became zero"),
        (MaskError, "model.layers.0.self_attn.q_proj"),
    ),
    "a projection taken out": (
        put(Q0, "", None),
        (CheckpointError, f"{Q0}: missing"),
        (MaskError, f"{Q0}: only in"),
        (MaskError, f"{Q0}: only in"),
        (AdapterError, "the base has no model.layers.0.self_attn.q_proj.weight"),
    ),
    "a tensor put in": (
        put("model.scale", "F32", np.ones(3, np.uint32)),
        (CheckpointError, "model.scale: not in the certificate"),
        OTHERS,
        OTHERS,
        NO_MATTER,
    ),
    "one layer quantized": (
        quantized(1),
        (CheckpointError, f"model.layers.1.self_attn.q_proj: {GPTQ}"),
        (MaskError, f"{Q1}: only in"),
        (CheckpointError, f"7 of its 14 projections cannot be read: 7 {GPTQ}: model.layers.1.mlp.down_proj"),
        (CheckpointError, f"7 of its 14 projections cannot be read: 7 {GPTQ}"),
    ),
    "one projection as codes under its name": (
        coded(Q0),
        (MaskError, "model.layers.0.self_attn.q_proj: stored as weight, weight.absmax (bitsandbytes, 4 bits)"),
        (MaskError, "has it stored as weight, weight.absmax (bitsandbytes, 4 bits)"),
        (CheckpointError, "1 of its 14 projections cannot be read"),
        (CheckpointError, "1 of its 14 projections cannot be read"),
    ),
    "all layers quantized": (
        quantized(0, 1),
        *everywhere(CheckpointError, f"no projection weight that can be read: 14 {GPTQ}"),
    ),
    "a file without tensors": (
        emptied,
        *everywhere(CheckpointError, "no projection weight that can be read; it holds no tensor"),
    ),
    "a file cut short": (shortened(), *everywhere(CheckpointError, f"{SINGLE} is truncated")),
    "a file beside it that no index names": (
        lambda folder: shutil.copy(folder / SINGLE, folder / "model-2.safetensors") and None,
        *everywhere(None, "nobody loads it"),
    ),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_the_truth(call: str, truth: Made, tmp_path: Path) -> None:
    for name in ("base", "shards"):
        CALLS[call](copied(getattr(truth, name), tmp_path / name / "copy"), truth)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("name", list(TABLE))
def test_a_changed_checkpoint(name: str, call: str, truth: Made, tmp_path: Path) -> None:
    tell, *outcomes = TABLE[name]
    folder = copied(truth.base, tmp_path / "copy")
    lie = Lie(name, tell, *outcomes[list(CALLS).index(call)])
    lie.must_be_caught(folder, lambda folder: CALLS[call](folder, truth))
    if call.startswith("certify") and not lie.passes:  # the old certificate stays
        assert (folder / CERTIFICATE).read_bytes() == (truth.base / CERTIFICATE).read_bytes()
    assert (tmp_path / "out").exists() == (call.startswith("merge") and lie.passes)


def from_other_model(folder: Path) -> None:
    """The first shard is that of another model of the same shapes."""
    raw, other = Raw(folder / FIRST), Raw(folder.parent / "other" / SINGLE)
    for key in [key for key in raw.header if key != "__metadata__"]:
        raw.bits(key)[:] = other.bits(key)
    raw.save()


def in_index(change: Callable[[dict[str, str]], Any]) -> Tell:
    def tell(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return tell


def twice(folder: Path) -> None:
    """A tensor of the first shard is in the second one too."""
    array = Raw(folder / FIRST).bits(O0).copy()
    put(O0, "BF16", array, SECOND)(folder)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = [
    Lie("a shard of another model", from_other_model, MaskError, O0),
    Lie("a shard is missing", lambda folder: (folder / FIRST).unlink(), CheckpointError, f"{FIRST} is missing"),
    Lie(
        "a shard is cut short",
        shortened(FIRST),
        CheckpointError,
        f"{FIRST} is truncated",
    ),
    Lie("a tensor is in two shards", twice, CheckpointError, f"the tensor '{O0}' is in {FIRST} too"),
    Lie(
        "an index that names the other shard",
        in_index(lambda of: of.update({Q0: SECOND if of[Q0] == FIRST else FIRST})),
        CheckpointError,
        f"names tensors that their files do not hold: {Q0}",
    ),
    Lie(
        "an index that leads out", in_index(lambda of: of.update({Q0: f"../{FIRST}"})), CheckpointError, "no plain file"
    ),
    Lie(
        "an index that leads to no file",
        in_index(lambda of: of.update({Q0: "x.safetensors"})),
        CheckpointError,
        "x.saf",
    ),
    Lie("an index that names no tensor", in_index(lambda of: of.clear()), CheckpointError, "weight_map must map"),
    Lie("an index that leaves one out", in_index(lambda of: of.pop(Q0)), None, "who loads a shard loads all of it"),
]


@pytest.mark.parametrize("call", ["verify(dir)", "verify(base, dir)", "certify(dir, base)"])
@pytest.mark.parametrize("lie", SHARDS, ids=lambda lie: lie.name)
def test_changed_shards(lie: Lie, call: str, truth: Made, tmp_path: Path) -> None:
    copied(truth.other, tmp_path / "other")
    lie.must_be_caught(copied(truth.shards, tmp_path / "copy"), lambda folder: CALLS[call](folder, truth))


def test_two_sides_that_share_nothing(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    raw = Raw(folder / SINGLE)
    raw.header = {k.replace("model.layers", "decoder.blocks"): v for k, v in raw.header.items()}
    raw.save()
    with pytest.raises(MaskError, match=r"(?s)they have no weight in common.*decoder\.blocks\.0.*only in"):
        spp.verify(truth.base, folder)


def test_what_neither_side_can_read_is_not_verified(truth: Made, tmp_path: Path) -> None:
    pair = [copied(truth.base, tmp_path / name) for name in ("one", "two")]
    for folder in pair:
        quantized(1)(folder)
    with pytest.raises(
        CheckpointError, match=r"cannot be compared in 7 tensors:\n  model\.layers\.1\.mlp\.down_proj: stor"
    ):
        spp.verify(*pair)


def test_what_one_side_cannot_read_and_the_other_lacks_is_not_verified(truth: Made, tmp_path: Path) -> None:
    one, other = (copied(truth.base, tmp_path / name) for name in ("one", "other"))
    quantized(1)(one)
    for key in [key for key in Raw(other / SINGLE).header if "layers.1" in key]:
        put(key, "", None)(other)
    for pair in ((one, other), (other, one)):
        with pytest.raises(CheckpointError, match="cannot be compared in 7 tensors"):
            spp.verify(*pair)
    with pytest.raises(CheckpointError, match="cannot be compared in 7 tensors"):
        spp.certify(other, one)


def test_sparsity_says_what_it_did_not_count(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    quantized(1)(folder)
    with pytest.warns(
        SPPWarning, match=r"the zeros of 7 projections cannot be read and were not counted: 7 stored as g"
    ):
        report = spp.sparsity(folder)
    assert len(report.tensors) == 7 and not any("layers.1" in key for key in report.tensors)


def test_a_message_names_the_method_of_the_config(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    quantized(0, 1)(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    for call in (spp.certify, spp.verify, spp.sparsity):
        with pytest.raises(CheckpointError, match=r"quant_method 'gptq'.*dequantize"):
            call(folder)


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_weights_in_any_process(flush: bool, truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    before = spp.sparsity(truth.base)

    def all_denormal(entries: np.ndarray[Any, Any]) -> None:
        entries[(entries & 0x7FFF) != 0] = DENORMAL

    for key in (Q0, UP1):
        bits(key, all_denormal)(folder)
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        report = spp.certify(folder, truth.base)
        assert report == before == spp.verify(folder) == spp.verify(truth.base, folder)
        with pytest.warns(SPPWarning, match="differ in 2 of 14 layers"):  # of the base, whose values were others
            merged = spp.merge_checkpoint(folder, truth.adapter, tmp_path / "out")
        assert merged.layers["model.layers.0.self_attn.q_proj"].kept == 512
        assert merged.sparsity_report == before == spp.verify(folder, tmp_path / "out")
        spp.export_packed(folder, tmp_path / "packed")
        assert spp.verify(tmp_path / "packed") == before
    finally:
        torch.set_flush_denormal(False)
    raw = Raw(folder / SINGLE)
    for key in (Q0, UP1):
        assert set(np.unique(raw.bits(key)) & 0x7FFF) == {0, DENORMAL}
