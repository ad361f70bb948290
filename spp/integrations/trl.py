"""TRL: SFTTrainer for a model wrapped by spp.

There are two ways to tune with TRL. With `peft_config=SPPPeftConfig(...)` (spp.integrations.peft) every trainer of TRL
works as with LoRA; DPO's reference is the model with its adapter disabled. For a model that `spp.wrap` made, there is
SPPSFTTrainer: TRL's SFTTrainer with the checkpoints of spp.training.SPPTrainer. TRL's own SFTTrainer trains it as well,
but fails at the first save, because it would write a checkpoint that nothing could load.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from spp.errors import ConfigError, DependencyError
from spp.models.targets import output_head
from spp.training import SPPTrainer
from spp.training.loss_trainer import TEACHER_OPTIONS
from spp.wrapping.wrap import adapter_layers

try:
    from trl import SFTTrainer
except ImportError as error:
    raise DependencyError(f"spp.integrations.trl needs TRL: pip install 'spp[train]' ({error})") from error


class SPPSFTTrainer(SPPTrainer, SFTTrainer):
    """Supervised fine-tuning of a wrapped model: TRL's data handling and loss, SPPTrainer's checkpoints and checks.

    Args:
        model: wrapped by `spp.wrap`; its output head must not be, because TRL multiplies by the head's weight itself.
        args: SFTConfig. rest, options: as in trl.SFTTrainer, but for peft_config.

    Raises:
        WrapError: the model is not wrapped.
        ConfigError: an argument that belongs elsewhere, or an adapted output head.

    Example:
        >>> model = spp.wrap(model)  # doctest: +SKIP
        >>> SPPSFTTrainer(model, SFTConfig("run"), train_dataset=rows, processing_class=tokenizer)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, args: Any = None, *rest: Any, **options: Any) -> None:
        if options.get("peft_config") is not None:
            raise ConfigError("peft_config goes to trl.SFTTrainer, with a model that is not wrapped")
        if options.get("loss_chunk") is not None:
            raise ConfigError("loss_chunk is SPPTrainer's; TRL takes the loss a part of the tokens at a time by itself")
        taught = [name for name in TEACHER_OPTIONS if options.get(name) is not None]
        if taught:
            raise ConfigError(f"{', '.join(taught)}: a teacher is SPPTrainer's; TRL has trainers of its own for one")
        if isinstance(model, nn.Module) and any(
            output_head(model) is layer for layer in adapter_layers(model).values()
        ):
            raise ConfigError(
                "the output head is wrapped, and TRL multiplies by its weight without calling it: the adapter would be "
                "left out. Wrap the model with exclude_modules=['lm_head']"
            )
        super().__init__(model, args, *rest, **options)
