"""Magnitude masks are the definition, exactly: which weights, how many, and which of equals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks import magnitude as module
from spp.masks.patterns import is_nm
from spp.pruning import magnitude_mask

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def naive(weight: torch.Tensor, pattern: str | float) -> torch.Tensor:
    """The definition with Python's sort: best first, of equals the lower index first."""
    matrices = weight.double().abs().reshape(-1, *weight.shape[-2:])
    mask = torch.zeros(matrices.shape, dtype=torch.bool)
    for matrix, out in zip(matrices, mask, strict=True):
        flat, chosen = matrix.flatten().tolist(), out.view(-1)
        if isinstance(pattern, float):
            groups, kept = [list(range(len(flat)))], len(flat) - math.floor(pattern * len(flat))
        else:
            kept, size = map(int, pattern.split(":"))
            groups = [list(range(i, i + size)) for i in range(0, len(flat), size)]
        for group in groups:
            for i in sorted(group, key=lambda i: (-flat[i], i))[:kept]:
                chosen[i] = True
    return mask.view(weight.shape)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "1:2", "3:5", "7:8", "16:32", "20:40", 0.5, 0.25, 0.9, 0.001])
@pytest.mark.parametrize("shape", [(7, 160), (1, 160), (40, 7 * 160), (3, 5, 160)])
def test_the_mask_is_the_definition(dtype: torch.dtype, pattern: str | float, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = magnitude_mask(weight, pattern)
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    assert mask.equal(naive(weight, pattern))


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, 3e38]), min_size=8, max_size=64),
    st.sampled_from(["1:2", "2:4", "4:8", "1:8", 0.1, 0.5, 0.75, 0.99]),
)
def test_ties_go_to_the_lower_index(values: list[float], pattern: str | float) -> None:
    values = values[: len(values) // 8 * 8]
    weight = torch.tensor(values).view(-1, 8)
    mask = magnitude_mask(weight, pattern)
    assert mask.equal(naive(weight, pattern))
    assert mask.equal(magnitude_mask(-weight, pattern))  # a sign says nothing
    if isinstance(pattern, str):
        kept, group = map(int, pattern.split(":"))
        assert is_nm(mask, kept, group)
        assert int(mask.sum()) == weight.numel() * kept // group
    else:
        assert int((~mask).sum()) == math.floor(pattern * weight.numel())


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_equal_weights_keep_the_first(pattern: str | float) -> None:
    mask = magnitude_mask(torch.full((2, 4), -3.0), pattern)
    row = [[True, True, False, False]] * 2
    assert mask.tolist() == (row if pattern == "2:4" else [[True] * 4, [False] * 4])


def test_unstructured_is_exact_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", 64)
    weight = torch.randint(-5, 6, (23, 40), generator=torch.Generator().manual_seed(1)).float()
    for pattern in (0.3, 0.5, 0.77, "2:4", "8:20"):
        assert magnitude_mask(weight, pattern).equal(naive(weight, pattern))


def test_experts_are_pruned_apart() -> None:
    weight = torch.stack([torch.arange(1.0, 9).view(2, 4), 100 * torch.arange(1.0, 9).view(2, 4)])
    mask = magnitude_mask(weight, 0.5)
    assert mask[0].equal(mask[1]) and mask[0].equal(magnitude_mask(weight[0], 0.5))


def test_the_pruned_count_is_the_decimals_not_the_doubles() -> None:
    assert int((~magnitude_mask(torch.rand(10, 10), 0.29)).sum()) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_flushing_denormals_changes_nothing(dtype: torch.dtype, pattern: str | float) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    weight = torch.tensor([[1, 4, 3, 2], [8, 5, 6, 7]], dtype=bits).view(dtype)  # subnormals all
    expected = magnitude_mask(weight, pattern)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert magnitude_mask(weight, pattern).equal(expected)
    finally:
        torch.set_flush_denormal(False)
    want = [[0, 1, 1, 0], [1, 0, 0, 1]] if pattern == "2:4" else [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert expected.int().tolist() == want


def test_other_layouts_and_grad_do_not_matter() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    for pattern in ("2:4", 0.5):
        expected = magnitude_mask(weight, pattern)
        assert magnitude_mask(weight.t().contiguous().t(), pattern).equal(expected)
        assert magnitude_mask(torch.nn.Parameter(weight), pattern).equal(expected)
    assert magnitude_mask(torch.empty(0, 8), "2:4").shape == (0, 8)
    assert magnitude_mask(torch.empty(3, 0), 0.5).shape == (3, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 1] = bad
    with pytest.raises(NonFiniteError, match=r"\(2, 4\)"):
        magnitude_mask(weight, "2:4")


def test_a_pattern_that_does_not_fit_offers_another() -> None:
    with pytest.raises(PatternError, match='"1:2"'):
        magnitude_mask(torch.ones(4, 6), "2:4")
    with pytest.raises(PatternError):
        magnitude_mask(torch.ones(4, 6), "6:2")


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(1, 1, 2, 4), torch.ones(2, 4, dtype=torch.int32)])
def test_only_matrices_are_pruned(weight: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="floating point"):
        magnitude_mask(weight, "2:4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", ["2:4", "16:32", 0.5, 0.29])
def test_a_gpu_gives_the_same_mask(pattern: str | float) -> None:
    weight = torch.randint(-9, 9, (64, 96)).to(torch.bfloat16)
    assert magnitude_mask(weight.cuda(), pattern).cpu().equal(magnitude_mask(weight, pattern))
