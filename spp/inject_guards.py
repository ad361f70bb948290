"""What wrap refuses, and what save_pretrained does where it would write a checkpoint that nothing could load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, WrapError
from spp.experts import SPPExperts
from spp.experts_packed import PackedExperts
from spp.layer import SPPLinear
from spp.layer_packed import PackedLinear
from spp.targets import resolve_projections


def guard_saving(model: nn.Module) -> None:
    """Make save_pretrained an error while the model is wrapped or packed, and what it was as soon as it is neither."""
    if not hasattr(model, "save_pretrained"):
        return
    model.__dict__.pop("save_pretrained", None)
    if any(isinstance(module, SPPLinear | SPPExperts) for module in model.modules()):
        model.save_pretrained = refuse_while_wrapped  # type: ignore[assignment]
    elif any(isinstance(module, PackedLinear | PackedExperts) for module in model.modules()):
        model.save_pretrained = refuse_while_packed  # type: ignore[assignment]


def refuse_while_wrapped(*args: object, **kwargs: object) -> NoReturn:
    """Raise: keys of a wrapped model are not those of a checkpoint."""
    raise WrapError(
        "the model is still wrapped, and save_pretrained would write a checkpoint that transformers cannot load. "
        "Save the adapter with spp.save_adapter(model, path), or merge first: spp.merge(model), then "
        "spp.save_model(model, path). Training with transformers' Trainer? spp.training.SPPTrainer saves adapters; "
        "for TRL's SFTTrainer, spp.integrations.trl.SPPSFTTrainer does."
    )


def refuse_while_packed(*args: object, **kwargs: object) -> NoReturn:
    """Raise: packed weights are no checkpoint's."""
    raise WrapError(
        "the model is packed, and save_pretrained would write a checkpoint that transformers cannot load: call "
        "spp.unpack(model) first"
    )


def config_of_rank(model: nn.Module, r: int, options: Mapping[str, Any]) -> SPPConfig:
    """Return the config of a rank and options; the error for a rank below 1 names the first layer that was to have it.

    Raises:
        ConfigError, TargetError: as in `spp.inject.wrap`.
    """
    if type(r) is int and r < 1:
        config = SPPConfig(r=1, **options)
        path = next(iter(resolve_projections(model, config.target_modules, config.exclude_modules)))
        raise ConfigError(f"{path}: r is {r}; it must be an int of at least 1")
    return SPPConfig(r=r, **options)
