"""A wrapped model sharded by FSDP2 in a loop of one's own: the numbers of one process, at a part of its memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spp
from spp.distributed import sharded
from spp.distributed.sharded import full, is_sharded, local, settle
from spp.errors import OutputError, TargetError, WrapError
from spp.kernels.choice import use_kernels
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.ranks import values_of_ranks

STEPS, ROWS = 4, 4
GRADIENTS, ADAPTER = 1e-6, 1e-5  # relative: another order of the sums over rows


def model_of(case: dict[str, Any]) -> Any:
    model = prune_nm_(tiny_llama()).to(case.get("dtype", torch.float32))
    options = {name: case[name] for name in ("packed", "dropout", "dropout_mode", "also_train") if name in case}
    spp.wrap(model, r=4, seed=0, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("spp_beta"):  # away from zero, so that alpha has a gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if "checkpointing" in case:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"]})
    return model.train()


def shard(model: Any, case: dict[str, Any]) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    options: dict[str, Any] = {"reshard_after_forward": case.get("reshard", True)}
    if case.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in adapter_layers(model).values():
        layer.make_shardable()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def held_bytes(model: nn.Module) -> int:
    return sum(local(p).nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def trained_steps(model: Any, world: int, rank: int) -> dict[str, Any]:
    """The same global batches whatever the number of ranks: losses, the first gradients, the parameters at the end."""
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-2, weight_decay=0.01)
    data = torch.randint(3, 256, (STEPS * ROWS, 16), generator=torch.Generator().manual_seed(1))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    losses, first = [], {}
    for step in range(STEPS):
        rows = data[step * ROWS :][:ROWS][rank * ROWS // world : (rank + 1) * ROWS // world]
        torch.manual_seed(step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        parameters = dict(model.named_parameters())
        if not step:
            first = {name: full(parameters[name].grad).clone() for name in names}
        torch.nn.utils.clip_grad_norm_([parameters[name] for name in names], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "first": first, "last": {n: full(p).detach() for n, p in named_adapter(model)}}


def named_adapter(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative distance of a tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


CASES: dict[str, dict[str, Any]] = {
    "resharded": {},
    "kept until backward": {"reshard": False},
    "reentrant checkpointing": {"checkpointing": True},
    "checkpointing": {"checkpointing": False},
    "offloaded": {"offload": True, "checkpointing": False},
    "packed": {"packed": True},
    "packed, offloaded, checkpointing": {"packed": True, "offload": True, "checkpointing": True},
    "norms beside it": {"also_train": "norms"},
    "dropout of alpha": {"dropout": 0.2, "dropout_mode": "alpha"},
    "dropout of inputs": {"dropout": 0.2, "rows": True},
    "native kernels": {"kernels": "native"},
    "bfloat16": {"dtype": torch.bfloat16},
}


def on_ranks(rank: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in cases:
        case = CASES[name]
        world = torch.distributed.get_world_size()
        with use_kernels(case.get("kernels", "torch")):
            whole = held_bytes(model_of(case))
            alone = trained_steps(model_of(case), 1, 0) if rank == 0 else None
            model = model_of(case)
            old = [weakref.ref(layer.stored_weight) for layer in adapter_layers(model).values()]
            shard(model, case)
            gc.collect()
            assert not any(ref() is not None and not is_sharded(ref()) for ref in old), "a whole weight is still held"
            found[name] = trained_steps(model, world, rank)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.arange(3, 9).view(1, -1))
        assert all(layer._cached is None for layer in adapter_layers(model).values()), "W_eff is kept"
        settle(model)
        found[name] |= {"alone": alone, "held": held_bytes(model), "whole": whole}
    return found


def check_cases(ranks: list[dict[str, Any]], cases: list[str]) -> None:
    world = len(ranks)
    for name in cases:
        of = [rank[name] for rank in ranks]
        alone = of[0]["alone"]
        losses = [sum(one["losses"][step] for one in of) / world for step in range(STEPS)]
        low = "dtype" in CASES[name]
        assert abs(of[0]["held"] - of[0]["whole"] / world) < 0.02 * of[0]["whole"], name
        for one in of[1:]:
            assert all(torch.equal(one["last"][n], t) for n, t in of[0]["last"].items()), name
        if "rows" in CASES[name]:  # each rank drops entries of its own rows
            assert losses == pytest.approx(alone["losses"], rel=0.05), name
            continue
        gradients, adapter = apart(of[0]["first"], alone["first"]), apart(of[0]["last"], alone["last"])
        print(f"{name}: {gradients:.1e} {adapter:.1e} {of[0]['held']} of {of[0]['whole']}")
        assert losses == pytest.approx(alone["losses"], rel=2e-4 if low else 1e-5), name
        if not low:
            assert gradients <= GRADIENTS, (name, gradients)
            assert adapter <= ADAPTER, (name, adapter)


QUICK = ["resharded", "packed"]


def test_two_ranks_compute_what_one_process_does() -> None:
    check_cases(values_of_ranks(on_ranks, 2, QUICK), QUICK)


@pytest.mark.slow
def test_every_form_of_sharding() -> None:
    rest = [name for name in CASES if name not in QUICK]
    check_cases(values_of_ranks(on_ranks, 2, rest, limit=240), rest)


@pytest.mark.slow
def test_four_ranks() -> None:
    check_cases(values_of_ranks(on_ranks, 4, QUICK, limit=240), QUICK)


def own_loop(rank: int, folder: str) -> dict[str, str]:
    """Save the adapter of a sharded model, alone and together; and everything that is refused."""
    model = shard(model_of({"also_train": "norms"}), {})
    trained_steps(model, 2, rank)
    said: dict[str, str] = {}

    def refused(name: str, kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        said[name] = str(caught.value)

    refused("merge", WrapError, lambda: spp.merge(model))
    refused("unwrap", WrapError, lambda: spp.unwrap(model))
    refused("load", WrapError, lambda: spp.load_adapter(model, folder))
    refused("disabled", WrapError, lambda: spp.disabled(model).__enter__())
    spp.save_adapter(model, f"{folder}/together")
    refused("exists", OutputError, lambda: spp.save_adapter(model, f"{folder}/together"))
    plain = prune_nm_(tiny_llama())
    for block in plain.model.layers:
        torch.distributed.fsdp.fully_shard(block)
    refused("wrap", TargetError, lambda: spp.wrap(plain))
    sharded.MEETING = 0.3
    if rank == 0:
        refused("alone", WrapError, lambda: spp.save_adapter(model, f"{folder}/alone"))
        assert not Path(folder, "alone").exists()
    return said


@pytest.mark.slow
def test_an_own_loop_saves_together_and_is_refused_the_rest(tmp_path: Path) -> None:
    first, second = values_of_ranks(own_loop, 2, str(tmp_path))
    assert "merge_checkpoint" in first["merge"] and "on every rank" in first["merge"]
    assert "sharded over 2 ranks" in first["unwrap"]
    assert "load the adapter first" in first["load"]
    assert "wrap it and shard it afterwards" in first["wrap"] and "q_proj.weight" in first["wrap"]
    assert "only 1 of 2 ranks called it" in first["alone"]
    assert first["exists"] in second["exists"], "the other ranks hear of it"
    model = model_of({"also_train": "norms"})
    trained = trained_steps(model, 1, 0)
    loaded = spp.load_adapter(model_of({"also_train": "norms"}), tmp_path / "together", strict_values=True)
    assert apart({n: p.detach() for n, p in named_adapter(loaded)}, trained["last"]) <= ADAPTER
