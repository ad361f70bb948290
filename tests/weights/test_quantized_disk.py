"""Quantized checkpoints read as plain weights: values as who made the format decodes them, zeros exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spp.errors import CheckpointError, NonFiniteError
from spp.files import write_json
from spp.weights.quantized import disk
from spp.weights.quantized.disk import DequantizedReader
from tests.helpers.quantized import FORMS, own_dense, quantize_linear

Q = "model.layers.0.self_attn.q_proj"


def stored(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {} if settings is None else {"quantization_config": settings})
    return folder


def refused(folder: Path, error: type[Exception], says: str) -> None:
    """The weight in a checkpoint is not decoded: an error names it."""
    with DequantizedReader(folder) as reader, pytest.raises(error, match=says) as raised:
        list(reader.pieces(f"{Q}.weight"))
    assert f"{Q}.weight" in str(raised.value)


def pruned_linear(m: int, n: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear of which a row, a column and half of the rest are zero."""
    linear = nn.Linear(n, m, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, n, generator=torch.Generator().manual_seed(m * n)))
        linear.weight[torch.rand(m, n, generator=torch.Generator().manual_seed(n)) < 0.5] = 0
        linear.weight[0], linear.weight[:, -1] = 0, 0
    return linear


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("m", "n", "dtype"), [(8, 64, torch.bfloat16), (7, 48, torch.float32), (1, 66, torch.float16)])
def test_bitsandbytes(tmp_path: Path, options: Any, m: int, n: int, dtype: torch.dtype) -> None:
    linear = pruned_linear(m, n, dtype)
    quantized = quantize_linear(linear, **options)
    state = quantized.state_dict()
    folder = stored(tmp_path, {f"{Q}.{name}": t for name, t in state.items()} | {"model.norm.weight": torch.ones(4)})
    with DequantizedReader(folder) as reader:
        assert reader.keys() == [f"{Q}.weight", "model.norm.weight"]
        assert f"{Q}.SCB" not in reader and f"{Q}.weight.absmax" not in reader and f"{Q}.weight" in reader
        found = reader.tensor(f"{Q}.weight")
        assert (tuple(found.shape), found.dtype) == (reader.shape(f"{Q}.weight"), reader.dtype(f"{Q}.weight"))
        assert reader.shape(f"{Q}.weight") == (m, n) and not reader.lies_in_file(f"{Q}.weight")
        expected = own_dense(quantized)
        assert torch.equal(found == 0, expected == 0) and bool((found[linear.weight == 0] == 0).all())
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-6)
        assert b"".join(reader.pieces(f"{Q}.weight")) == bytes(reader.raw(f"{Q}.weight"))


def test_rows_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_linear(pruned_linear(9, 64), "nf4")
    folder = stored(tmp_path, {f"{Q}.{name}": t for name, t in quantized.state_dict().items()})
    monkeypatch.setattr(disk, "_TOGETHER", 128)
    with DequantizedReader(folder) as reader:
        pieces = [bytes(piece) for piece in reader.pieces(f"{Q}.weight")]
        assert [len(piece) for piece in pieces] == [2 * 64 * 4] * 4 + [64 * 4]
        assert b"".join(pieces) == bytes(reader.raw(f"{Q}.weight"))


def test_bitsandbytes_that_does_not_hold_together(tmp_path: Path) -> None:
    state = {f"{Q}.{k}": t for k, t in quantize_linear(pruned_linear(8, 64), "nf4").state_dict().items()}
    absmax = f"{Q}.weight.absmax"
    refused(stored(tmp_path, {**state, absmax: torch.full((8,), torch.nan)}), NonFiniteError, "8 scales that are NaN")
    refused(stored(tmp_path, {**state, absmax: state[absmax][:3]}), CheckpointError, "3 scales, expected 8")
    lacking = {key: t for key, t in state.items() if "quant_state" not in key}
    with DequantizedReader(stored(tmp_path, lacking)) as reader:  # left as it is, for others to name
        assert reader.quantized == {} and reader.dtype(f"{Q}.weight") == torch.uint8


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
def test_float8(tmp_path: Path, end: str) -> None:
    weight = pruned_linear(8, 64).weight.detach().to(torch.float8_e4m3fn)
    tensors = {f"{Q}.weight": weight, f"{Q}.weight{end}": torch.full((1, 1), 0.5)}
    with DequantizedReader(stored(tmp_path, tensors)) as reader:
        assert reader.keys() == [f"{Q}.weight"] and torch.equal(reader.tensor(f"{Q}.weight").float(), weight.float())
    for bad, error in ((torch.inf, NonFiniteError), (0.0, CheckpointError)):
        tensors[f"{Q}.weight{end}"] = torch.full((1, 1), bad)
        refused(stored(tmp_path, tensors), error, f"{end} holds scales")


def packed(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes (a, b) in int32 (a, b · bits / 32): the oracle of the packing, one code at a time."""
    each = 32 // bits
    rows = []
    for row in codes.tolist():
        words = []
        for first in range(0, len(row), each):
            word = sum(row[first + (order[i] if order else i)] << (bits * i) for i in range(each))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def affine(m: int, n: int, groups: int, bits: int, of: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (n, m), zero points (groups, m), scales (groups, m) and the weight (m, n), half of it zero."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, m), generator=generator)
    zeros = torch.randint(1, 2**bits - 1, (groups, m), generator=generator)
    codes = torch.where(torch.rand(n, m, generator=generator) < 0.5, zeros[of], codes)
    scales = 0.01 + torch.rand(groups, m, generator=generator)
    return codes, zeros, scales, ((codes - zeros[of]) * scales[of]).T


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
def test_gptq(tmp_path: Path, bits: int, version: str | None) -> None:
    m, n, groups = 32, 64, 4
    of = torch.arange(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))] // (n // groups)  # act order
    codes, zeros, scales, weight = affine(m, n, groups, bits, of)
    tensors = {
        f"{Q}.qweight": packed(codes.T, bits).T,
        f"{Q}.qzeros": packed(zeros - int(version != "gptq_v2"), bits),
        f"{Q}.scales": scales,
        f"{Q}.g_idx": of.int(),
    }
    said: dict[str, Any] = {"quant_method": "gptq", "bits": bits} | ({"checkpoint_format": version} if version else {})
    with DequantizedReader(stored(tmp_path, tensors, said)) as reader:
        assert reader.keys() == [f"{Q}.weight"] and reader.shape(f"{Q}.weight") == (m, n)
        found = reader.tensor(f"{Q}.weight")
        assert torch.equal(found == 0, weight == 0)
        torch.testing.assert_close(found, weight)
    for settings in (None, {**said, "bits": 3}, {**said, "checkpoint_format": "marlin"}, {**said, "bits": 16}):
        with DequantizedReader(stored(tmp_path, tensors, settings)) as reader:
            assert reader.quantized == {}, settings
    beyond = {**tensors, f"{Q}.g_idx": of.int() + 1}
    refused(stored(tmp_path, beyond, said), CheckpointError, "g_idx names groups that have no scales: 4 have")
    tensors[f"{Q}.qzeros"] = torch.full_like(tensors[f"{Q}.qzeros"], -1)  # every one the largest
    of_first = stored(tmp_path, tensors, {**said, "checkpoint_format": "gptq"})
    refused(of_first, CheckpointError, f"zero points beyond the {bits} bits")


def test_awq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, groups = 24, 32, 2
    of = torch.arange(n) // (n // groups)
    codes, zeros, scales, weight = affine(m, n, groups, 4, of)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{Q}.qweight": packed(codes, 4, order),
        f"{Q}.qzeros": packed(zeros, 4, order),
        f"{Q}.scales": scales.half(),
    }
    said = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    monkeypatch.setattr(disk, "_TOGETHER", 5 * n)  # rows that begin within an int32
    with DequantizedReader(stored(tmp_path, tensors, said)) as reader:
        found = reader.tensor(f"{Q}.weight")
        assert torch.equal(found == 0, weight == 0)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
    with DequantizedReader(stored(tmp_path, tensors, {**said, "version": "gemv"})) as reader:
        assert reader.quantized == {}
