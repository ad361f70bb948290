"""The harness takes turns, takes ratios round by round and measures memory of its own process only."""

from __future__ import annotations

import pytest
import torch

from spp.comparing import measure
from spp.comparing.measure import Sample, Spread
from spp.errors import SPPError


def test_contenders_take_turns_in_a_rotating_order() -> None:
    calls: list[str] = []
    samples = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_round_by_round() -> None:
    slow, fast = [Sample(2, 20), Sample(60, 6), Sample(8, 8)], [Sample(1, 10), Sample(20, 2), Sample(2, 2)]
    assert measure.ratio(slow, fast) == Spread(3.0, pytest.approx(2.4), pytest.approx(3.6))
    assert measure.ratio(slow, fast, "process").median == 3.0


def test_rows_compare_every_contender_with_the_first_on_both_clocks() -> None:
    rows = measure.compare({"a": [Sample(2, 30), Sample(4, 10)], "b": [Sample(1, 10), Sample(1, 20)]})
    assert rows["a"]["reference"] == rows["b"]["reference"] == "a"
    assert rows["a"]["this_to_reference_wall"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert rows["b"]["wall_s"]["median"] == 1 and rows["b"]["process_s"]["median"] == 15
    assert rows["b"]["reference_to_this_wall"]["median"] == 3.0
    assert rows["b"]["this_to_reference_process"]["median"] == pytest.approx((1 / 3 + 2) / 2)


def test_spread_of_one_value() -> None:
    assert measure.spread([2.0]) == Spread(2.0, 2.0, 2.0)
    assert str(measure.spread([1.0, 2.0, 3.0])) == "2.000 (1.400 … 2.600)"


@pytest.mark.slow
def test_memory_of_a_process_sees_what_a_call_allocates() -> None:
    size = 64 << 20

    def allocate() -> None:
        torch.ones(size, dtype=torch.uint8)

    memory = measure.measure_memory(allocate, calls=2)
    assert size * 0.9 < memory.peak - memory.rest < size * 2


@pytest.mark.slow
def test_a_child_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(SPPError, match=r"--tokens is 0; it must be at least 1"):
        measure.in_child("benchmarks.layer", ["--tokens", "0"])


def test_the_environment_names_machine_threads_dtype_and_versions() -> None:
    found = measure.environment("cpu", torch.bfloat16)
    assert (found.dtype, found.threads) == ("bfloat16", torch.get_num_threads())
    assert found.versions is not None and found.versions["torch"] == torch.__version__
    assert not measure.environment("cpu", torch.float64).compiled_products  # which know no float64
