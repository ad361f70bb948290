"""Several ranks: masks, errors and weights are those of one process, rank 0 writes, and an error of one ends all."""

from __future__ import annotations

import copy
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spp
import spp.pruning.loop as loop
import spp.pruning.work as work
from spp.configs.pruning import OWL
from spp.distributed.sums import gathered
from spp.errors import NonFiniteError
from spp.masks.patterns import nonzero_mask
from spp.models.projection import Projection, find_projections
from spp.pruning import prune, reconstruct
from spp.pruning.blocks import share_of
from spp.pruning.disk import prune_checkpoint
from spp.pruning.layer import prune_layer
from tests.helpers.models import assert_same_model, moe_model, tiny_llama
from tests.helpers.ranks import values_of_ranks

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
        weights = {p.path: p.weight.detach().clone() for p in find_projections(one) if p.path in report.layers}
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
            fitted = "lsq" in method  # its conjugate gradients may stop a step later
            assert (mine[0] - weight).norm() <= (1e-2 if fitted else 1e-4) * weight.norm(), (method, path)
            (error, tokens, note), found = layers[path], [of_rank[case][1][path] for of_rank in ranks]
            assert found[0][0] == pytest.approx(error, rel=1e-3 if fitted else 2e-5), (method, path)
            assert all(of_rank == (found[0][0], tokens, note) for of_rank in found), (method, path)


def test_two_ranks_give_the_masks_of_one() -> None:
    model, ids = tiny_llama(hidden_size=32, intermediate_size=48), _ids()
    ranks = values_of_ranks(_on_a_rank, 2, model, QUICK, ids)
    _assert_as_one(model, QUICK, ids, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "windows"), [(2, 7), (4, 7), (4, 2), (2, 41)])
def test_every_method_on_ranks_with_and_without_windows(world: int, windows: int) -> None:
    model, ids = tiny_llama(), _ids(windows, 64)
    _assert_as_one(model, METHODS, ids, values_of_ranks(_on_a_rank, world, model, METHODS, ids))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_without_tokens_on_a_rank(architecture: str) -> None:
    model, ids = moe_model(architecture), _ids(3, 5)
    cases = [("wanda", "2:4", {}), ("sparsegpt", "2:4", {}), ("dsnot", "0.5", {})]
    _assert_as_one(model, cases, ids, values_of_ranks(_on_a_rank, 4, model, cases, ids))


def test_every_window_is_run_once_and_the_larger_parts_go_round() -> None:
    for world in (1, 2, 3, 5):
        for windows, sizes in ((7, None), (2, None), (7, [3, 3, 1]), (3, [1, 1, 1])):
            spans = [share_of(windows, 2, sizes, place, world) for place in range(world)]
            assert sorted(n for of in spans for first, last in of for n in range(first, last)) == list(range(windows))
            assert spans[0][0][0] < spans[0][0][1]
            assert sizes is None or all(len(of) == len(sizes) for of in spans)
    assert share_of(3, 2, [1, 1, 1], 1, 2) == [(1, 1), (1, 2), (3, 3)]


def _reconstructed(model: nn.Module, dense: nn.Module, ids: Tensor, options: Any) -> tuple[dict[str, Tensor], Any]:
    model = copy.deepcopy(model)
    report = reconstruct(model, copy.deepcopy(dense), ids, options=options)
    told = [(r.name, r.before, r.after, r.steps, r.note) for block in report.blocks for r in block.regions]
    return {name: value.detach().clone() for name, value in model.named_parameters()}, told


def _reconstruct_on_a_rank(_: int, *arguments: Any) -> Any:
    return [_reconstructed(*arguments, options) for options in _RECONSTRUCTIONS]


_RECONSTRUCTIONS = [
    OPTIONS,
    spp.Reconstruction(epochs=2, lr=2e-3, batch_size=1, held_out=0.25, region="block"),  # one rank a batch
    spp.Reconstruction(epochs=2, lr=2e-3, batch_size=4, held_out=0.25, train="adapter", r=4),
    spp.Reconstruction(epochs=3, lr=50.0, batch_size=4, held_out=0.25),  # is rolled back
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_step_of_reconstruction_counts_the_batches_of_all_ranks(architecture: str) -> None:
    dense = tiny_llama(hidden_size=32, intermediate_size=48) if architecture == "llama" else moe_model("mixtral")
    dense, ids = dense.double() if architecture == "llama" else dense, _ids(7, 8)
    exact = {"rtol": 1e-6, "atol": 1e-9} if architecture == "llama" else {"rtol": 2e-2, "atol": 2e-3}
    model = copy.deepcopy(dense)
    prune(model, "magnitude", "2:4")
    ranks = values_of_ranks(_reconstruct_on_a_rank, 2, model, dense, ids)
    for number, options in enumerate(_RECONSTRUCTIONS):
        weights, regions = _reconstructed(model, dense, ids, options)
        for found, told in [of_rank[number] for of_rank in ranks]:
            assert [(name, steps, note) for name, _, _, steps, note in told] == [(r[0], r[3], r[4]) for r in regions]
            errors = [error for region in told for error in region[1:3]]
            assert errors == pytest.approx([error for region in regions for error in region[1:3]], rel=exact["rtol"])
            assert found.keys() == weights.keys()
            for name, value in weights.items():
                torch.testing.assert_close(found[name], value, **exact)
                assert torch.equal(found[name], ranks[0][number][0][name]), name
        changed = any(
            not torch.equal(value, dict(model.named_parameters()).get(n, value)) for n, value in weights.items()
        )
        assert changed == (options.lr != 50.0 and options.adapter is None)


class _Killed(BaseException):
    pass


def _streamed(rank: int, folder: Path, ids: Tensor) -> list[Any]:
    """What errors of one rank, a killed run and the one that goes on do, one after another."""
    source, out = folder / "model", folder / "out"
    found: list[Any] = []

    def attempt(**replaced: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in replaced.items():
                patch.setattr(*{"prune": (loop, "prune_layer"), "write": (work, "atomic_file")}[name], value)
            try:
                found.append(prune_checkpoint(source, out, "wanda", "2:4", ids).windows)
            except BaseException as error:
                found.append((type(error).__name__, str(error)))
        gathered(None)  # rank 0 has tidied up
        found.append(sorted(path.name for path in folder.iterdir()))
        gathered(None)  # and all have seen it

    def one_fails(layer: Projection, *arguments: Any) -> Any:
        if rank == 1:
            raise NonFiniteError(f"{layer.path} on rank 1")
        return prune_layer(layer, *arguments)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space") if rank == 0 else AssertionError("another rank writes")

    def killed(layer: Projection, *arguments: Any) -> Any:
        if ".1." in layer.path:
            raise _Killed
        return prune_layer(layer, *arguments)

    seen: list[str] = []

    def noting(layer: Projection, *arguments: Any) -> Any:
        seen.append(layer.path.split(".")[2])
        return prune_layer(layer, *arguments)

    attempt(prune=one_fails)
    attempt(write=full)
    attempt(prune=killed)
    attempt(prune=noting, **({"write": full} if rank == 1 else {}))
    attempt()
    return [*found, sorted(set(seen))]


def test_one_rank_writes_a_killed_run_goes_on_and_an_error_of_one_ends_all(tmp_path: Path) -> None:
    model, ids = tiny_llama(num_hidden_layers=3), _ids()
    model.save_pretrained(tmp_path / "model")
    for found in values_of_ranks(_streamed, 2, tmp_path, ids):
        assert found[0] == ("NonFiniteError", "model.layers.0.self_attn.o_proj on rank 1") and found[1] == ["model"]
        assert found[2][0] == "OutputError" and "the disk is full" in found[2][1] and found[3] == ["model"]
        assert found[4] == ("_Killed", "") and found[5] == [".out.pruning", "model"]
        assert found[6:8] == [7, ["model", "out"]] and found[-1] == ["1", "2"]
        assert found[8][0] == "OutputExistsError"
    prune(model, "wanda", "2:4", ids)
    assert_same_model(type(model).from_pretrained(tmp_path / "out"), model)
