"""PackedStack: experts' matrices packed in a common layout, each of which is a packed matrix of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.weights import PackedStack, PackedWeight
from tests.helpers.tolerances import assert_same_bits
from tests.weights.matrices import free_matrix, nm_matrix


def stacked(kind: str, m: int, n: int, dtype: torch.dtype = torch.float32, experts: int = 3) -> Tensor:
    """Experts that differ: every row is rolled from one to the next by whole groups, every expert scaled."""
    one = free_matrix(m, n, 0.5, dtype) if kind == "free" else nm_matrix(m, n, kind, dtype)
    return torch.stack([one.roll(e, 0) * (e + 1) + 0.0 for e in range(experts)])


def packed_of(weight: Tensor, transposed: bool = False) -> PackedStack:
    return PackedStack.pack(lambda e: weight[e].T if transposed else weight[e], len(weight), transposed=transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["2:4", "1:4", "1:16", "free"])
def test_it_comes_back_bit_for_bit_stored_either_way(kind: str, dtype: torch.dtype) -> None:
    for m, n in [(8, 32), (1, 16), (5, 48), (3, 1072)]:
        weight = stacked(kind, m, n, dtype)
        packed = packed_of(weight)
        assert packed.shape == (3, m, n) and packed.numel == 3 * m * n and packed.dtype == dtype
        assert str(packed.layout) == ("any pattern" if kind in ("free", "1:16") else kind)
        assert_same_bits(packed.dense(), weight)
        for e, matrix in enumerate(packed.experts()):
            assert_same_bits(matrix.dense(), weight[e])
            alone = PackedWeight.pack(weight[e])
            for mine, expected in zip(packed.experts()[e].tensors(), alone.tensors(), strict=True):
                assert_same_bits(mine, expected)
        packed.check()
        inputs_first = torch.empty(3, n, m, dtype=dtype).copy_(weight.transpose(1, 2))
        other = packed_of(inputs_first, transposed=True)
        assert other.shape == (3, m, n) and other.input_axis == -2
        assert_same_bits(other.dense(), inputs_first)
        for mine, expected in zip(other.tensors(), packed.tensors(), strict=True):
            assert_same_bits(mine, expected)
        assert other.nbytes == packed.nbytes == sum(PackedWeight.pack(w).nbytes for w in weight)


def test_experts_share_a_layout_that_holds_all_of_them() -> None:
    less, dense = nm_matrix(8, 32, "2:4"), torch.ones(8, 32)
    sparse = less + 0.0
    sparse[0, :4] = 0.0
    assert str(packed_of(torch.stack([sparse, less])).layout) == "2:4"
    assert_same_bits(packed_of(torch.stack([sparse, less])).dense(), torch.stack([sparse, less + 0.0]))
    for weight in (torch.stack([sparse, dense]), torch.stack([torch.zeros(8, 32), less, dense])):
        assert str(packed_of(weight).layout) == "any pattern"
        assert_same_bits(packed_of(weight).dense(), weight + 0.0)
    assert_same_bits(packed_of(torch.zeros(2, 4, 8)).dense(), torch.zeros(2, 4, 8))


def test_odd_sides_do_not_share_bytes_of_the_mask() -> None:
    for m, n in [(3, 4), (1, 12), (7, 13), (5, 1)]:  # m · n is no multiple of 8
        weight = torch.stack([free_matrix(m, n, 0.5, torch.float32) for _ in range(3)]) + 0.0
        assert_same_bits(packed_of(weight).dense(), weight)
    pattern = torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat(3, 1)  # 3 × 4, 2:4
    assert str(packed_of(torch.stack([pattern, pattern.flip(1)])).layout) == "2:4"


def test_no_two_experts_need_to_be_there() -> None:
    asked = []

    def get(expert: int) -> Tensor:
        asked.append(expert)
        return nm_matrix(8, 16, "2:4") * (expert + 1)

    packed = PackedStack.pack(get, 3)
    assert asked.count(1) == asked.count(2) == 2
    assert_same_bits(packed.experts()[2].dense(), nm_matrix(8, 16, "2:4") * 3 + 0.0)


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"up_proj\[0\] has shape \(2, 4\) and dtype torch.int8"):
        PackedStack.pack(lambda e: torch.ones(2, 4, dtype=torch.int8), 2, where="up_proj")
    with pytest.raises(ConfigError, match="meta device"):
        PackedStack.pack(lambda e: torch.ones(2, 4, device="meta"), 2)


def test_tensors_that_do_not_belong_together_are_found() -> None:
    for kind in ("2:4", "free"):
        good = packed_of(stacked(kind, 8, 32))
        other = packed_of(stacked(kind, 8, 32, experts=2))
        mixed = [[*good.tensors()] for _ in good.tensors()]
        for i, tensors in enumerate(mixed):
            tensors[i] = other.tensors()[i]
            with pytest.raises(ConfigError, match=r"3 experts|\[\d\]"):
                PackedStack(good.layout, *tensors).check("w")
    free = packed_of(stacked("free", 8, 32))
    codes = free.codes.clone()
    codes[1] = 255
    with pytest.raises(ConfigError, match=r"the masks keep \d+ weights, but|w\[1\]"):
        PackedStack(free.layout, free.values, codes, free.starts).check("w")
    starts = free.starts.clone()
    starts[2, 3] += 1
    with pytest.raises(ConfigError, match=r"w\[2\]: starts"):
        PackedStack(free.layout, free.values, free.codes, starts).check("w")
    starts = free.starts.clone()
    starts[0, -1] += 1
    with pytest.raises(ConfigError, match=r"w: the masks keep"):
        PackedStack(free.layout, free.values, free.codes, starts).check("w")
    codes = packed_of(stacked("2:4", 8, 32)).codes.clone()
    codes[2, 0, 0] = 255
    with pytest.raises(ConfigError, match=r"w\[2\]: .* groups of 4"):
        nm = packed_of(stacked("2:4", 8, 32))
        PackedStack(nm.layout, nm.values, codes).check("w")
