"""FSDP2 through accelerate on a CPU: it is turned on for accelerators alone, so gloo is named as one of theirs."""

from __future__ import annotations

import os
from typing import Any

_BEGIN: dict[str, Any] = {}


def choose_engine(fsdp: bool) -> None:
    """Let the next trainer of this process have FSDP2, or plain DDP."""
    import accelerate.state
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [
        name
        for name in os.environ
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED"))
    ]:
        del os.environ[name]
    begin = _BEGIN.setdefault("state", PartialState.__init__)

    def named(self: Any, *rest: Any, **options: Any) -> None:
        begin(self, *rest, **options)
        if fsdp and self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = named  # type: ignore[method-assign]


def fsdp_options(**config: Any) -> dict[str, Any]:
    """Arguments of TrainingArguments."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            **config,
        },
    }
