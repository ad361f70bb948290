"""The cubic schedule: its ends, its middle, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from spp.errors import ConfigError
from spp.pst import sparsity_schedule


def test_values_by_hand() -> None:
    at = {step: sparsity_schedule(step, 100, 0.1, 0.3, 0.0, 0.9) for step in (0, 10, 11, 40, 70, 71, 100)}
    assert at[0] == at[10] == 0.0
    assert at[11] == pytest.approx(0.9 - 0.9 * (59 / 60) ** 3)
    assert at[40] == pytest.approx(0.9 - 0.9 / 8)
    assert at[70] == pytest.approx(0.9) and at[71] == at[100] == 0.9


@pytest.mark.parametrize("warmups", [(0.0, 0.0), (0.1, 0.3), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_grows_from_the_initial_to_the_final(warmups: tuple[float, float], total: int) -> None:
    values = [sparsity_schedule(t, total, *warmups, 0.2, 0.75) for t in range(total + 1)]
    assert values == sorted(values) and values[0] == 0.2
    assert values[-1] == (0.2 if warmups == (1.0, 0.0) else 0.75)


def test_warmups_that_take_all_steps_leave_none_between_whatever_rounding_says() -> None:
    for tenths in range(1, 10):
        share = tenths / 10
        for total in range(1, 200):
            found = {sparsity_schedule(t, total, share, 1 - share, 0.2, 0.75) for t in range(total + 1)}
            assert found <= {0.2, 0.75}, (share, total)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"initial_warmup": 0.8, "final_warmup": 0.4}, "at most 1"),
        ({"final_sparsity": 1.0}, "final_sparsity is 1.0"),
        ({"initial_sparsity": 0.6, "final_sparsity": 0.5}, "only grows"),
        ({"final_warmup": float("nan")}, "final_warmup is nan"),
        ({"step": 1, "total_steps": 0}, "step"),
    ],
)
def test_refusals(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sparsity_schedule(**{"step": 0, "total_steps": 10, **options})
