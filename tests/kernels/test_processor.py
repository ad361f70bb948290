"""What is said of a CPU decides in which dtype it multiplies; a machine that says nothing gets float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spp.kernels import choice as processor
from spp.kernels import cpu as products
from spp.kernels.backend import product_dtype

CACHED = (processor.vendor, processor.has_products, products.onednn_is_faster)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from another test, and no limit is set."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for function in CACHED:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, **supported: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: x\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        answer = supported.get(name, False)
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda answer=answer: answer)


@pytest.mark.parametrize(
    ("vendor", "supported", "limit", "bfloat16", "float16"),
    [
        ("GenuineIntel", (), None, False, False),
        ("GenuineIntel", ("avx512_bf16",), None, False, False),  # slower than float32
        ("AuthenticAMD", ("avx512_bf16",), None, True, False),
        ("GenuineIntel", ("avx512_bf16", "amx_tile"), None, True, False),
        ("GenuineIntel", ("avx512_bf16", "amx_tile", "amx_fp16"), None, True, True),
        ("GenuineIntel", ("avx512_bf16", "amx_tile", "amx_fp16"), "avx512_core_amx", True, False),
        ("GenuineIntel", ("avx512_bf16", "amx_tile", "amx_fp16"), "AVX512_CORE_BF16", False, False),
        ("AuthenticAMD", ("avx512_bf16",), "AVX512_CORE_BF16", True, False),
        ("AuthenticAMD", ("avx512_bf16",), "AVX512_CORE", False, False),
        ("AuthenticAMD", ("avx512_bf16",), "default", True, False),
    ],
)
def test_products_of_sixteen_bits(
    vendor: str,
    supported: tuple[str, ...],
    limit: str | None,
    bfloat16: bool,
    float16: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pretend(monkeypatch, tmp_path, vendor, **dict.fromkeys(supported, True))
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    device = torch.device("cpu")
    for dtype, native in ((torch.bfloat16, bfloat16), (torch.float16, float16)):
        assert processor.has_products(dtype) is native
        assert product_dtype(dtype, device) == (dtype if native else torch.float32)
    assert processor.has_products(torch.float32) and processor.has_products(torch.float64)
    assert product_dtype(torch.bfloat16, torch.device("meta")) == torch.bfloat16


def test_a_machine_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "missing")
    assert processor.vendor() == ""
    assert products.onednn_is_faster() is False
