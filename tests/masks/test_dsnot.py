"""DSnoT against its algorithm written out cycle by cycle; counts are kept, the expected error falls."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, MaskError, NonFiniteError, PatternError
from spp.pruning import InputStats, dsnot, magnitude_mask, wanda_mask
from tests.masks.oracles import dsnot_oracle


def _problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(n, generator=generator)
    spread = torch.rand(n, generator=generator) + 0.1
    return torch.randn(m, n, generator=generator), torch.randn(200, n, generator=generator) * spread + shift


def _expected_error(weight: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((weight.double() * x.double().mean(0)) * ~mask).sum(1).abs()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "4:8", "16:32", 0.5, 0.75, 0.3])
@pytest.mark.parametrize(("m", "n"), [(9, 96), (1, 32)])
@pytest.mark.parametrize(("max_cycles", "threshold"), [(50, 0.1), (3, 0.0), (1, 0.1), (200, 0.5)])
def test_masks_equal_the_literal_algorithm(
    pattern: str | float, m: int, n: int, max_cycles: int, threshold: float
) -> None:
    weight, x = _problem(m, n)
    group = int(pattern.split(":")[1]) if isinstance(pattern, str) else None
    for mask in (wanda_mask(weight, x.norm(dim=0), pattern), magnitude_mask(weight, pattern)):
        refined = dsnot(weight, mask, InputStats.of(x), pattern, max_cycles=max_cycles, threshold=threshold)
        expected = dsnot_oracle(weight, mask, x, group=group, max_cycles=max_cycles, threshold=threshold)
        assert torch.equal(refined, expected)


def test_something_happens_and_the_expected_error_falls() -> None:
    weight, x = _problem(16, 128)
    for pattern in ("2:4", 0.75):
        mask = wanda_mask(weight, x.norm(dim=0), pattern)
        refined = dsnot(weight, mask, InputStats.of(x), pattern)
        assert not torch.equal(refined, mask)
        before, after = _expected_error(weight, mask, x), _expected_error(weight, refined, x)
        assert (after <= before + 1e-6).all()
        assert after.mean() < 0.8 * before.mean()


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(["2:4", "1:4", "6:8", 0.5, 0.9]), st.integers(0, 99))
def test_counts_are_kept_whatever_the_input(m: int, groups: int, pattern: str | float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (m, groups * 8), generator=generator).float()
    x = torch.randint(-1, 2, (5, groups * 8), generator=generator).float()
    mask = wanda_mask(weight, x.norm(dim=0), pattern)
    refined = dsnot(weight, mask, InputStats.of(x), pattern, threshold=0.0)
    span = int(pattern.split(":")[1]) if isinstance(pattern, str) else groups * 8
    assert torch.equal(refined.view(m, -1, span).sum(-1), mask.view(m, -1, span).sum(-1))
    # What is zero in the weight changes no output: it never is grown.
    assert not (refined & ~mask & (weight == 0)).any()


def test_rows_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _problem(9, 32)
    mask = wanda_mask(weight, x.norm(dim=0), "2:4")
    whole = dsnot(weight, mask, InputStats.of(x), "2:4")
    monkeypatch.setattr(sys.modules[dsnot.__module__], "_CHUNK", 70)
    assert torch.equal(dsnot(weight, mask, InputStats.of(x), "2:4"), whole)


def test_the_given_mask_is_not_changed() -> None:
    weight, x = _problem(4, 32)
    mask = wanda_mask(weight, x.norm(dim=0), 0.5)
    before = mask.clone()
    dsnot(weight, mask, InputStats.of(x), 0.5)
    assert torch.equal(mask, before)


def test_dead_and_constant_inputs_are_defined() -> None:
    weight, x = _problem(6, 32)
    x[:, :5] = 0
    x[:, 5:9] = 2.0
    mask = wanda_mask(weight, x.norm(dim=0), "2:4")
    refined = dsnot(weight, mask, InputStats.of(x), "2:4")
    assert (refined.view(6, -1, 4).sum(-1) == 2).all()
    assert not (refined & ~mask)[:, :5].any()


def test_bad_input_is_refused() -> None:
    weight, x = _problem(4, 32)
    stats = InputStats.of(x)
    mask = wanda_mask(weight, x.norm(dim=0), "2:4")
    with pytest.raises(MaskError, match="2:4"):
        dsnot(weight, torch.ones_like(mask), stats, "2:4")
    with pytest.raises(ConfigError, match="mask"):
        dsnot(weight, mask.float(), stats, "2:4")
    with pytest.raises(ConfigError, match="features"):
        dsnot(weight, mask, InputStats.of(x[:, :31]), "2:4")
    with pytest.raises(ConfigError, match="max_cycles"):
        dsnot(weight, mask, stats, "2:4", max_cycles=0)
    with pytest.raises(ConfigError, match="threshold"):
        dsnot(weight, mask, stats, "2:4", threshold=-0.1)
    with pytest.raises(PatternError, match="nearest"):
        dsnot(weight[:, :30], mask[:, :30], InputStats.of(x[:, :30]), "2:4")
    with pytest.raises(NonFiniteError, match="weight"):
        dsnot(weight * torch.nan, mask, stats, "2:4")
    nothing = torch.full((32,), torch.nan)
    with pytest.raises(NonFiniteError, match="mean"):
        dsnot(weight, mask, InputStats(200, nothing, nothing, stats.norm), "2:4")
