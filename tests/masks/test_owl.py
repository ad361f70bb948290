"""OWL's outlier shares and block sparsities, against the formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, PatternError
from spp.masks.wanda import outlier_share, owl_fractions
from spp.pruning import OWL


def test_outliers_are_counted_over_all_weights_of_a_block() -> None:
    first = torch.tensor([[1.0, 1.0, 1.0, 20.0]])
    second = torch.tensor([[1.0, 1.0], [1.0, 6.0]])
    # Mean 4: above 4 are 20 and 6; above 8 only 20; each alone would have other means.
    assert outlier_share([first, second], 1.0) == 2 / 8
    assert outlier_share([first, second], 2.0) == 1 / 8
    assert outlier_share([torch.zeros(2, 2)], 5.0) == 0


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=12), st.floats(0.2, 0.8), st.floats(0, 0.09))
def test_the_mean_is_what_was_asked_for_and_more_outliers_keep_more(
    outliers: list[float], fraction: float, spread: float
) -> None:
    fractions = owl_fractions(outliers, fraction, spread)
    assert sum(fractions) / len(fractions) == pytest.approx(fraction)
    assert max(fractions) - min(fractions) <= 2 * spread + 1e-12
    for d, s in zip(outliers, fractions, strict=True):
        for other_d, other_s in zip(outliers, fractions, strict=True):
            assert d <= other_d or s <= other_s + 1e-12


def test_sparsities_span_twice_the_spread() -> None:
    fractions = owl_fractions([0.01, 0.05, 0.02, 0.02], 0.7, 0.08)
    relative = [0, 1, 0.25, 0.25]
    expected = [0.7 - 0.16 * (r - 0.375) for r in relative]
    assert fractions == pytest.approx(expected)
    assert owl_fractions([0.1, 0.1], 0.7, 0.08) == pytest.approx([0.7, 0.7])


def test_bad_options_are_refused() -> None:
    for bad in ({"threshold": 0.0}, {"threshold": float("nan")}, {"spread": 0.5}, {"spread": -0.1}, {"spread": True}):
        with pytest.raises(ConfigError, match="OWL"):
            OWL(**bad)
    for outliers, fraction in (([0.0, 0.0, 0.0, 1.0], 0.9), ([0.0, 1.0, 1.0, 1.0], 0.1)):
        with pytest.raises(PatternError, match="take a spread below") as caught:
            owl_fractions(outliers, fraction, 0.4)
        room = float(str(caught.value).rsplit(" ", 1)[-1])
        owl_fractions(outliers, fraction, room * 0.99)
