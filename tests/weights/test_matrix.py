"""A packed matrix gives back every bit, whole or in rectangles, at the size that it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spp.errors import ConfigError
from spp.masks.patterns import nonzero_mask
from spp.weights import Layout, PackedWeight
from spp.weights.packed.decode import decode_anywhere
from tests.helpers.tolerances import assert_same_bits
from tests.weights.matrices import DTYPES, PATTERNS, free_matrix, nm_matrix, without_signs_of_zeros

SHAPES = [(1, 1), (1, 32), (7, 13), (31, 2053), (5, 96), (64, 1), (3, 1024), (2, 3000)]
EMPTY = [(0, 8), (8, 0), (0, 0)]


def check_round_trip(weight: Tensor, what: str = "") -> PackedWeight:
    packed = PackedWeight.pack(weight)
    packed.check()
    assert packed.shape == tuple(weight.shape)
    assert packed.dtype == weight.dtype
    assert_same_bits(packed.dense(), without_signs_of_zeros(weight), what)
    assert packed.nbytes == packed.layout.nbytes(int(nonzero_mask(weight).sum()), weight.element_size())
    return packed


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_usual_pattern(pattern: str, dtype: torch.dtype) -> None:
    group = int(pattern.split(":")[1])
    for m, n in [(1, group), (7, 3 * group), (13, 5 * group), (300, 512)]:
        packed = check_round_trip(nm_matrix(m, n, pattern, dtype, seed=n), f"{m} × {n}")
    assert packed.layout == Layout.of(300, 512, pattern)
    assert packed.layout.is_nm == (group <= 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), SHAPES + EMPTY)
def test_any_pattern_of_any_shape(m: int, n: int, dtype: torch.dtype) -> None:
    for density in (0.0, 0.1, 0.5, 0.97, 1.0):
        check_round_trip(free_matrix(m, n, density, dtype), f"{density}")


def test_groups_that_keep_fewer_and_rows_that_keep_nothing() -> None:
    for pattern in PATTERNS:
        weight = nm_matrix(40, 96 if "32" in pattern else 48, pattern)
        weight[3] = 0
        weight[5, :7] = 0
        weight[:, -1] = 0
        check_round_trip(weight, pattern)


def test_minus_zero_is_a_zero_and_strange_numbers_are_kept() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 4
    weight = torch.tensor([[-0.0, tiny, float("nan"), 0.0, -0.0, float("-inf"), -tiny, 0.0]])
    packed = check_round_trip(weight)
    assert int(nonzero_mask(packed.values).sum()) == 4
    with_signs = torch.tensor([[1.0, -0.0, -0.0, -0.0] * 4])  # one of four kept, stored with groups
    assert_same_bits(PackedWeight.pack(with_signs).dense(), without_signs_of_zeros(with_signs))


def test_strided_and_frozen_weights() -> None:
    weight = nm_matrix(96, 24, "2:4").t()
    assert not weight.is_contiguous()
    check_round_trip(weight)
    parameter = torch.nn.Parameter(nm_matrix(8, 16, "2:4"))
    packed = PackedWeight.pack(parameter)
    assert not packed.values.requires_grad
    parameter.data.zero_()
    assert packed.dense().any()  # no memory is shared


def rectangles(m: int, n: int) -> list[tuple[slice, slice]]:
    ends = {0, 7, 32, 1023, 1025, 2048, n - 1, n}
    cols = [slice(a, b) for a, b in itertools.product(sorted(ends), repeat=2) if 0 <= a <= b <= n]
    rows = [slice(None), slice(1, m - 1)]
    return list(itertools.product(rows, [slice(None), *cols]))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["free", *PATTERNS])
def test_any_rectangle_by_every_decoder(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for m, n in [(9, 2144), (70, 96)]:
        weight = free_matrix(m, n, 0.4) if kind == "free" else nm_matrix(m, n, kind)
        packed = PackedWeight.pack(weight)
        for rows, cols in rectangles(m, n):
            expected = weight[rows, cols] + 0.0
            out = torch.full(expected.shape, 7.0)
            assert_same_bits(packed.decode(rows, cols, out), expected, f"{kind} {rows} {cols}")
            r, c = (slice(*s.indices(length)[:2]) for s, length in ((rows, m), (cols, n)))
            out.fill_(7.0)
            decode_anywhere(packed.layout, packed.values, packed.codes, packed.starts, r, c, out)
            assert_same_bits(out, expected, f"{kind} {rows} {cols} by torch")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["free", "2:4", "1:4"])
def test_more_rows_than_are_decoded_together(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("spp.weights.packed.layout._CHUNK", 256)
    monkeypatch.setattr("spp.weights.packed.decode.CHUNK", 256)
    weight = free_matrix(9000, 64, 0.5) if kind == "free" else nm_matrix(9000, 64, kind)
    packed = check_round_trip(weight)
    rows, cols, out = slice(600, 8921), slice(13, 32), torch.empty(8321, 19)
    assert_same_bits(packed.decode(rows, cols, out), weight[rows, cols] + 0.0)
    decode_anywhere(packed.layout, packed.values, packed.codes, packed.starts, rows, cols, out.fill_(7))
    assert_same_bits(out, weight[rows, cols] + 0.0)


@given(
    m=st.integers(0, 12),
    n=st.integers(0, 70),
    density=st.floats(0, 1),
    group=st.sampled_from([0, 2, 4, 8, 16, 32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_round_trip_of_anything(m: int, n: int, density: float, group: int, dtype: torch.dtype, seed: int) -> None:
    weight = free_matrix(m, n, density, dtype, seed)
    if group:  # at most half of each group, often fewer
        dropped = torch.randperm(group, generator=torch.Generator().manual_seed(seed))[: group // 2]
        weight[:, torch.isin(torch.arange(n) % group, dropped)] *= -0.0
    check_round_trip(weight)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("dtype", "pattern", "bar"),
    [
        (torch.bfloat16, "2:4", 0.57),
        (torch.bfloat16, "4:8", 0.57),
        (torch.bfloat16, "0.5", 0.57),
        (torch.bfloat16, "1:4", 0.32),
        (torch.bfloat16, "2:8", 0.32),
        (torch.bfloat16, "0.75", 0.32),
        (torch.float32, "2:4", 0.54),
        (torch.float32, "0.5", 0.54),
        (torch.float32, "1:4", 0.29),
        (torch.float32, "0.75", 0.29),
    ],
)
@pytest.mark.parametrize(("m", "n"), [(576, 576), (192, 576), (1536, 576), (576, 1536), (512, 4096)])
def test_bytes(m: int, n: int, pattern: str, dtype: torch.dtype, bar: float) -> None:
    if ":" in pattern:
        weight = nm_matrix(m, n, pattern, dtype)
    else:
        kept = round(n * (1 - float(pattern)))
        order = torch.rand(m, n, generator=torch.Generator().manual_seed(0)).argsort(-1)
        weight = torch.ones(m, n, dtype=dtype) * (order < kept)
    packed = check_round_trip(weight)
    assert packed.nbytes / weight.nbytes <= bar


def test_the_smaller_layout_is_taken() -> None:
    sparse = nm_matrix(64, 128, "2:4")
    sparse[:, :96] = 0  # 2:4, but with an eighth of the weights: room for half would be wasted
    packed = check_round_trip(sparse)
    assert not packed.layout.is_nm
    assert packed.nbytes < Layout.of(64, 128, "2:4").nbytes(0, 4)


def test_golden_bytes() -> None:
    """The layout is a format: these bytes, in this order."""
    two_of_four = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0]])
    packed = PackedWeight.pack(two_of_four)
    assert packed.layout == Layout(1, 12, 2, 4)
    assert packed.values.tolist() == [[1.0, 2.0, 3.0, 0.0, 4.0, 5.0]]
    assert packed.codes.tolist() == [[0b0101_1100, 0b1100_0000]]
    assert packed.starts is None
    one_of_four = torch.zeros(2, 20)
    one_of_four[0, [1, 6, 11, 12, 19]] = torch.arange(1.0, 6.0)
    one_of_four[1, [0, 18]] = torch.tensor([6.0, 7.0])
    packed = PackedWeight.pack(one_of_four[:1])
    assert packed.layout == Layout(1, 20, 1, 4)
    assert packed.values.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert packed.codes.tolist() == [[0b0100_0010, 0b0001_1000, 0b0001_0000]]
    any_pattern = torch.zeros(2, 1030)
    any_pattern[0, [0, 1, 2, 1024]] = torch.arange(1.0, 5.0)
    any_pattern[1, [9, 1023, 1029]] = torch.arange(5.0, 8.0)
    packed = PackedWeight.pack(any_pattern)
    assert packed.layout == Layout(2, 1030)
    assert packed.values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert packed.codes[0, [0, 1, 128]].tolist() == [0b11100000, 0, 0b10000000]
    assert packed.codes[1, [0, 1, 127, 128]].tolist() == [0, 0b01000000, 1, 0b00000100]
    assert packed.starts is not None
    assert packed.starts.dtype == torch.int32
    assert packed.starts.tolist() == [[0, 3], [4, 6]]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"q_proj.weight has shape \(3,\)"):
        PackedWeight.pack(torch.ones(3), "q_proj.weight")
    with pytest.raises(ConfigError, match=r"int8.*what is packed is a matrix of float64"):
        PackedWeight.pack(torch.ones(3, 4, dtype=torch.int8))
    with pytest.raises(ConfigError, match="meta device"):
        PackedWeight.pack(torch.ones(3, 4, device="meta"))


def test_tensors_that_do_not_belong_together_are_found() -> None:
    a, b = PackedWeight.pack(nm_matrix(8, 16, "2:4")), PackedWeight.pack(nm_matrix(8, 16, "4:8"))
    free = PackedWeight.pack(free_matrix(8, 2048, 0.6))
    ones = PackedWeight.pack(nm_matrix(8, 24, "1:8"))
    assert free.starts is not None
    for packed, message in [
        (PackedWeight(a.layout, a.values, b.codes), "groups of 4 do not have 2 values"),
        (PackedWeight(a.layout, a.values[:, 1:], a.codes), r"values is \(8, 7\), expected \(8, 8\)"),
        (PackedWeight(a.layout, a.values, a.codes[:, :1]), r"codes is \(8, 1\), expected \(8, 2\)"),
        (PackedWeight(free.layout, free.values[1:], free.codes, free.starts), "the mask keeps"),
        (PackedWeight(free.layout, free.values, free.codes, free.starts + 1), "starts are not where"),
        (PackedWeight(free.layout, free.values, free.codes, free.starts[:1]), r"starts is \(1, 2\)"),
        (PackedWeight(ones.layout, ones.values, ones.codes | 0b1000), "groups of 8 do not have 1 values"),
    ]:
        with pytest.raises(ConfigError, match=message):
            packed.check("layer")
