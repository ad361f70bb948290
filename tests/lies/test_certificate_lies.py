"""What is changed in a certificate is caught by verify, or is not promised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import spp
from spp.errors import CheckpointError, MaskError
from tests.lies.made import (
    CERTIFICATE,
    NORM,
    O0,
    Q0,
    SINGLE,
    UP1,
    Lie,
    Made,
    Raw,
    Tell,
    bits,
    copied,
    edit,
    kept,
    relabel,
    then,
    zero,
)


def of(key: str, **fields: Any) -> Tell:
    """Change fields of a projection's record."""
    return edit(lambda values: values["tensors"][key].update(fields))


def one_zero_more(values: dict[str, Any]) -> None:
    """A wrong count, with totals that go with it."""
    values["tensors"][Q0]["zeros"] += 1
    totals = values["totals"]
    totals["zeros"] += 1
    totals["sparsity"] = totals["zeros"] / totals["numel"]


def among_others(values: dict[str, Any]) -> None:
    """A projection of whose zeros nothing is said, though its contents are known; nothing else is amiss."""
    record = values["tensors"].pop(Q0)
    values["other"][Q0] = record["content_crc32"]
    values["other_layout"][Q0] = {"shape": record["shape"], "dtype": record["dtype"]}
    values["base"] = None
    totals(values)


def left_out(values: dict[str, Any]) -> None:
    del values["tensors"][Q0]
    values["base"] = None
    totals(values)


def empty(values: dict[str, Any]) -> None:
    values["tensors"] = {}
    totals(values)


def totals(values: dict[str, Any]) -> None:
    """Have the totals be the sums."""
    shapes = [record["shape"] for record in values["tensors"].values()]
    numel = sum(rows * cols for rows, cols in shapes)
    zeros = sum(record["zeros"] for record in values["tensors"].values())
    values["totals"] = {"numel": numel, "zeros": zeros, "sparsity": zeros / numel if numel else 0.0}


def of_other_folder(folder: Path) -> None:
    shutil.copy(folder.parent / "other" / CERTIFICATE, folder)


def from_before(folder: Path) -> None:
    """The weights are those of another pruning; the certificate stayed."""
    shutil.copy(folder.parent / "other" / SINGLE, folder)


def named_twice(folder: Path) -> None:
    text = (folder / CERTIFICATE).read_text()
    (folder / CERTIFICATE).write_text(text.replace('"base":', '"base": null, "base":', 1))


MASKS = "the certificate's masks are not those of"
HEX = "0123456789abcdef" * 4
LIES = [
    Lie(
        "another pattern",
        of(Q0, pattern="1:4"),
        MaskError,
        f"{Q0}: 512 zeros, 2:4; the certificate says 512 zeros, 1:4",
    ),
    Lie("another count", edit(one_zero_more), MaskError, f"{Q0}: 512 zeros, 2:4; the certificate says 513 zeros, 2:4"),
    Lie("a count beside its totals", of(Q0, zeros=513), CheckpointError, "totals are not the sums"),
    Lie("another mask", of(Q0, mask_sha256=HEX), MaskError, f"{Q0}: its zeros have changed"),
    Lie("other contents", of(Q0, content_crc32=1), CheckpointError, f"{Q0}: its contents have changed"),
    Lie("another dtype", of(Q0, dtype="float16"), CheckpointError, f"{Q0}: bfloat16; the certificate says float16"),
    Lie("another shape", of(UP1, shape=[32, 64]), MaskError, f"{UP1}: shape (64, 32); the certificate says (32, 64)"),
    Lie(
        "another axis, along which the pattern is right",
        of(UP1, input_axis=0),
        MaskError,
        f"{UP1}: its inputs run along axis 1; the certificate says 0",
    ),
    Lie(
        "a projection among the others",
        edit(among_others),
        CheckpointError,
        f"{Q0}: a projection, of whose zeros the certificate says nothing",
    ),
    Lie("a projection left out", edit(left_out), CheckpointError, f"{Q0}: not in the certificate"),
    Lie(
        "no projection at all",
        edit(empty),
        CheckpointError,
        "no projection with any weights, so it certifies nothing",
    ),
    Lie(
        "a tensor listed in two places",
        edit(lambda values: values["other"].update({Q0: 1})),
        CheckpointError,
        f"tensors and other both list {Q0}",
    ),
    Lie("wrong totals", edit(lambda values: values["totals"].update(sparsity=0.9)), CheckpointError, "totals are not"),
    Lie("no totals", edit(lambda values: values.pop("totals")), CheckpointError, "totals are not"),
    Lie("another base", edit(lambda values: values["base"].update(fingerprint=HEX)), MaskError, MASKS),
    Lie(
        "a base without a fingerprint",
        edit(lambda values: values["base"].pop("fingerprint")),
        CheckpointError,
        "malformed",
    ),
    Lie(
        "another number for a norm",
        edit(lambda v: v["other"].update({NORM: 1})),
        CheckpointError,
        f"{NORM}: its contents",
    ),
    Lie(
        "another shape for a norm",
        edit(lambda values: values["other_layout"][NORM].update(shape=[4, 8])),
        CheckpointError,
        f"{NORM}: shape (32,); the certificate says (4, 8)",
    ),
    Lie(
        "another dtype for a norm",
        edit(lambda values: values["other_layout"][NORM].update(dtype="float16")),
        CheckpointError,
        f"{NORM}: bfloat16; the certificate says float16",
    ),
    Lie(
        "no shape for a norm",
        edit(lambda values: values["other_layout"].pop(NORM)),
        CheckpointError,
        f"other_layout lists other tensors than it should: {NORM}",
    ),
    Lie(
        "a later version", edit(lambda values: values.update(format_version=2)), CheckpointError, "install a newer spp"
    ),
    Lie("a key twice", named_twice, CheckpointError, "the key 'base' occurs twice"),
    Lie("that of another folder", of_other_folder, MaskError, f"{O0}: its zeros have changed"),
    Lie("that of before another pruning", from_before, MaskError, f"{Q0}: its zeros have changed"),
    Lie("another version of spp", edit(lambda v: v.update(spp_version="9")), None, "no check depends on it"),
    Lie(
        "another name for the base", edit(lambda v: v["base"].update(name_or_path="x")), None, "no check depends on it"
    ),
    Lie("no base", edit(lambda values: values.update(base=None)), None, "a certificate need not name one"),
    Lie("a key that is not known", edit(lambda values: values.update(later=[1])), None, "a later version may add some"),
    Lie(
        "no shapes at all, and a norm relabelled",
        then(edit(lambda values: values.pop("other_layout")), relabel(NORM, shape=[4, 8])),
        None,
        "it is an older certificate then, which did not cover them",
    ),
    Lie(
        "one that was made after the change",
        then(bits(Q0, zero(7, 0x3F80)), lambda folder: spp.certify(folder) and None),
        None,
        "a certificate is not signed: compare with the base",
    ),
]


def test_the_truth(truth: Made) -> None:
    values = json.loads((truth.tuned / CERTIFICATE).read_text())
    assert values["base"] is not None and values["other_layout"][NORM] == {"shape": [32], "dtype": "bfloat16"}
    assert values["other_layout"].keys() == values["other"].keys()
    spp.verify(truth.tuned)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name)
def test_a_changed_certificate(lie: Lie, truth: Made, tmp_path: Path) -> None:
    copied(truth.other, tmp_path / "other")
    lie.must_be_caught(copied(truth.tuned, tmp_path / "copy"), spp.verify)


DEEP = [
    Lie(
        "contents that have the same crc32",
        edit(lambda values: values["content_sha256"].update({Q0: HEX})),
        CheckpointError,
        f"{Q0}: the sha256 of its contents has changed",
    ),
    Lie("one bit", bits(NORM, kept(3, flip=1)), CheckpointError, f"{NORM}: the sha256 of its contents has changed"),
    Lie(
        "a tensor without one",
        edit(lambda values: values["content_sha256"].pop(Q0)),
        CheckpointError,
        f"content_sha256 lists other tensors than it should: {Q0}",
    ),
    Lie("none", edit(lambda values: values.pop("content_sha256")), CheckpointError, "holds no sha256 of contents"),
]


@pytest.mark.parametrize("lie", DEEP, ids=lambda lie: lie.name)
def test_a_changed_deep_certificate(lie: Lie, truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    spp.certify(folder, deep=True)
    spp.verify(folder, deep=True)
    lie.must_be_caught(folder, lambda folder: spp.verify(folder, deep=True))


def test_a_certificate_without_shapes_is_read_and_rewritten_with_them(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    whole = (folder / CERTIFICATE).read_bytes()
    edit(lambda values: values.pop("other_layout"))(folder)
    assert spp.verify(folder) == spp.verify(truth.base)
    spp.export_packed(folder, tmp_path / "packed")
    assert (tmp_path / "packed" / CERTIFICATE).read_bytes() == whole
    spp.certify(folder)
    assert (folder / CERTIFICATE).read_bytes() == whole


def test_every_writer_says_shapes_and_dtypes(truth: Made, tmp_path: Path) -> None:
    import torch

    spp.merge_checkpoint(truth.base, truth.adapter, tmp_path / "wide", dtype=torch.float32)
    for folder in (truth.base, truth.tuned, truth.packed, tmp_path / "wide"):
        said = json.loads((folder / CERTIFICATE).read_text())["other_layout"]
        raw = Raw(folder / SINGLE)
        names = {"BF16": "bfloat16", "F32": "float32"}
        assert said == {
            key: {"shape": raw.header[key]["shape"], "dtype": names[raw.header[key]["dtype"]]} for key in said
        }


def test_a_stale_certificate_of_other_names_does_not_stand_in_the_way(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")

    def elsewhere(values: dict[str, Any]) -> None:
        values["tensors"] = {key.replace("model.", "decoder."): record for key, record in values["tensors"].items()}

    edit(elsewhere)(folder)
    assert spp.certify(folder, truth.base) == spp.verify(folder)
