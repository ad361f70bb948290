"""Wanda's mask equals the written-out algorithm's; counts, ties, dead inputs and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks.patterns import Pattern
from spp.pruning import wanda_mask
from tests.masks.oracles import wanda_oracle


def _weight(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(n: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 10


def test_the_comparison_can_fail() -> None:
    weight, norm = _weight(5, 16), _norm(16)
    assert not torch.equal(wanda_oracle(weight, norm, nm=(2, 4)), wanda_oracle(weight, torch.ones(16), nm=(2, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 2), (8, 16), (5, 24)])
def test_groups_equal_the_literal_algorithm(kept: int, group: int, dtype: torch.dtype) -> None:
    weight, norm = _weight(7, 48, dtype=dtype), _norm(48)
    mask = wanda_mask(weight, norm, f"{kept}:{group}")
    # Products in float32, as in the library, so that bfloat16 weights of equal score tie in both.
    exact = weight.float() if dtype != torch.float64 else weight
    assert torch.equal(mask, wanda_oracle(exact, norm, nm=(kept, group)))
    assert (mask.view(7, -1, group).sum(-1) == kept).all()


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.75, 0.29, 0.01, 0.99])
@pytest.mark.parametrize(("m", "n"), [(1, 48), (5, 37), (3, 1)])
def test_rows_equal_the_literal_algorithm(fraction: float, m: int, n: int) -> None:
    weight, norm = _weight(m, n), _norm(n)
    mask = wanda_mask(weight, norm, fraction)
    assert torch.equal(mask, wanda_oracle(weight, norm, fraction=fraction))
    assert ((~mask).sum(1) == int(fraction * n)).all()


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["2:4", "1:4", "4:8", 0.5, 0.9]), st.integers(0, 99))
def test_counts_hold_whatever_the_ties(m: int, groups: int, pattern: str | float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-1, 2, (m, groups * 8), generator=generator).float()
    norm = torch.randint(0, 2, (groups * 8,), generator=generator).float()
    mask = wanda_mask(weight, norm, pattern)
    parsed = Pattern.parse(pattern)
    if parsed.group is not None:
        assert (mask.view(m, -1, parsed.group).sum(-1) == parsed.kept).all()
    else:
        assert ((~mask).sum(1) == int(parsed.sparsity * groups * 8)).all()


def test_of_equals_the_lower_index_stays() -> None:
    assert wanda_mask(torch.ones(1, 8), torch.ones(8), "2:4").tolist() == [[True, True, False, False] * 2]
    assert wanda_mask(torch.ones(1, 4), torch.ones(4), 0.5).tolist() == [[True, True, False, False]]


def test_a_dead_input_goes_first_and_all_dead_is_defined() -> None:
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    assert wanda_mask(weight, torch.tensor([0.0, 1.0, 1.0, 1.0]), "2:4").tolist() == [[False, False, True, True]]
    assert wanda_mask(weight, torch.zeros(4), "2:4").tolist() == [[True, True, False, False]]


def test_the_weight_is_not_changed_and_strides_do_not_matter() -> None:
    weight = _weight(16, 8).T
    before = weight.clone()
    assert torch.equal(wanda_mask(weight, _norm(16), "2:4"), wanda_mask(before.contiguous(), _norm(16), "2:4"))
    assert torch.equal(weight, before)


def test_bad_input_is_refused() -> None:
    weight = _weight(2, 8)
    with pytest.raises(ConfigError, match=r"\(7,\).*\(8,\)"):
        wanda_mask(weight, torch.ones(7), "2:4")
    with pytest.raises(ConfigError, match="negative"):
        wanda_mask(weight, -torch.ones(8), "2:4")
    with pytest.raises(NonFiniteError, match="input_norm"):
        wanda_mask(weight, torch.full((8,), torch.nan), "2:4")
    with pytest.raises(NonFiniteError, match="weight"):
        wanda_mask(weight.index_fill(1, torch.tensor([3]), torch.inf), torch.ones(8), "2:4")
    with pytest.raises(PatternError, match="nearest"):
        wanda_mask(_weight(2, 10), torch.ones(10), "2:4")
