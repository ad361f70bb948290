"""The GPU script: its checks run interpreted, find what is wrong, and its tables can be made of what it measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, harness
from benchmarks.gpu_checks import Check, differing, error
from spp.errors import ConfigError, OutputExistsError, SPPError
from spp.kernels import use_kernels

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.slow
@WITHOUT_GPU
def test_every_check_passes_interpreted(
    triton_device: torch.device, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    gpu.main(["--interpret", "--out", str(path)])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert f"checks: {len(rows)} passed, 0 failed (interpreted, 2 dtypes)" in out
    assert len(rows) > 300 and all(row["passed"] for row in rows)
    assert {row["dtype"] for row in rows} == {"float32", "float16"}
    with pytest.raises(OutputExistsError, match="--overwrite"):
        gpu.main(["--interpret", "--out", str(path)])


@WITHOUT_GPU
def test_a_failing_check_is_told_and_fails_the_run(
    triton_device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Check("W_eff, bits", "dense 1 × 1", "float32", 3, 0), Check("dα", "dense 1 × 1", "float32", 0.0, 1e-5)]
    monkeypatch.setattr(gpu_checks, "run", lambda device, dtypes, large: iter(found))
    with pytest.raises(SPPError, match="1 of the checks failed; the first: W_eff, bits, dense 1 × 1"):
        gpu.main(["--interpret"])
    out = capsys.readouterr().out
    assert "FAILED  W_eff, bits: 3 above 0  (dense 1 × 1, float32)" in out and "1 passed, 1 failed" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda work: _spoil(work, "effective", lambda t: t.mul_(1.001)), {"W_eff, bits", "Y, no dropout"}),
        (lambda work: _spoil(work, "delta", lambda t: t.mul_(1.001)), {"W′, bits"}),
    ],
)
def test_the_checks_find_a_wrong_kernel(
    wrong: Callable[[type], tuple[str, Callable[..., object]]],
    expected: set[str],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_checks.TritonWork, *wrong(gpu_checks.TritonWork))
    monkeypatch.setattr(gpu_checks, "SMALL", gpu_checks.SMALL[:1])
    failed = {c.what for c in gpu_checks.run(triton_device, [torch.float32], large=False) if not c.passed}
    assert expected <= failed


def _spoil(work: type, name: str, spoil: Callable[[torch.Tensor], object]) -> tuple[str, Callable[..., object]]:
    right = getattr(work, name)

    def wrong(self: object, dtype: torch.dtype) -> torch.Tensor:
        result: torch.Tensor = right(self, dtype)
        spoil(result)
        return result

    return name, wrong


def test_errors_and_bits_are_counted() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert error(exact, exact) == 0
    assert error(torch.tensor([1.0, -3.0]), exact) == 0.25
    assert error(torch.tensor([float("nan"), -4.0]), exact) == float("inf")
    assert differing(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1
    assert not Check("", "", "", float("nan"), 1.0).passed


@WITHOUT_GPU
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device; --interpret runs the checks on the CPU"):
        gpu.main([])


@pytest.mark.slow
@WITHOUT_GPU
def test_the_tables_are_made_of_what_is_measured(
    triton_device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    small = ["--layers", "32x64", "--tokens", "8", "--rank", "2", "--peft-rank", "2", "--rounds", "2", "--steps", "1"]
    options = gpu.parse(["--interpret", *small])
    options.contenders = list(gpu.CONTENDERS)
    monkeypatch.setattr(gpu, "_peak", lambda options, row: 12345)
    monkeypatch.setattr(gpu, "CALLS", 1)
    with use_kernels("torch"):
        rows = gpu.measure(options)
    out = capsys.readouterr().out
    layers = {row["contender"]: row for row in rows if row["bench"] == "gpu layer"}
    assert set(layers) == set(options.contenders)
    trained = {name: row["trainable"] for name, row in layers.items()}
    spp, peft = 2 * 64 + 32, 2 * (32 + 64)
    assert {n: t for n, t in trained.items() if t != (spp if n.startswith(("spp", "branches")) else peft)} == {
        "full": 32 * 64,
        "frozen": 0,
        "products": 32 * 64,
    }
    assert layers["lora"]["this_to_lora"]["median"] == 1.0
    assert layers["spp"]["peak_bytes"] == 12345 and layers["branches"]["peak_bytes"] is None
    kernels = [row["kernel"] for row in rows if row["bench"] == "gpu kernel"]
    assert kernels[0] == "copy of W" and len(kernels) == 6
    products = [row["weight"] for row in rows if row["bench"] == "gpu product"]
    assert products[0] == "dense" and products[1].startswith("semi-structured")
    for line in ("spp-packed-any", "this / lora-16bit", "peak memory", "W_eff, packed", "X Wᵀ alone"):
        assert line in out


def test_every_contender_computes_the_same_layer() -> None:
    spec = gpu.SharedSpec(24, 32, torch.float64, "cpu", "2:4", 5, 2)
    exact = gpu.make_shared("spp", spec)
    x = torch.randn(3, 32, dtype=torch.float64)
    for name in ("spp-torch", "spp-packed", "spp-packed-any"):
        layer = gpu.make_shared(name, spec)
        assert layer.training
        assert (layer.packed_layout is not None) == name.startswith("spp-packed")
        if name != "spp-packed-any":
            with torch.no_grad():
                torch.testing.assert_close(layer(x), exact(x))
    shared = spec.linear().weight
    assert shared.data_ptr() == spec.linear().weight.data_ptr() and shared is not spec.linear().weight


def test_the_child_measures_one_contender(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measure_memory", lambda call, calls, device: (call(), harness.Memory(1, 2))[1])
    gpu.main(["--interpret", "--child", "spp", "--layers", "8x16", "--tokens", "2", "--rank", "2"])
    assert json.loads(capsys.readouterr().out) == {"rest": 1, "peak": 2}
