"""SPPTrainer with DeepSpeed's ZeRO-2 and ZeRO-3: the numbers of DDP, whole adapters, no base weight in a checkpoint."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spp
from spp.errors import CheckpointError, ConfigError, MaskError
from tests.distributed.test_sharded_trainer import apart_from, losses_of
from tests.helpers.fsdp import choose_engine
from tests.helpers.ranks import values_of_ranks
from tests.training.helpers import pruned, trainer, wrapped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: pip install deepspeed, then run this file again",
    ),
]
WEIGHTS = "adapter_model.safetensors"
ENV = {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def run(folder: Path, stage: int, model: Any = None, resume: Any = None, **options: Any) -> dict[str, Any]:
    """Train 6 steps; stage 0 is DDP."""
    choose_engine(False)
    engine = {"deepspeed": config(stage, **options.pop("config", {}))} if stage else {}
    batch = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    made = trainer(folder, model, **batch, **engine, **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    made.save_model(str(folder / "final"))
    torch.distributed.barrier()
    layer = made._bare_model().model.layers[0].mlp.up_proj
    return {
        "losses": losses_of(made),
        "sparsity": next(entry for entry in made.state.log_history if "loss" in entry)["sparsity"],
        "adapter": load_file(folder / "final" / WEIGHTS),
        "dtype": layer.spp_alpha.dtype,
        "held": getattr(layer.weight, "ds_tensor", layer.weight).numel(),
    }


def on_ranks(rank: int, folder: str) -> dict[str, Any]:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{folder}/extensions")
    import deepspeed

    assert deepspeed.__version__
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # minutes of C++
    at = Path(folder)
    found = {"ddp": run(at / "ddp", 0)}
    for stage in (2, 3):
        found[f"zero-{stage}"] = run(at / f"{stage}", stage)
        found[f"resumed-{stage}"] = run(at / f"again{stage}", stage, resume=at / f"{stage}" / "checkpoint-3")
    half = wrapped()
    half.to(torch.bfloat16)
    found["half"] = run(at / "half", 3, half, bf16=True, config={"bf16": {"enabled": "auto"}})
    with pytest.raises(CheckpointError, match="is DeepSpeed's, which no other engine reads"):
        run(at / "other", 0, resume=at / "3" / "checkpoint-3")
    with pytest.raises(CheckpointError, match="written without DeepSpeed"):
        run(at / "other", 3, resume=at / "ddp" / "checkpoint-3")
    with pytest.raises(ConfigError, match="would convert the base, which is float32"):
        run(at / "other", 3, bf16=True, config={"bf16": {"enabled": "auto"}})
    other = pruned()
    with torch.no_grad():
        weight = other.model.layers[1].mlp.up_proj.weight
        weight.copy_(weight.roll(1, dims=1))
    with pytest.raises(MaskError, match=r"layers\.1\.mlp\.up_proj"):
        run(at / "other", 3, spp.wrap(other, r=4, seed=0), resume=at / "3" / "checkpoint-3")
    return found


def test_zero_2_and_3(tmp_path: Path) -> None:
    for found in values_of_ranks(on_ranks, 2, str(tmp_path), limit=400, env=ENV):
        ddp = found["ddp"]
        for stage, bound in ((2, 0.0), (3, 1e-5)):
            one, again = found[f"zero-{stage}"], found[f"resumed-{stage}"]
            assert one["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
            assert apart_from(one, ddp) <= bound, stage
            assert apart_from(again, one) == 0.0, f"stage {stage}: not what the uninterrupted run ends with"
            assert one["sparsity"] == ddp["sparsity"] == pytest.approx(0.5)
        assert found["zero-3"]["held"] * 2 == ddp["held"]
        assert found["half"]["dtype"] == torch.float32
        assert found["half"]["losses"] == pytest.approx(ddp["losses"], rel=2e-2)
    spp.merge(spp.load_adapter(pruned(), tmp_path / "3" / "final", strict_values=True))
    base = sum(p.nbytes for p in pruned().parameters())
    for stage in (2, 3):
        files = [path for path in (tmp_path / f"{stage}" / "checkpoint-3").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < base / 2, "a base weight was saved"
