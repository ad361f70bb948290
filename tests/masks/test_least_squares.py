"""Kept values by least squares against each row's own linear system in float64: values, zeros, errors, refusals."""

from __future__ import annotations

import pytest
import torch

from spp.errors import ConfigError, NonFiniteError
from spp.pruning import least_squares, magnitude_mask, sparsegpt, wanda_mask


def _problem(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(200, n, generator=generator, dtype=torch.float64)
    x += shared @ torch.randn(4, n, generator=generator, dtype=torch.float64)
    x *= torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype), (x.T @ x).to(dtype)


def _row_by_row(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, damping: float) -> torch.Tensor:
    """(H + λI)_SS w'_S = ((H + λI) w)_S, solved for each row."""
    weight, hessian = weight.double(), hessian.double()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    solved = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        chosen = kept.nonzero()[:, 0]
        solved[row, chosen] = torch.linalg.solve(damped[chosen][:, chosen], (damped @ weight[row])[chosen])
    return solved


def _errors(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    change = (pruned - weight).double()
    return ((change @ hessian.double()) * change).sum(1)


@pytest.mark.parametrize(("m", "n"), [(5, 12), (1, 8), (7, 23)])
@pytest.mark.parametrize("damping", [0.01, 0.0, 1.0])
def test_values_are_those_of_each_rows_system(m: int, n: int, damping: float) -> None:
    weight, hessian = _problem(m, n)
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0] = False  # a row that keeps nothing
    fitted = least_squares(weight, hessian, mask, damping=damping)
    expected = _row_by_row(weight, hessian, mask, damping)
    torch.testing.assert_close(fitted, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(fitted != 0, mask)
    if m > 1:  # the comparison can fail: the values that were there are others
        assert not torch.allclose(weight * mask, expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_rows_error_is_above_the_start(dtype: torch.dtype) -> None:
    weight, hessian = _problem(24, 48, dtype=dtype)
    for mask in (magnitude_mask(weight, "2:4"), wanda_mask(weight, hessian.diagonal().float().sqrt(), 0.75)):
        fitted = least_squares(weight, hessian.float(), mask)
        assert fitted.dtype == dtype
        before, after = (_errors(weight, w, hessian.float()) for w in (weight * mask, fitted))
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < 0.8 * before.sum()
        assert (fitted[~mask] == 0).all()


def test_sparsegpts_mask_is_fitted_better_than_by_its_own_updates() -> None:
    weight, hessian = _problem(16, 64, 3)
    updated, mask = sparsegpt(weight, hessian, "2:4", damping=0.0)
    fitted = least_squares(weight, hessian, mask, damping=0.0)
    assert (_errors(weight, fitted, hessian) <= _errors(weight, updated, hessian) * (1 + 1e-9)).all()


def test_a_mask_that_keeps_all_changes_nothing_and_dead_inputs_do_no_harm() -> None:
    weight, hessian = _problem(4, 12)
    assert torch.equal(least_squares(weight, hessian, torch.ones(4, 12, dtype=torch.bool)), weight)
    hessian[3] = hessian[:, 3] = 0
    mask = magnitude_mask(weight, "2:4")
    fitted = least_squares(weight, hessian, mask, damping=0.0)
    assert torch.isfinite(fitted).all()
    assert torch.equal(fitted[:, 3], (weight * mask)[:, 3])  # nothing is known of it, so it stays
    assert least_squares(weight[:0], hessian, mask[:0]).shape == (0, 12)


def test_refusals() -> None:
    weight, hessian = _problem(4, 12)
    mask = magnitude_mask(weight, "2:4")
    with pytest.raises(ConfigError, match=r"the Hessian is \(3, 3\); the weight needs \(12, 12\)"):
        least_squares(weight, hessian[:3, :3], mask)
    with pytest.raises(ConfigError, match=r"the mask is \(4, 12\) torch.float32; expected a bool"):
        least_squares(weight, hessian, mask.float())
    with pytest.raises(ConfigError, match="damping is -1"):
        least_squares(weight, hessian, mask, damping=-1)
    with pytest.raises(NonFiniteError, match="the Hessian holds NaN"):
        least_squares(weight, hessian.fill_(float("nan")), mask)
