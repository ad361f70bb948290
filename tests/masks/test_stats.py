"""Running statistics equal those of all inputs at once, in float64, however the inputs are cut."""

from __future__ import annotations

import pytest
import torch

from spp.errors import ConfigError, DataError, NonFiniteError
from spp.masks.stats import StatsCollector
from spp.pruning import InputStats


def _inputs(tokens: int = 101, n: int = 7, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(3)) + offset


@pytest.mark.parametrize("cut", [[101], [1, 100], [7, 0, 50, 44]])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_batches_add_up_to_the_whole(cut: list[int], offset: float) -> None:
    x = _inputs(offset=offset)
    collector = StatsCollector(7, moments=True, hessian=True)
    for part in x.split(cut):
        collector.add(part[None])
    stats, exact = collector.stats(), x.double()
    assert stats.count == 101
    torch.testing.assert_close(stats.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.var.double(), exact.var(0, unbiased=False), rtol=1e-4, atol=0)
    torch.testing.assert_close(stats.norm.double(), exact.norm(dim=0), rtol=1e-5, atol=0)
    hessian = collector.hessian()
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), exact.T @ exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [3, 4, 7, 8])
def test_the_hessian_is_whole_though_only_half_of_it_is_computed(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spp.masks.stats._ROWS", 3)
    x = (8 * _inputs(n=n)).round()  # whole numbers: sums are exact in any order
    collector = StatsCollector(n, hessian=True)
    for part in x.split([60, 41]):
        collector.add(part)
        hessian = collector.hessian()  # and again after it was read
        assert hessian is not None and torch.equal(hessian, hessian.T)
    assert torch.equal(hessian, x.T @ x)
    assert StatsCollector(n).hessian() is StatsCollector(n, hessian=True).hessian() is None


def test_a_naive_variance_would_fail_here() -> None:
    x = _inputs(offset=300.0)
    naive = x.square().mean(0) - x.mean(0).square()
    assert ((naive.double() - x.double().var(0, unbiased=False)).abs() > 1e-3).any()


def test_half_precision_inputs_are_summed_in_float32() -> None:
    x = (_inputs(4000) * 100).to(torch.float16)
    stats = InputStats.of(x)
    torch.testing.assert_close(stats.norm.double(), x.double().norm(dim=0), rtol=1e-5, atol=0)
    assert stats.norm.dtype == torch.float32


@pytest.mark.parametrize("cut", [[101], [13] * 7 + [10]])
def test_the_sample_is_spread_evenly(cut: list[int]) -> None:
    x = _inputs()
    collector = StatsCollector(7, sample=10, expected=101)
    for part in x.split(cut):
        collector.add(part)
    assert torch.equal(collector.sample(), x[::11])


def test_the_sample_meets_every_position_of_a_window_alike() -> None:
    collector = StatsCollector(1, sample=512, expected=32 * 512)
    for _ in range(32):
        collector.add(torch.arange(512.0)[:, None])
    counts = torch.bincount(collector.sample().view(-1).long(), minlength=512)
    assert counts.max() == 1
    assert counts.sum() > 480


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(DataError, match="no calibration token"):
        StatsCollector(3).stats()
    with pytest.raises(DataError, match="0 tokens"):
        InputStats(0, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ConfigError, match="one length"):
        InputStats(1, torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(NonFiniteError, match="1 of 2"):
        InputStats.of(torch.tensor([[1.0, torch.inf]]))
