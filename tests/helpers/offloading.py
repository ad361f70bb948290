"""Ways in which accelerate offloads a small model on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}  # of the tiny Llama: a block in memory, one on a disk


def to_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, str(folder / "offloaded"), execution_device="cpu")


def to_memory(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device="cpu")


def by_map(model: Any, folder: Path) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, MAP, offload_dir=str(folder / "offloaded"))


WAYS: dict[str, Callable[[Any, Path], Any]] = {"disk": to_disk, "memory": to_memory, "map": by_map}


def on_meta(model: Any) -> set[str]:
    """Names of the parameters that are not in memory between calls."""
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}
