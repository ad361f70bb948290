"""Several ranks: masks, errors and weights are those of one process, rank 0 writes, and an error of one ends all."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spp
import spp.pruning.loop as loop
from spp.configs.pruning import OWL
from spp.distributed.sums import gathered, total
from spp.errors import NonFiniteError
from spp.masks.patterns import nonzero_mask
from spp.masks.stats import StatsCollector
from spp.models.projection import find_projections
from spp.pruning import prune, reconstruct
from spp.pruning.blocks import share_of
from spp.pruning.disk import prune_checkpoint
from spp.pruning.reconstruction import reconstruct_checkpoint
from tests.helpers.models import moe_model, prune_nm_, tiny_llama
from tests.helpers.ranks import run_ranks, values_of_ranks

QUICK = [("wanda", "2:4", {}), ("sparsegpt", "2:4", {})]
METHODS: list[tuple[str, Any, dict[str, Any]]] = [
    ("magnitude", "2:4", {}),
    ("wanda", "0.5", {}),
    ("sparsegpt", "0.5", {}),
    ("dsnot", "0.5", {}),
    ("wanda", "0.6", {"owl": OWL(spread=0.1)}),
    ("wanda+swap", "2:4", {}),
    ("wanda+lsq", "2:4", {}),
]
OPTIONS = spp.Reconstruction(epochs=3, lr=2e-3, batch_size=4, held_out=0.25)


def _ids(windows: int = 7, length: int = 24) -> Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def _pruned(model: nn.Module, cases: Sequence[tuple[str, Any, dict[str, Any]]], ids: Tensor) -> list[Any]:
    """The weights and errors that each case leaves."""
    found = []
    for method, pattern, options in cases:
        one = copy.deepcopy(model)
        report = prune(one, method, pattern, ids, **options)
        weights = {layer.path: layer.weight.detach().clone() for layer in find_projections(one)}
        found.append((weights, {p: (r.relative_error, r.tokens, r.note) for p, r in report.layers.items()}))
    return found


def _on_a_rank(_: int, model: nn.Module, cases: Any, ids: Tensor) -> list[Any]:
    return _pruned(model, cases, ids)


def _assert_as_one(model: nn.Module, cases: Any, ids: Tensor, ranks: Sequence[list[Any]]) -> None:
    """Masks are those of one process bit for bit, errors and values to rounding, and weights the same on all ranks."""
    for case, (weights, layers) in enumerate(_pruned(model, cases, ids)):
        method = cases[case][0]
        for path, weight in weights.items():
            mine = [of_rank[case][0][path] for of_rank in ranks]
            assert torch.equal(nonzero_mask(mine[0]), nonzero_mask(weight)), (method, path)
            assert all(torch.equal(mine[0], other) for other in mine[1:]), (method, path)
            torch.testing.assert_close(mine[0], weight, rtol=2e-3, atol=2e-4)
            (error, tokens, note), found = layers[path], [of_rank[case][1][path] for of_rank in ranks]
            assert found[0][0] == pytest.approx(error, rel=1e-4), (method, path)
            assert all(of_rank == (found[0][0], tokens, note) for of_rank in found), (method, path)


def test_two_ranks_give_the_masks_of_one() -> None:
    model, ids = tiny_llama(hidden_size=32, intermediate_size=48), _ids()
    ranks = values_of_ranks(_on_a_rank, 2, model, QUICK, ids)
    _assert_as_one(model, QUICK, ids, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "windows"), [(2, 7), (4, 7), (4, 2)])
def test_every_method_on_ranks_with_and_without_windows(world: int, windows: int) -> None:
    model, ids = tiny_llama(), _ids(windows, 64)
    _assert_as_one(model, METHODS, ids, values_of_ranks(_on_a_rank, world, model, METHODS, ids))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_without_tokens_on_a_rank(architecture: str) -> None:
    model, ids = moe_model(architecture), _ids(3, 5)
    cases = [("wanda", "2:4", {}), ("sparsegpt", "2:4", {}), ("dsnot", "0.5", {})]
    _assert_as_one(model, cases, ids, values_of_ranks(_on_a_rank, 4, model, cases, ids))
