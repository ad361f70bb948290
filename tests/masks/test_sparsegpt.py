"""SparseGPT against algorithm 1 written out: masks, weights, reconstruction error, dead inputs, damping, refusals."""

from __future__ import annotations

import logging

import pytest
import torch

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.pruning import magnitude_mask, sparsegpt, wanda_mask
from tests.masks.oracles import sparsegpt_oracle


def _problem(m: int, n: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    shared = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    mix = torch.randn(4, n, generator=generator, dtype=torch.float64)
    x = (torch.randn(tokens, n, generator=generator, dtype=torch.float64) + shared @ mix) * scale
    return torch.randn(m, n, generator=generator, dtype=torch.float64), x


def _error(weight: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (weight.double() - pruned.double()).T).norm())


def _options(pattern: str | float) -> dict[str, object]:
    if isinstance(pattern, str):
        kept, group = pattern.split(":")
        return {"nm": (int(kept), int(group))}
    return {"fraction": pattern}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "2:8", "4:8", 0.5, 0.75, 0.3])
@pytest.mark.parametrize(("m", "n"), [(5, 48), (1, 24), (11, 40)])
def test_masks_and_weights_equal_the_literal_algorithm(pattern: str | float, m: int, n: int) -> None:
    weight, x = _problem(m, n)
    hessian = x.T @ x
    for block_size in (128, 16):
        result, mask = sparsegpt(weight, hessian, pattern, block_size=block_size)
        expected, expected_mask = sparsegpt_oracle(weight, hessian, block_size=block_size, **_options(pattern))
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
        assert (result[~mask] == 0).all()


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_the_comparison_can_fail(pattern: str | float) -> None:
    weight, x = _problem(5, 48)
    first, mask = sparsegpt_oracle(weight, x.T @ x, **_options(pattern))
    other, other_mask = sparsegpt_oracle(weight, x.T @ x, damping=10.0, **_options(pattern))
    assert not torch.equal(mask, other_mask)
    assert not torch.allclose(first, other)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("pattern", ["2:4", "2:8", 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_never_above_the_literal_algorithms_in_float32(pattern: str | float, seed: int) -> None:
    weight, x = _problem(24, 160, seed)
    hessian = (x.T @ x).float()
    result, mask = sparsegpt(weight.float(), hessian, pattern)
    literal, _ = sparsegpt_oracle(weight, hessian, dtype=torch.float32, **_options(pattern))
    assert result.dtype == torch.float32
    assert _error(weight, result, x) <= _error(weight, literal, x) * (1 + 1e-5)
    by_magnitude = magnitude_mask(weight.float(), pattern)
    by_wanda = wanda_mask(weight.float(), x.norm(dim=0).float(), pattern)
    assert _error(weight, result, x) < _error(weight, weight * by_wanda, x) < _error(weight, weight * by_magnitude, x)
    assert (result != 0).logical_or(mask.logical_not()).all()


def test_a_block_prunes_the_floor_of_its_share_over_all_rows() -> None:
    weight, x = _problem(3, 20)
    _, mask = sparsegpt(weight, x.T @ x, 0.3, block_size=8)
    assert [int((~mask[:, i : i + 8]).sum()) for i in (0, 8, 16)] == [7, 7, 3]  # ⌊0.3·24⌋, ⌊0.3·24⌋, ⌊0.3·12⌋


@pytest.mark.parametrize("group", [24, 48])
def test_a_group_may_be_longer_than_a_block(group: int) -> None:
    weight, x = _problem(4, 48)
    hessian = x.T @ x
    result, mask = sparsegpt(weight, hessian, f"{group // 2}:{group}", block_size=10)
    expected, expected_mask = sparsegpt_oracle(weight, hessian, nm=(group // 2, group), block_size=group)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_dead_inputs(pattern: str | float) -> None:
    weight, x = _problem(6, 24)
    x[:, [3, 4, 5, 17]] = 0
    hessian = x.T @ x
    result, mask = sparsegpt(weight, hessian, pattern)
    expected, expected_mask = sparsegpt_oracle(weight, hessian, **_options(pattern))
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert (result[:, [3, 4, 5, 17]] == 0).all()
    nothing, mask = sparsegpt(weight, torch.zeros(24, 24), "2:4")
    assert (nothing == 0).all()
    assert mask.tolist() == [[True, True, False, False] * 6] * 6


def test_few_tokens_need_only_the_usual_damping(caplog: pytest.LogCaptureFixture) -> None:
    weight, x = _problem(6, 64, tokens=3)
    hessian = (x.T @ x).float()
    with caplog.at_level(logging.WARNING):
        result, mask = sparsegpt(weight.float(), hessian, "2:4")
    assert not caplog.records
    assert torch.isfinite(result).all()
    assert _error(weight, result, x) < 0.5 * _error(weight, weight * mask, x)


def test_float64_takes_over_where_float32_fails(caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = _problem(2, 4)
    hessian = torch.ones(4, 4)
    assert int(torch.linalg.cholesky_ex(hessian * (1 + 1e-9))[1]) != 0  # float32 does not see so little damping
    with caplog.at_level(logging.WARNING):
        result, mask = sparsegpt(weight.float(), hessian, "2:4", damping=1e-9)
    assert not caplog.records
    expected, expected_mask = sparsegpt_oracle(weight.float(), hessian, nm=(2, 4), damping=1e-9)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-4)


def test_damping_is_raised_and_said(caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = _problem(4, 8)
    indefinite = torch.eye(8, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    with caplog.at_level(logging.WARNING):
        result, mask = sparsegpt(weight, indefinite, "2:4")
    assert "damping raised from 0.01 to 0.1" in caplog.text
    expected, expected_mask = sparsegpt_oracle(weight, indefinite, nm=(2, 4), damping=0.1)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(result, expected)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sparsegpt(weight, torch.ones(8, 8), "2:4", damping=0.0)
    assert "damping raised from 0 to" in caplog.text


def test_low_precision_is_computed_in_float32_and_rounded_once() -> None:
    weight, x = _problem(6, 32)
    hessian = (x.T @ x).float()
    rounded = weight.to(torch.bfloat16)
    result, mask = sparsegpt(rounded, hessian, "2:4")
    exact, exact_mask = sparsegpt(rounded.float(), hessian, "2:4")
    assert result.dtype == torch.bfloat16
    assert torch.equal(mask, exact_mask)
    assert torch.equal(result, exact.to(torch.bfloat16))


def test_nothing_given_is_changed() -> None:
    weight, x = _problem(4, 16)
    hessian = x.T @ x
    before, hessian_before = weight.clone(), hessian.clone()
    sparsegpt(weight, hessian, "2:4")
    assert torch.equal(weight, before)
    assert torch.equal(hessian, hessian_before)


def test_bad_input_is_refused() -> None:
    weight, x = _problem(4, 16)
    hessian = x.T @ x
    with pytest.raises(ConfigError, match="damping"):
        sparsegpt(weight, hessian, "2:4", damping=-1.0)
    with pytest.raises(ConfigError, match="block_size"):
        sparsegpt(weight, hessian, "2:4", block_size=0)
    with pytest.raises(ConfigError, match=r"\(8, 8\)"):
        sparsegpt(weight, hessian[:8, :8], "2:4")
    with pytest.raises(ConfigError, match="positive definite"):
        sparsegpt(weight, -hessian, "2:4")
    with pytest.raises(PatternError, match="nearest"):
        sparsegpt(weight[:, :14], hessian[:14, :14], "2:4")
    with pytest.raises(NonFiniteError, match="Hessian"):
        sparsegpt(weight, hessian * torch.nan, "2:4")
    with pytest.raises(NonFiniteError, match="weight"):
        sparsegpt(weight * torch.inf, hessian, "2:4")
    with pytest.raises(NonFiniteError, match="does not fit"):
        sparsegpt(torch.full((2, 16), 65504.0, dtype=torch.float16), hessian.float(), "2:4")
