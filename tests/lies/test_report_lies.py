"""Reports are counted again by numpy in float64, from the raw files, on a model where every number is something."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.certifying.certificate import SparsityReport, TensorSparsity
from spp.errors import SPPWarning
from spp.merging.report import MergeReport
from tests.helpers.checkpoints import same_tensors
from tests.lies.made import Q0, SINGLE, UP1, Made, Raw, bits, copied, tiny_adapter, tiny_model

Array = np.ndarray[Any, Any]
Q, K = Q0.removesuffix(".weight"), "model.layers.0.self_attn.k_proj"


def numbers(entries: Array) -> Array:
    """What the bits of a bfloat16 tensor are worth."""
    return (entries.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def pattern_of(mask: Array) -> str:
    """The pattern of a matrix's zeros, by its definition: slow, and of no code of the library."""
    if mask.all():
        return "dense"
    if not mask.any():
        return "unstructured"
    share = min(s for s in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32) if s * mask.size >= mask.sum() or s == 1 / 2)
    for group in (2, 4, 8, 16, 32):
        if mask.shape[1] % group == 0 and share * group >= 1:
            most = max(int(row[k : k + group].sum()) for row in mask for k in range(0, len(row), group))
            if most <= share * group:
                return f"{int(share * group)}:{group}"
    return "unstructured"


def counted(folder: Path) -> SparsityReport:
    """The report on a checkpoint's projections."""
    raw, tensors = Raw(folder / SINGLE), {}
    for key in sorted(k for k in raw.header if k.endswith("_proj.weight")):
        mask = (raw.bits(key) & 0x7FFF) != 0
        zeros = int(mask.size - mask.sum())
        finite = bool(np.isfinite(numbers(raw.bits(key))).all())
        tensors[key] = TensorSparsity(mask.shape, "bfloat16", zeros, zeros / mask.size, pattern_of(mask), finite)
    total = sum(t.zeros for t in tensors.values()) / sum(math.prod(t.shape) for t in tensors.values())
    patterns = {t.pattern for t in tensors.values()}
    return SparsityReport(total, patterns.pop() if len(patterns) == 1 else "mixed", tensors)


def test_the_recount_tells_patterns_apart(truth: Made) -> None:
    found = counted(truth.base)
    assert found.pattern == "mixed" and found.tensors[Q0].pattern == "2:4"
    assert (found.tensors[UP1].pattern, found.tensors[UP1].sparsity) == ("unstructured", 0.75)
    assert pattern_of(np.ones((2, 4), bool)) == "dense" and pattern_of(np.eye(4, dtype=bool)) == "1:4"


@pytest.mark.parametrize("name", ["one zero less", "moved", "a column", "NaN"])
def test_sparsity_is_what_the_raw_files_hold(name: str, truth: Made, tmp_path: Path) -> None:
    def change(entries: Array) -> None:
        if name == "one zero less":
            entries[np.nonzero(entries == 0)[0][0], np.nonzero(entries == 0)[1][0]] = 0x3F80
        elif name == "moved":
            entries[:] = np.roll(entries, 1, axis=1)
        else:
            entries[:, 3] = 0x8000 if name == "a column" else 0x7FC0

    folder = copied(truth.base, tmp_path / "copy")
    assert spp.sparsity(folder) == counted(folder)
    bits(Q0, change)(folder)
    bits(UP1, change)(folder)
    assert spp.sparsity(folder) == counted(folder) != counted(truth.base)
    if name != "NaN":
        assert spp.certify(folder) == spp.verify(folder) == counted(folder)


def hard_model() -> Any:
    """A model of which an adapter sends some weights to zero, and on which some of its update does not survive."""
    model = tiny_adapter(tiny_model())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in (model.get_submodule(Q), model.get_submodule(UP1.removesuffix(".weight"))):
            layer.spp_alpha.copy_(torch.randint(0, 2, layer.spp_alpha.shape, generator=generator))
            layer.spp_beta.fill_(-0.5)  # s · β · α is 0 or −1: what is kept stays, or would be zero
        model.get_submodule(K).spp_beta.fill_(0.002)  # of which bfloat16 takes a part
    return model


def merged_twice(folder: Path) -> tuple[MergeReport, MergeReport, Path, Path]:
    """Merge in memory and on disk; return both reports, and the base and the output."""
    model = hard_model()
    spp.save_adapter(model, folder / "adapter")
    spp.save_model(tiny_model(), folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SPPWarning)
        on_disk = spp.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
        in_memory = spp.merge(model)
    spp.save_model(model, folder / "saved")
    assert same_tensors(folder / "out", folder / "saved")
    return in_memory, on_disk, folder / "base", folder / "out"


def recounted(base: Path, out: Path, adapter: Path) -> dict[str, dict[str, float]]:
    """What a merge did to each layer, in float64: s = 2, blocks of rows of one rank."""
    before, after, params = Raw(base / SINGLE), Raw(out / SINGLE), Raw(adapter / "adapter_model.safetensors")
    found = {}
    for key in (k for k in before.header if k.endswith("_proj.weight")):
        path = f"base_model.model.{key.removesuffix('.weight')}"
        alpha = params.bits(f"{path}.spp_alpha").view(np.float32).astype(np.float64)
        beta = params.bits(f"{path}.spp_beta").view(np.float32).astype(np.float64)
        weight, merged = numbers(before.bits(key)), numbers(after.bits(key))
        rows = np.repeat(alpha, len(weight) // len(alpha), axis=0)
        update, change, kept = weight * (2.0 * beta * rows), merged - weight, weight != 0
        assert ((merged != 0) == kept).all()
        found[key.removesuffix(".weight")] = {
            "kept": int(kept.sum()),
            "rescued": int((kept & (np.abs(weight + update) < 2.0**-134)).sum()),  # half the smallest of bfloat16
            "survived": float((change * update).sum() / (update * update).sum()),
            "max_relative_change": float(np.abs(change[kept] / weight[kept]).max()),
            "update_norm": float(np.sqrt((update * update).sum())),
        }
    return found


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, MergeReport], dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("merges")
    in_memory, on_disk, base, out = merged_twice(folder)
    assert on_disk.sparsity_report == counted(out) == counted(base)
    assert {t: (f.zeros, f.pattern) for t, f in in_memory.sparsity_report.tensors.items()} == {
        t: (f.zeros, f.pattern) for t, f in counted(folder / "saved").tensors.items()
    }
    return {"in memory": in_memory, "on disk": on_disk}, recounted(base, out, folder / "adapter")


def agree(report: MergeReport, truth: dict[str, dict[str, float]]) -> bool:
    """Whether a report says what was counted: counts exactly, sums to 1e-5."""
    if report.layers.keys() != truth.keys():
        return False
    total = sum(of["update_norm"] ** 2 for of in truth.values())
    sums = {
        "survived": sum(of["survived"] * of["update_norm"] ** 2 for of in truth.values()) / total,
        "kept": sum(of["kept"] for of in truth.values()),
        "rescued": sum(of["rescued"] for of in truth.values()),
    }
    pairs = [(getattr(report, name), value) for name, value in sums.items()]
    pairs += [(getattr(report.layers[path], name), value) for path, of in truth.items() for name, value in of.items()]
    return all(
        said == value if isinstance(value, int) else math.isclose(said, value, rel_tol=1e-5) for said, value in pairs
    )


@pytest.mark.parametrize("where", ["in memory", "on disk"])
def test_a_merge_report_is_what_was_done(where: str, merges: Any) -> None:
    reports, truth = merges
    assert agree(reports[where], truth)
    assert truth[Q]["rescued"] > 50 and truth[Q]["max_relative_change"] == 1 and 0 < truth[K]["survived"] < 0.9
    assert 0.5 < reports[where].survived != 1 and len({of["kept"] for of in truth.values()}) > 1


LIES: dict[str, Callable[[Any], Any]] = {
    "kept": lambda layer: replace(layer, kept=layer.kept - 1),
    "rescued": lambda layer: replace(layer, rescued=layer.rescued + 1),
    "survived": lambda layer: replace(layer, survived=layer.survived * 0.999),
    "max_relative_change": lambda layer: replace(layer, max_relative_change=layer.max_relative_change * 1.001),
    "update_norm": lambda layer: replace(layer, update_norm=layer.update_norm * 1.001),
}


@pytest.mark.parametrize("name", list(LIES))
def test_the_comparison_fails_on_a_wrong_report(name: str, merges: Any) -> None:
    reports, truth = merges
    report = reports["on disk"]
    assert not agree(replace(report, layers={**report.layers, Q: LIES[name](report.layers[Q])}), truth)


def test_a_merge_to_another_dtype_keeps_the_zeros(truth: Made, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        out = tmp_path / str(dtype)
        report = spp.merge_checkpoint(truth.base, truth.adapter, out, dtype=dtype)
        raw, before = Raw(out / SINGLE), Raw(truth.base / SINGLE)
        for key in report.sparsity_report.tensors:
            assert (((raw.bits(key) << 1) != 0) == ((before.bits(key) << 1) != 0)).all()
        assert spp.verify(truth.base, out) == report.sparsity_report == spp.verify(out)
