"""Patterns are parsed and fitted as documented; masks come from bits and agree with the plain definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, PatternError
from spp.masks import patterns
from spp.masks.patterns import (
    Pattern,
    all_finite,
    count_kept,
    detect_along,
    detect_pattern,
    is_loose,
    is_nm,
    magnitude_bits,
    nonzero_mask,
    pack_bits,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def subnormals(dtype: torch.dtype) -> torch.Tensor:
    """The smallest and the largest subnormal of a dtype with both signs, made from bits."""
    mantissa = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype]
    bits = torch.tensor([1, (1 << mantissa) - 1], dtype=patterns.BITS[dtype])
    return torch.cat([bits, bits | torch.iinfo(bits.dtype).min]).view(dtype)


@pytest.fixture
def flushing() -> Iterator[None]:
    """A process that treats subnormals as zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def naive_groups(mask: torch.Tensor, group: int) -> list[int]:
    """How many are kept in each group of each row, counted one by one."""
    return [sum(row[i : i + group]) for row in mask.tolist() for i in range(0, len(row), group)]


def naive_pattern(mask: torch.Tensor) -> str:
    rows = mask.tolist()
    kept = sum(map(sum, rows))
    if kept == mask.numel():
        return "dense"
    found = []
    for group in (2, 4, 8, 16, 32):
        if kept and mask.shape[1] % group == 0:
            most = max(naive_groups(mask, group))
            found += [(n / group, group, n) for n in (1, 2, 4, 8, 16) if n <= group // 2 and most <= n]
    for share, group, n in sorted(found):
        places = torch.distributions.Binomial(group, torch.tensor(kept / mask.numel(), dtype=torch.float64))
        above = float(places.log_prob(torch.arange(n + 1.0, group + 1, dtype=torch.float64)).exp().sum())
        if 2 * kept > share * mask.numel() or above * (mask.numel() // group) >= 14:  # more than half full; no chance
            return f"{n}:{group}"
    return "unstructured"


@pytest.mark.parametrize(
    ("text", "kept", "group", "sparsity", "shown"),
    [
        ("2:4", 2, 4, 0.5, "2:4"),
        (" 2 : 8 ", 2, 8, 0.75, "2:8"),
        ("1:16", 1, 16, 0.9375, "1:16"),
        ("3:7", 3, 7, 4 / 7, "3:7"),
    ],
)
def test_nm_is_parsed(text: str, kept: int, group: int, sparsity: float, shown: str) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.kept, pattern.group, pattern.fraction, pattern.is_nm) == (kept, group, None, True)
    assert math.isclose(pattern.sparsity, sparsity)
    assert str(pattern) == shown
    assert Pattern.parse(str(pattern)) == Pattern.parse(pattern) == pattern


@pytest.mark.parametrize("value", ["0.5", 0.5, " 5e-1", np.float32(0.5), torch.tensor(0.5)])
def test_a_fraction_is_parsed(value: object) -> None:
    pattern = Pattern.parse(value)  # type: ignore[arg-type]
    assert (pattern.kept, pattern.group, pattern.sparsity, pattern.is_nm) == (None, None, 0.5, False)
    assert str(pattern) == "0.5"
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("value", [0, "0", 0.0])
def test_a_fraction_of_nothing_is_one(value: object) -> None:
    assert Pattern.parse(value) == Pattern(fraction=0.0)  # type: ignore[arg-type]
    assert Pattern.parse(value).sparsity == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4:2", "1 <= N < M"),
        ("4:4", "1 <= N < M"),
        ("0:4", "1 <= N < M"),
        ("2:4:8", "no sparsity pattern"),
        ("²:4", "no sparsity pattern"),
        ("-2:4", "no sparsity pattern"),
        ("50%", "write the fraction: 0.5"),
        ("50", "did you mean 0.5"),
        (50, "did you mean 0.5"),
        (10**400, "0000 is no sparsity pattern"),
        (1.0, "at least 0 and below 1"),
        (-0.5, "at least 0 and below 1"),
        (math.nan, "at least 0 and below 1"),
        (math.inf, "at least 0 and below 1"),
        ("nan", "no sparsity pattern"),
        ("", "no sparsity pattern"),
        ("dense", "no sparsity pattern"),
        (None, "no sparsity pattern"),
        (True, "no sparsity pattern"),
        ([0.5], "no sparsity pattern"),
        (2 + 1j, "no sparsity pattern"),
    ],
)
def test_nonsense_is_refused(value: object, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        Pattern.parse(value)  # type: ignore[arg-type]
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("value", [0, 0.0, "0", "-0.0", -0.0])
def test_nothing_can_be_pruned(value: object) -> None:
    pattern = Pattern.parse(value)  # type: ignore[arg-type]
    assert (str(pattern), pattern.sparsity) == ("0.0", 0.0)


def test_a_pattern_is_one_thing_only() -> None:
    with pytest.raises(PatternError, match="not both"):
        Pattern(kept=2, group=4, fraction=0.5)
    with pytest.raises(PatternError):
        Pattern()


@pytest.mark.parametrize(
    ("pattern", "inputs", "nearest"),
    [("2:4", 90, '"1:2"'), ("2:4", 15, '"8:15"'), ("2:8", 12, '"1:4"'), ("1:4", 6, '"1:3"'), ("4:8", 100, '"2:4"')],
)
def test_a_pattern_that_does_not_fit_names_the_nearest_that_does(pattern: str, inputs: int, nearest: str) -> None:
    with pytest.raises(PatternError, match=nearest) as caught:
        Pattern.parse(pattern).require_fit(inputs, "model.layers.0.q_proj")
    assert f"model.layers.0.q_proj has {inputs}" in str(caught.value)


def test_a_prime_dimension_is_offered_unstructured_pruning() -> None:
    with pytest.raises(PatternError, match=r"prune unstructured with 0\.5"):
        Pattern.parse("2:4").require_fit(97)
    Pattern.parse("2:4").require_fit(96)
    Pattern.parse(0.5).require_fit(97)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_is_a_zero_and_a_subnormal_is_not(dtype: torch.dtype) -> None:
    t = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, math.nan]).to(dtype), subnormals(dtype)])
    expected = [False, False, True, True, True, True, True, True, True, True]
    assert nonzero_mask(t).tolist() == expected
    assert nonzero_mask(t.repeat(2, 2)[:, ::2]).tolist() == [(expected * 2)[::2]] * 2  # any strides
    assert count_kept(pack_bits(t)) == 8


@pytest.mark.parametrize("dtype", FLOATS)
def test_flushing_denormals_does_not_change_a_mask(dtype: torch.dtype, flushing: None) -> None:
    t = subnormals(dtype)
    if dtype in (torch.float32, torch.float64):
        assert not t.ne(0).any()  # the obvious way fails here: the test has teeth
    assert nonzero_mask(t).all()
    assert nonzero_mask(t.repeat(2)[::2]).all()
    assert count_kept(pack_bits(t)) == t.numel()
    assert detect_pattern(torch.stack([t, torch.zeros_like(t)], dim=1)) == "1:2"


@pytest.mark.parametrize("dtype", [*FLOATS, *SMALL_FLOATS, torch.int32, torch.int8, torch.uint8, torch.bool])
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    t = torch.tensor([[0, 1, 0], [2, 0, 3]]).to(dtype)
    expected = [[False, True, False], [True, False, True]]
    assert nonzero_mask(t).tolist() == expected
    assert nonzero_mask(t.t()).t().tolist() == expected
    assert pack_bits(t).tolist() == [0b01010100]
    assert nonzero_mask(t) is not t


def test_a_dtype_without_known_bits_is_refused() -> None:
    with pytest.raises(PatternError, match="complex64"):
        nonzero_mask(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(PatternError, match="int32"):
        magnitude_bits(torch.zeros(2, dtype=torch.int32))


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(0, 70), st.booleans())
def test_pack_bits_is_packbits(seed: int, m: int, n: int, transposed: bool) -> None:
    t = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).relu_()
    t = t.t() if transposed else t
    assert pack_bits(t).tolist() == np.packbits(t.numpy() != 0).tolist()
    assert count_kept(pack_bits(t)) == int((t != 0).sum())


def test_chunks_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)).relu_()
    t[:, 1::2] = 0
    t[-1, -1] = 1  # the last group of the last chunk breaks the pattern
    monkeypatch.setattr(patterns, "_CHUNK", 32)
    for view in (t, t.t().contiguous().t()):
        assert pack_bits(view).tolist() == np.packbits(t.numpy() != 0).tolist()
        assert nonzero_mask(view).equal(t != 0)
        assert detect_pattern(view) == naive_pattern(t != 0)


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.sampled_from([1, 2, 6, 8, 12, 16, 32, 40, 64, 96]),
    st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([None, (1, 2), (2, 4), (2, 8), (4, 8), (1, 16), (8, 16), (16, 32)]),
)
def test_detect_pattern_is_the_definition(
    seed: int, m: int, n: int, density: float, nm: tuple[int, int] | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(m, n, generator=generator)
    mask = scores < density
    if nm and n % nm[1] == 0:
        mask = scores.view(m, -1, nm[1]).argsort(-1).argsort(-1).view(m, n) < nm[0]
    assert detect_pattern(mask) == naive_pattern(mask)
    assert detect_pattern(mask.t(), input_axis=0) == naive_pattern(mask)
    assert detect_pattern(mask.float()) == naive_pattern(mask)
    for group in (1, 2, 3, 4, 5, 8, 12, 32):
        for kept in range(group + 1):
            expected = n % group == 0 and max(naive_groups(mask, group)) <= kept
            assert is_nm(mask, kept, group) == expected
            assert is_nm(mask.t(), kept, group, input_axis=0) == expected


@given(
    seed=st.integers(0, 2**30),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 32]), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    halved=st.booleans(),
)
def test_packed_bits_alone_tell_the_pattern_along_any_axis(
    seed: int, shape: list[int], density: float, halved: bool
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    if halved:
        mask &= torch.arange(shape[-1]) % 4 < 2
    for axis in range(len(shape)):
        assert detect_along(pack_bits(mask), shape, axis) == detect_pattern(mask, axis)


def test_edges_of_detection() -> None:
    assert detect_pattern(torch.zeros(4, 8)) == "unstructured"
    assert detect_pattern(torch.ones(4, 8)) == "dense"
    assert detect_pattern(torch.ones(0, 8)) == "dense"
    assert detect_pattern(torch.tensor(0.0)) == "unstructured"
    experts = torch.tensor([1.0, 1, 0, 0]).repeat(3, 5, 2)  # (E, m, n)
    assert detect_pattern(experts) == "2:4"
    assert detect_pattern(experts.transpose(1, 2), input_axis=1) == "2:4"
    assert detect_pattern(experts, input_axis=1) == "unstructured"


def test_few_weights_anywhere_are_no_pattern() -> None:
    scores = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    for pruned in (0.75, 0.9):
        mask = scores.argsort(-1).argsort(-1) >= int(pruned * 64)
        assert is_nm(mask, 16, 32) and detect_pattern(mask) == "unstructured"
    some = torch.tensor([True, True, False, False]).repeat(8, 16)
    some[:3] = False  # rows that are wholly zero
    assert detect_pattern(some) == "2:4"
    some[:4] = False
    assert detect_pattern(some) == "unstructured"  # in 128 groups, of which chance leaves one in twenty with more


def test_a_pattern_whose_groups_are_half_empty_is_named_where_chance_does_not_make_it() -> None:
    """What was pruned to 2:4 after three quarters of it were zero; a group of three is none of it."""
    scores = torch.rand(128, 64, generator=torch.Generator().manual_seed(0))
    anywhere = scores.argsort(-1).argsort(-1) >= 48
    assert detect_pattern(anywhere) == "unstructured"
    pruned = anywhere & (scores.view(128, 16, 4).argsort(-1).argsort(-1) >= 2).view(128, 64)
    assert not is_nm(pruned, 2, 8) and detect_pattern(pruned) == "2:4"
    assert is_loose("2:4", int(pruned.sum()), pruned.numel())
    assert not is_loose("2:4", 5, 16) and not is_loose("unstructured", 1, 16)
    pruned[0, :8] = torch.tensor([True, True, False, True, False, False, True, False])
    assert not is_nm(pruned, 2, 4) and detect_pattern(pruned) == "4:8"
    pruned[0, 4] = True
    assert not is_nm(pruned, 4, 8) and detect_pattern(pruned) == "unstructured"


@pytest.mark.parametrize("dtype", [*FLOATS, *SMALL_FLOATS, torch.complex64])
def test_all_finite(dtype: torch.dtype) -> None:
    t = torch.ones(3, 5).to(dtype)
    assert all_finite(t) and all_finite(t[:0]) and all_finite(torch.arange(3))
    for bad in (math.nan, math.inf, -math.inf):
        if dtype == torch.float8_e4m3fn and math.isinf(bad):
            continue  # the type has no infinity
        broken = torch.ones(3, 5)
        broken[1, 2] = bad
        assert not all_finite(broken.to(dtype))
        assert not all_finite(broken.to(dtype).t())
