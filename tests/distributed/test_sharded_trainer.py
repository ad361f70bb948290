"""SPPTrainer with FSDP2 through accelerate: the bits of DDP, and checkpoints in the format of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spp
from spp.distributed.sharded import local
from spp.errors import ConfigError, MaskError
from spp.training import MaskUpdates, PSTTrainer, SPPTrainer
from spp.wrapping.adapters import base_masks
from spp.wrapping.wrap import adapter_layers
from tests.helpers.fsdp import choose_engine, fsdp_options
from tests.helpers.models import tiny_llama
from tests.helpers.ranks import values_of_ranks
from tests.training.helpers import arguments, blocks, pruned, trainer, wrapped

WEIGHTS = "adapter_model.safetensors"


def run(folder: Path, model: Any = None, *, fsdp: bool = True, resume: Any = None, **options: Any) -> dict[str, Any]:
    """Train 6 steps on batches of 4 rows, whatever the number of ranks."""
    choose_engine(fsdp)
    world = torch.distributed.get_world_size()
    config = options.pop("config", {})
    batch = {"per_device_train_batch_size": 4 // world, "save_strategy": "steps", "save_steps": 3}
    made = trainer(folder, model, **(fsdp_options(**config) if fsdp else {}), **batch, **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    made.save_model(str(folder / "final"))
    torch.distributed.barrier()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    held = [
        local(p)
        for layer in adapter_layers(made._bare_model()).values()
        for p in layer._parameters.values()
        if p is not None
    ]
    return {
        "losses": [entry["loss"] for entry in logged],
        "sparsity": logged[0]["sparsity"],
        "bytes": sum(p.nbytes for p in held if not p.requires_grad),
        "adapter": load_file(folder / "final" / WEIGHTS),
    }


def same(first: Any, second: Any) -> bool:
    one, other = first["adapter"], second["adapter"]
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def apart_from(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative distance of a tensor of two runs' adapters."""
    one, other = found["adapter"], expected["adapter"]
    assert one.keys() == other.keys()
    return max(float((one[n] - t).norm() / t.norm()) for n, t in other.items())


def losses_of(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def changed_on_rank_one(rank: int, folder: Path) -> str:
    """A write to a weight on one rank alone: the save ends all ranks, and leaves nothing."""
    choose_engine(True)
    made = trainer(folder, **fsdp_options(), per_device_train_batch_size=2, max_steps=1)
    made.train()
    if rank == 1:
        with torch.no_grad():
            shard = local(made._bare_model().model.layers[1].mlp.up_proj.weight)
            shard[shard == 0] = 1.0
    with pytest.raises(MaskError) as caught:
        made.save_model(str(folder / "final"))
    assert not (folder / "final").exists()
    return str(caught.value)


def quick(rank: int, folder: str) -> dict[str, Any]:
    at = Path(folder)
    found = {"ddp": run(at / "ddp", fsdp=False), "fsdp": run(at / "fsdp")}
    found["resumed"] = run(at / "resumed", resume=at / "fsdp" / "checkpoint-3")
    found["changed"] = changed_on_rank_one(rank, at / "changed")
    return found


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    for found in (ranks := values_of_ranks(quick, 2, str(tmp_path), limit=120)):
        assert found["fsdp"]["losses"] == found["ddp"]["losses"]
        assert same(found["fsdp"], found["ddp"]) and same(found["resumed"], found["ddp"])
        assert found["fsdp"]["sparsity"] == found["ddp"]["sparsity"] == pytest.approx(0.5)
        assert found["fsdp"]["bytes"] * 2 == found["ddp"]["bytes"]
    first, second = (found["changed"] for found in ranks)
    assert "model.layers.1.mlp.up_proj" in second and second in first and first.startswith("rank 1: ")
    whole = wrapped()
    loaded = spp.load_adapter(pruned(), tmp_path / "fsdp" / "final", strict_values=True)
    assert base_masks(loaded) == base_masks(whole)
    for name, tensor in spp.adapter_state_dict(loaded).items():
        assert tensor.shape == spp.adapter_state_dict(whole)[name].shape
        assert bool(tensor.ne(0).any(dim=-1).all()), f"{name}: rows that no rank wrote"
    checkpoint = tmp_path / "fsdp" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {path.name for path in (tmp_path / "ddp" / "checkpoint-3").iterdir()}
    most = (checkpoint / "optimizer.pt").stat().st_size
    assert all(path.stat().st_size <= most for path in checkpoint.iterdir()), "a base weight was saved"
    resumed = trainer(tmp_path / "alone", per_device_train_batch_size=4)  # of two ranks, by one process
    resumed.train(resume_from_checkpoint=str(checkpoint))
    losses = losses_of(resumed)
    assert losses == pytest.approx(ranks[0]["fsdp"]["losses"], rel=1e-4)


def forms(rank: int, folder: str) -> dict[str, Any]:
    """Everything that changes no bit, and resuming by another engine."""
    at = Path(folder)
    found = {"ddp": run(at / "ddp", fsdp=False), "packed": run(at / "packed", wrapped(packed=True))}
    found["resumed ddp"] = run(at / "of_ddp", resume=at / "ddp" / "checkpoint-3")
    found["ddp of fsdp"] = run(at / "to_ddp", fsdp=False, resume=at / "packed" / "checkpoint-3")
    found["checkpointed"] = run(at / "ac", config={"activation_checkpointing": True})
    found["transformers' checkpoints"] = run(at / "gc", gradient_checkpointing=True)
    empty = wrapped()
    for module in empty.modules() if rank else ():  # buffers have their values on every rank
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
    found["meta"] = run(at / "meta", empty, config={"cpu_ram_efficient_loading": True})
    found["best"] = run(at / "best", eval_data=True, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    found["norms"] = run(at / "norms", wrapped(also_train="norms"))
    found["norms ddp"] = run(at / "norms_ddp", wrapped(also_train="norms"), fsdp=False)
    return found


@pytest.mark.slow
def test_every_form_has_the_bits_of_ddp(tmp_path: Path) -> None:
    for found in values_of_ranks(forms, 2, str(tmp_path), limit=400):
        ddp = found.pop("ddp")
        assert same(found.pop("norms"), found.pop("norms ddp"))
        assert same(found.pop("best"), ddp)
        for name, one in found.items():
            assert same(one, ddp), name
            assert one["losses"] == ddp["losses"], name


def four(rank: int, folder: str, checkpoint: str) -> dict[str, Any]:
    at = Path(folder)
    found = {"fsdp": run(at / "four"), "resumed": run(at / "of_one", resume=checkpoint)}
    return found


@pytest.mark.slow
def test_four_ranks_go_on_from_one_process_and_back(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
    alone.train()
    losses = losses_of(alone)
    ranks = values_of_ranks(four, 4, str(tmp_path), str(tmp_path / "alone" / "checkpoint-3"), limit=240)
    for found in ranks:
        assert found["fsdp"]["losses"] == pytest.approx(losses, rel=1e-4)
        assert found["resumed"]["losses"] == pytest.approx(losses, rel=1e-4)
        assert same(found["fsdp"], ranks[0]["fsdp"])


def refusals(rank: int, folder: str) -> dict[str, str]:
    said = {}

    def refused(name: str, call: Any) -> None:
        choose_engine(True)
        with pytest.raises(ConfigError) as caught:
            call()
        said[name] = str(caught.value)

    at = Path(folder)
    real = SPPTrainer.create_accelerator_and_postprocess

    def older(self: SPPTrainer) -> None:
        real(self)
        self.accelerator.state.fsdp_plugin.fsdp_version = 1  # accelerate makes that of accelerators alone

    SPPTrainer.create_accelerator_and_postprocess = older  # type: ignore[method-assign]
    refused("version 1", lambda: trainer(at, **fsdp_options()))
    SPPTrainer.create_accelerator_and_postprocess = real  # type: ignore[method-assign]
    refused("mixed precision", lambda: trainer(at, **fsdp_options(), bf16=True))
    refused("mask updates", lambda: trainer(at, **fsdp_options(), mask_updates=MaskUpdates(tiny_llama(), every=1)))
    refused("loss_chunk", lambda: trainer(at, **fsdp_options(), loss_chunk=8))
    wrapped_for_pst = spp.pst.wrap(pruned())
    data = blocks()
    refused("pst", lambda: PSTTrainer(wrapped_for_pst, arguments(at, **fsdp_options()), train_dataset=data))
    return said


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path) -> None:
    said, _ = values_of_ranks(refusals, 2, str(tmp_path))
    assert "fsdp_version to 2" in said["version 1"]
    assert "load the model in bfloat16 instead" in said["mixed precision"]
    assert "reads the output head after the forward" in said["loss_chunk"]
    assert "one process" in said["mask updates"]
    assert said["pst"].startswith("PSTTrainer does not support FSDP")
