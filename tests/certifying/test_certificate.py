"""The certificate's bytes are fixed; what it says is what the tensors are; anything else in its place is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spp.certifying import certificate as module
from spp.certifying.certificate import (
    BaseRecord,
    Certificate,
    SparsityReport,
    TensorLayout,
    TensorRecord,
    fingerprint,
)
from spp.certifying.scan import report_from_tensors
from spp.errors import CheckpointError
from spp.files import content_crc32, mask_sha256

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE = FIXTURES / "certificate-v1" / "sparsity.json"  # as it was before other_layout was added
WITH_LAYOUT = FIXTURES / "certificate-v1-layout" / "sparsity.json"
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def weights() -> dict[str, torch.Tensor]:
    return {
        Q: torch.tensor([[1.0, 0, -2, 0, 0, 0, 3, 4], [-0.0, 0, 5, 6, 7, 8, 0, 0]], dtype=torch.bfloat16),
        UP: torch.tensor([[0.0, 1, 1, 1, 1], [1, 1, 1, 1, 1e-45]]),
    }


def record(t: torch.Tensor) -> TensorRecord:
    facts = report_from_tensors([("w", t, 1)]).tensors["w"]
    return TensorRecord(facts.shape, facts.dtype, 1, facts.pattern, facts.zeros, mask_sha256(t), content_crc32(t))


def example() -> Certificate:
    tensors = {name: record(t) for name, t in weights().items()}
    masks = {name: record.mask_sha256 for name, record in tensors.items()}
    return Certificate(
        tensors=tensors,
        other={"model.norm.weight": 123, "lm_head.weight": 2**32 - 1},
        base=BaseRecord("org/pruned", fingerprint(masks)),
        spp_version="0.1.0",
    )


def with_layout() -> Certificate:
    layout = {"model.norm.weight": ((8,), torch.bfloat16), "lm_head.weight": ((3, 8), torch.float32)}
    return replace(example(), other_layout={key: TensorLayout.of(*of) for key, of in layout.items()})


@pytest.mark.parametrize(("certificate", "fixture"), [(example(), FIXTURE), (with_layout(), WITH_LAYOUT)])
def test_the_bytes_of_format_version_1(tmp_path: Path, certificate: Certificate, fixture: Path) -> None:
    path = certificate.write(tmp_path)
    assert path == tmp_path / "sparsity.json"
    assert path.read_bytes() == fixture.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_the_fixtures_are_read() -> None:
    assert Certificate.read(FIXTURE.parent) == example()
    assert Certificate.read(WITH_LAYOUT.parent) == with_layout()


def test_a_key_that_is_not_known_is_passed_over() -> None:
    values = copy.deepcopy(with_layout().to_dict())
    values["later"] = values["tensors"][Q]["later"] = {"more": 1}
    assert Certificate.from_dict(values) == with_layout()


def test_it_says_what_the_tensors_are() -> None:
    values = example().to_dict()
    assert values["totals"] == {"numel": 26, "zeros": 9, "sparsity": 9 / 26}
    assert values["tensors"][Q] | {"mask_sha256": 0, "content_crc32": 0} == {
        "shape": [2, 8],
        "dtype": "bfloat16",
        "input_axis": 1,
        "pattern": "2:4",
        "zeros": 8,
        "mask_sha256": 0,
        "content_crc32": 0,
    }
    assert (values["tensors"][UP]["pattern"], values["tensors"][UP]["zeros"]) == ("unstructured", 1)
    assert "content_sha256" not in values


def test_the_fingerprint_is_its_definition() -> None:
    masks = {"b": "1" * 64, "a": "0" * 64}
    stream = b"spp-base-1" + b"a\0" + b"0" * 64 + b"\n" + b"b\0" + b"1" * 64 + b"\n"
    assert fingerprint(masks) == hashlib.sha256(stream).hexdigest()
    assert example().fingerprint() == example().base.fingerprint  # type: ignore[union-attr]


def test_round_trips(tmp_path: Path) -> None:
    plain = replace(
        example(), base=None, content_sha256=dict.fromkeys({**example().tensors, **example().other}, "0" * 64)
    )
    unnamed = replace(example(), base=BaseRecord(None, "0" * 64))
    for certificate in (example(), plain, unnamed, with_layout()):
        certificate.write(tmp_path)
        assert Certificate.read(tmp_path) == certificate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "install a newer spp"),
        ({"format_version": None}, "no certificate of spp"),
        ({"format_version": "1"}, "no certificate of spp"),
        ({"format_version": True}, "no certificate of spp"),
        ({"tensors": []}, "malformed"),
        ({"tensors": {"a": {}}}, "KeyError: 'shape'"),
        ({"other": {"a": -1}}, "is no number of bytes"),
        ({"other": {"a": 1.5}}, "is no number of bytes"),
        ({"base": {}}, "KeyError: 'name_or_path'"),
        ({"base": {"name_or_path": 3, "fingerprint": "0" * 64}}, "no text"),
        ({"base": {"name_or_path": "a", "fingerprint": "xyz"}}, "no sha256"),
        ({"spp_version": 1}, "no text"),
        ({"content_sha256": {"a": "0" * 63}}, "no sha256"),
        ({"content_sha256": {"a": "0" * 64}}, "content_sha256 lists other tensors than it should: a, lm_head.weight"),
        ({"tensors": {}, "totals": {"numel": 0, "zeros": 0, "sparsity": 0.0}}, "lists no projection"),
        ({"other": {Q: 1}}, f"tensors and other both list {Q}"),
        ({"other_layout": {}}, "other_layout lists other tensors than it should: lm_head.weight, model.norm.weight"),
        ({"other_layout": {"model.norm.weight": {"shape": [8]}}}, "KeyError: 'dtype'"),
        ({"other_layout": {"model.norm.weight": {"shape": 8, "dtype": "float32"}}}, "8 is no shape"),
        ({"totals": {"numel": 26, "zeros": 10, "sparsity": 10 / 26}}, "totals are not the sums"),
    ],
)
def test_a_malformed_certificate_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "sparsity.json").write_text(json.dumps({**example().to_dict(), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Certificate.read(tmp_path)
    assert str(tmp_path / "sparsity.json") in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [2, -8]),
        ("shape", 3),
        ("dtype", 1),
        ("input_axis", 2),
        ("zeros", 17),
        ("mask_sha256", "0"),
        ("pattern", None),
    ],
)
def test_a_malformed_record_is_refused(field: str, value: object) -> None:
    values = copy.deepcopy(example().to_dict())
    values["tensors"][Q][field] = value
    with pytest.raises(CheckpointError, match="malformed"):
        Certificate.from_dict(values)


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no sparsity\.json; spp\.certify writes one"):
        Certificate.read(tmp_path)
    (tmp_path / "sparsity.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Certificate.read(tmp_path)


def test_the_report_on_tensors() -> None:
    broken = weights()[UP].clone()
    broken[0, 1] = math.nan
    experts = torch.tensor([1.0, 1, 0, 0]).repeat(3, 5, 2)
    report = report_from_tensors([("q", weights()[Q], -1), ("up", broken, 1), ("experts", experts.transpose(1, 2), 1)])
    assert isinstance(report, SparsityReport)
    assert report.pattern == module.MIXED
    assert report.sparsity == (8 + 1 + 60) / (16 + 10 + 120)
    assert {k: (t.pattern, t.valid) for k, t in report.tensors.items()} == {
        "q": ("2:4", True),
        "up": ("unstructured", False),
        "experts": ("2:4", True),
    }
    assert json.loads(json.dumps(report.to_dict()))["tensors"]["q"] == {
        "shape": [2, 8],
        "dtype": "bfloat16",
        "zeros": 8,
        "sparsity": 0.5,
        "pattern": "2:4",
        "valid": True,
    }
    assert report_from_tensors([("q", weights()[Q], 1)]).pattern == "2:4"
    assert report_from_tensors([]) == SparsityReport(0.0, "dense", {})


def test_the_certificates_report() -> None:
    assert example().report() == report_from_tensors((name, t, 1) for name, t in weights().items())
