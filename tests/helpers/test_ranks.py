import time

import torch

from tests.helpers.ranks import run_ranks, values_of_ranks


def total(rank: int, start: float) -> float:
    tensor = torch.tensor([start + rank])
    torch.distributed.all_reduce(tensor)
    print(f"rank {rank} speaks")
    return float(tensor)


def one_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("the second rank")
    time.sleep(30)


def test_ranks_reduce_and_print() -> None:
    assert values_of_ranks(total, 2, 1.0) == [3.0, 3.0]
    outcomes = run_ranks(total, 2, 1.0)
    assert [outcome.output.strip() for outcome in outcomes] == ["rank 0 speaks", "rank 1 speaks"]


def test_an_error_and_a_hang_are_told_apart() -> None:
    first, second = run_ranks(one_fails, 2, limit=3.0)
    assert first.code is None
    assert second.code == 1 and "the second rank" in second.error
