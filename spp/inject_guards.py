"""What stands in for save_pretrained where it would write a checkpoint that nothing could load."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from spp.errors import WrapError
from spp.experts import SPPExperts
from spp.experts_packed import PackedExperts
from spp.layer import SPPLinear
from spp.layer_packed import PackedLinear


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
