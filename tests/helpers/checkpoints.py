"""A pruned checkpoint and an adapter for it, on disk and in memory."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import torch

import spp
from spp.files import CheckpointReader, save_tensors, write_json
from spp.pst.model import trained_parameters
from tests.helpers.models import prune_nm_, tiny_llama

Q0 = "model.layers.0.self_attn.q_proj.weight"
UP1 = "model.layers.1.mlp.up_proj.weight"


def assert_no_threads_at_work() -> None:
    """No thread of a pipeline is there."""
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("spp_")]


def pruned_model(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return prune_nm_(tiny_llama(**options)).to(dtype)


def wrapped_model(dtype: torch.dtype = torch.float32, scale: float = 0.3, **options: Any) -> Any:
    """A pruned model with an adapter whose β is not zero."""
    model = spp.wrap(pruned_model(dtype), **{"r": 4, "seed": 1, **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.normal_(0, scale, generator=generator)
    return model


def trained_by_pst(model: Any, sparsity: float, **options: Any) -> Any:
    """A wrapped model whose factors are away from their start."""
    spp.pst.wrap(model, **{"weight_rank": 3, "mask_rank": 2, "seed": 0, **options})
    spp.pst.set_sparsity(model, sparsity)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def make_sources(folder: Path, *also: str) -> Path:
    """Make a pruned checkpoint in shards, an adapter of it, and what else is asked for: "packed", a PST "state"."""
    folder.mkdir(parents=True)
    spp.save_model(pruned_model(), folder / "whole")
    shard(folder / "whole", folder / "base")
    spp.save_adapter(wrapped_model(), folder / "adapter")
    if "packed" in also:
        spp.export_packed(folder / "base", folder / "packed")
    if "state" in also:
        spp.pst.save(trained_by_pst(pruned_model(), 0.75), folder / "state")
    return folder


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    with CheckpointReader(one) as a, CheckpointReader(other) as b:
        return a.keys() == b.keys() and all(
            (a.shape(k), a.dtype(k)) == (b.shape(k), b.dtype(k)) and bytes(a.raw(k)) == bytes(b.raw(k)) for k in a
        )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {key: reader.tensor(key).clone() for key in reader}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Put other tensors into model.safetensors (None: out of it)."""
    tensors = {**tensors_of(folder), **changes}
    save_tensors(folder / "model.safetensors", {k: t for k, t in tensors.items() if t is not None})


def grown(t: torch.Tensor) -> torch.Tensor:
    """The tensor with two zeros filled and one weight removed."""
    t = t.clone()
    t.view(-1)[(t.view(-1) == 0).nonzero()[:2]] = 1.0
    t.view(-1)[(t.view(-1) != 0).nonzero()[-1]] = 0.0
    return t


def shard(folder: Path, into: Path, count: int = 3) -> Path:
    """Copy a checkpoint, its weights spread over several files."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = tensors_of(folder)
    names = {key: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in sorted(set(names.values())):
        save_tensors(into / name, {k: t for k, t in tensors.items() if names[k] == name})
    total = sum(t.nbytes for t in tensors.values())
    write_json(into / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names})
    return into
