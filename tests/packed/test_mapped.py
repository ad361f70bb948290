"""Pages of a mapped file go back to the system with the last tensor in them, and never before."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from spp.packed import give_back_pages
from tests.packed.matrices import nm_matrix

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a page belongs to"),
    pytest.mark.skipif(not hasattr(torch._C, "_storage_Use_Count"), reason="this torch does not count users"),
]
SIZE = 512 * 512 * 4


def resident(path: Path) -> int:
    """Bytes of this process's own copies of pages of a mapped file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Private_Dirty:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of three matrices, mapped, every page of them written to."""
    path = tmp_path / "weights.safetensors"
    save_file({name: nm_matrix(512, 512, "2:4", torch.float32) for name in "abc"}, path)
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.mul_(2)
    if resident(path) < 3 * SIZE:
        pytest.skip("this safetensors does not map files")
    return path, tensors


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(512, 512, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


@pytest.mark.parametrize(
    "convert", [spp.pack, lambda model, **names: spp.wrap(model, r=2, packed=True, **names)], ids=["pack", "wrap"]
)
def test_packing_gives_the_pages_back(mapped: tuple[Path, dict[str, torch.Tensor]], convert: Callable) -> None:
    path, tensors = mapped
    expected = tensors["b"].clone()
    model = nn.Sequential(*(linear_of(tensors.pop(name)) for name in "ab"))
    convert(model, target_modules="all-linear")
    assert resident(path) < 1.1 * SIZE, "c's alone"
    assert torch.equal(model[1].weight, expected)
    assert torch.equal(tensors["c"], 2 * nm_matrix(512, 512, "2:4", torch.float32))


def test_what_somebody_still_looks_at_stays(mapped: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = mapped
    weight = tensors.pop("a")
    expected, view = weight.clone(), weight[3:5]
    model = nn.Sequential(linear_of(weight))
    del weight
    spp.pack(model, target_modules="all-linear")
    assert torch.equal(view, expected[3:5])
    assert resident(path) >= 3 * SIZE


def test_memory_of_no_file_stays(mapped: tuple[Path, dict[str, torch.Tensor]]) -> None:
    _, tensors = mapped
    kept = copy.deepcopy(tensors["a"])
    storage = kept.untyped_storage()
    assert not give_back_pages(storage), "a tensor uses it"
    del kept
    assert not give_back_pages(storage), "it is no mapping of a file"
    assert not give_back_pages(torch.empty(0).untyped_storage())
