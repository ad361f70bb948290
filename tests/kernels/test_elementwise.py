"""The compiled pass of a merge: torch's bits, zlib's sums and counts one by one, whatever the shapes and the values."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spp.configs.pattern import USUAL_GROUPS
from spp.errors import ConfigError, NonFiniteError
from spp.files.hashes import combine_crc32
from spp.kernels import use_kernels
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import PIECE, Found, Matrix, library, merge_matrix, scan, terms_of
from spp.masks.patterns import all_finite, nonzero_mask, pack_bits
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_tensor
from spp.rules import Adapter, Rule, get_rule
from spp.rules.terms import TermsRule
from tests.helpers.tolerances import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = 1e-5  # relative: products are added up in float32 in another order than torch's

pytestmark = pytest.mark.skipif(elementwise.why_not() is not None, reason=f"no compiled merge: {elementwise.why_not()}")


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    with use_kernels("native"):
        yield


def weight_of(m: int, n: int, dtype: torch.dtype, seed: int = 0, kept: float = 0.5) -> Tensor:
    """A pruned weight with both zeros, subnormals, the smallest normal and large numbers among its entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.finfo(dtype)
    large = min(info.max / 4, 1e15)  # whose squares can be summed up
    special = torch.tensor([0.0, -0.0, info.smallest_normal, -info.smallest_normal, large, -large])
    chosen = torch.randint(0, 40, (m, n), generator=generator)
    weight = torch.where(chosen < 6, special.to(dtype)[chosen.clamp(max=5)], weight)
    weight = torch.where(chosen == 6, torch.ones((), dtype=bits).view(dtype), weight)  # the smallest subnormal
    return weight * (torch.rand(m, n, generator=generator) < kept).to(dtype)


def params_of(rule: Rule, m: int, n: int, r: int, scale: float = 0.3, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) * scale for shape in rule.shapes(m, n, r)]
    made[0][:, : n // 3] = -0.5
    made[1][: m // 2] = 1.0  # with s = 2, M = 0: whatever is kept there is rescued
    return made


def both(rule: Rule, weight: Tensor, params: list[Tensor], scaling: float, **options: Any) -> tuple[Any, Any]:
    """(merged, report) by the compiled pass and by torch."""
    compiled = merge_tensor(weight, Adapter(rule, params, scaling), **options)
    with use_kernels("torch"):
        return compiled, merge_tensor(weight, Adapter(rule, params, scaling), **options)


def assert_same_merge(one: tuple[Tensor, LayerMerge], other: tuple[Tensor, LayerMerge]) -> None:
    assert_same_bits(one[0], other[0])
    (a, b) = one[1], other[1]
    assert (a.kept, a.rescued, a.updated, a.moved) == (b.kept, b.rescued, b.updated, b.moved)
    assert (a.survived is None) == (b.survived is None) == (a.updated == 0)
    for name in ("max_relative_change", "update_norm", *(() if a.survived is None else ("survived",))):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=SUMS, abs=1e-30), name


SHAPES = [(1, 1, 1), (1, 17, 1), (5, 3, 2), (13, 7, 5), (48, 32, 16), (31, 64, 16), (40, 333, 7), (3, 4099, 2)]


@pytest.mark.parametrize("stored_as", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_bits_and_report_are_torchs(m: int, n: int, r: int, dtype: torch.dtype, stored_as: torch.dtype) -> None:
    rule = get_rule("spp")
    weight = weight_of(m, n, dtype)
    if torch.finfo(stored_as).max < torch.finfo(dtype).max:
        weight = weight.clamp(-100, 100)
    compiled, plain = both(rule, weight, params_of(rule, m, n, r), 2.0, dtype=stored_as)
    assert_same_merge(compiled, plain)


def test_numbers_whose_squares_overflow_are_merged_as_well() -> None:
    rule, weight = get_rule("spp"), torch.full((2, 20), 1e38)
    compiled, plain = both(rule, weight, [torch.full((1, 20), 0.1), torch.ones(2, 1)], 2.0)
    assert_same_bits(compiled[0], plain[0])
    assert compiled[1] == plain[1] and plain[1].survived == pytest.approx(1, abs=1e-5)
    assert math.isfinite(plain[1].update_norm)


def test_some_of_these_are_rescued_and_a_wrong_value_would_be_seen() -> None:
    rule = get_rule("spp")
    compiled, plain = both(rule, weight_of(40, 333, torch.bfloat16), params_of(rule, 40, 333, 7), 2.0)
    assert compiled[1].rescued > 100
    compiled[0].view(-1)[-1] += 1
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same_merge(compiled, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_a_weight_that_is_stored_transposed(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    rule = get_rule("spp")
    weight = weight_of(m, n, dtype).t().contiguous().t()
    params = params_of(rule, m, n, r)
    assert_same_merge(*both(rule, weight, params, 2.0))
    found = merge_matrix(rule, weight, rule.prepare(params, 2.0, m, torch.float32), dtype)
    assert found is not None and found[0].shape == weight.shape


def test_a_weight_with_gaps_between_its_rows_is_left_to_torch() -> None:
    rule = get_rule("spp")
    weight, params = weight_of(8, 40, torch.float32)[:, 3:37], params_of(rule, 8, 34, 2)
    assert merge_matrix(rule, weight, rule.prepare(params, 2.0, 8, torch.float32), torch.float32) is None
    assert_same_merge(*both(rule, weight, params, 2.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_terms(dtype: torch.dtype, transposed: bool) -> None:
    spp, m, n, ranks = get_rule("spp"), 37, 70, (3, 1, 37)
    rule = TermsRule(spp, ranks, (2.0, -0.7, 0.3))
    params = [p for seed, r in enumerate(ranks) for p in params_of(spp, m, n, r, seed=seed)]
    weight = weight_of(m, n, dtype)
    assert_same_merge(*both(rule, weight.t().contiguous().t() if transposed else weight, params, 1.0))
    assert len(terms_of(rule, rule.prepare(params, 1.0, m, torch.float32)) or []) == 3


def test_pieces_do_not_change_a_bit() -> None:
    rule, m, n = get_rule("spp"), 1100, 1031  # more than a piece, and rows that straddle two
    weight, params = weight_of(m, n, torch.bfloat16), params_of(rule, m, n, 16)
    compiled, plain = both(rule, weight, params, 2.0)
    assert m * n > PIECE
    assert_same_merge(compiled, plain)
    factors = rule.prepare(params, 2.0, m, torch.float32)
    matrix = Matrix(library(), m, n, torch.bfloat16, torch.bfloat16, [factors])
    found, bits = [], np.empty((m * n + 7) // 8, np.uint8)
    out = torch.empty_like(weight)
    for begin in reversed(range(0, m * n, PIECE)):
        end = min(begin + PIECE, m * n)
        part = bits[begin // 8 : (end + 7) // 8]
        found.append(matrix.merge(weight.data_ptr() + 2 * begin, out.data_ptr() + 2 * begin, part, begin, end))
    whole = Found().then(found[1]).then(found[0])
    assert_same_bits(out, plain[0])
    assert np.array_equal(bits, pack_bits(weight))
    assert whole.crc == zlib.crc32(plain[0].view(torch.uint8).numpy().tobytes()) and whole.size == 2 * m * n
    assert whole.inner / whole.square == compiled[1].survived and whole.changed == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found_and_torch_says_where(bad: float) -> None:
    rule, m, n = get_rule("spp"), 9, 50
    weight, params = weight_of(m, n, torch.float32), params_of(rule, m, n, 3)
    params[0][2, 7] = bad  # of α; zeros of W become NaN there
    weight[8, 7] = 0
    factors = rule.prepare(params, 2.0, m, torch.float32)
    found = merge_matrix(rule, weight, factors, torch.float32)
    assert found is not None and found[1].changed and found[1].finite_before and not found[1].finite_after
    weight[0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"at \[0, 0\]"):
        merge_tensor(weight, Adapter(rule, params_of(rule, m, n, 3), 2.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion_alone_keeps_every_weight(dtype: torch.dtype) -> None:
    weight = weight_of(7, 33, torch.float32).clamp(-1000, 1000)
    out, bits = torch.empty(7, 33, dtype=dtype), np.empty(29, np.uint8)
    found = Matrix(library(), 7, 33, torch.float32, dtype).merge(
        weight.data_ptr(), out.data_ptr(), bits, 0, weight.numel()
    )
    nearest = weight.to(dtype)
    changed = nonzero_mask(weight) & ~nonzero_mask(nearest)
    assert found.rescued == int(changed.sum()) and found.square == 0
    assert torch.equal(out[~changed], nearest[~changed])
    assert torch.equal(nonzero_mask(out), nonzero_mask(weight))


def most_one_by_one(t: Tensor) -> tuple[int, ...]:
    mask = nonzero_mask(t.reshape(-1)).tolist()
    groups = ([mask[i : i + size] for i in range(0, len(mask), size)] for size in USUAL_GROUPS)
    return tuple(max((sum(group) for group in of_size), default=0) for of_size in groups)


@pytest.mark.parametrize("kept", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scan_counts_what_is_there(dtype: torch.dtype, kept: float) -> None:
    for count in (0, 1, 7, 8, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, 9001):
        t = weight_of(1, count, dtype, seed=count, kept=kept)[0]
        bits = np.full((count + 7) // 8, 255, np.uint8)
        found = scan(library(), t.data_ptr(), dtype, count, bits)
        assert np.array_equal(bits, pack_bits(t))
        assert found.kept == int(torch.count_nonzero(nonzero_mask(t))) and found.most == most_one_by_one(t)
        data = t.view(torch.uint8).numpy().tobytes()
        assert found.finite_before == all_finite(t) and (found.crc, found.size) == (zlib.crc32(data), len(data))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_scan_finds_what_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 15, 4096, 4999):
        t = torch.full((5000,), torch.finfo(dtype).max, dtype=dtype)
        bits = np.empty(625, np.uint8)
        assert scan(library(), t.data_ptr(), dtype, 5000, bits).finite_before
        t[place] = bad
        assert not scan(library(), t.data_ptr(), dtype, 5000, bits).finite_before


def test_checksums_are_zlibs_and_can_be_put_together() -> None:
    generator = np.random.default_rng(0)
    for count in [*range(200), 4096, 12345]:
        data = generator.integers(0, 256, count, dtype=np.uint8)
        assert elementwise.crc32(library(), data) == zlib.crc32(data.data)
        for cut in {0, 1, count // 3, count}:
            first, second = data[:cut].tobytes(), data[cut:].tobytes()
            whole = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
            assert whole == zlib.crc32(data.data)


def test_torch_and_what_the_pass_does_not_know_are_left_to_torch() -> None:
    rule, weight = get_rule("spp"), weight_of(4, 8, torch.float32)
    factors = rule.prepare(params_of(rule, 4, 8, 2), 2.0, 4, torch.float32)
    assert merge_matrix(rule, weight, factors, torch.float64) is None
    assert merge_matrix(rule, weight, object(), torch.float32) is None
    with use_kernels("torch"):
        assert library() is None and merge_matrix(rule, weight, factors, torch.float32) is None


def test_a_choice_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_load", lambda: (None, "there is no C compiler"))
    with pytest.raises(ConfigError, match="SPP_KERNELS=native: there is no C compiler"):
        library()
    with use_kernels("auto"):
        assert library() is None
