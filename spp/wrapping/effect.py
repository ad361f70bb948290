"""Whether the adapter of a wrapped model changes any weight (spp.rules.idle says what can be wrong)."""

from __future__ import annotations

import torch
from torch import nn

from spp.rules.idle import effect_of, idle_reason, no_update_text, rounded_away_text
from spp.wrapping.wrap import require_layers


@torch.no_grad()
def without_effect(model: nn.Module) -> str | None:
    """Return a sentence that says why the adapter changes no weight; None where it changes one.

    That is known from the adapter's parameters where they are as they were at the start, and from the first block of
    weights where they have been trained. Of a weight without values, on the meta device, nothing is said.

    Args:
        model: wrapped.
    """
    layers = require_layers(model).values()
    reason = idle_reason(layer.adapter() for layer in layers)
    if reason is not None:
        return no_update_text(reason)
    updated = False
    for layer in layers:
        for weight, adapter in layer.parts():
            if weight.is_meta or any(parameter.is_meta for parameter in adapter.params):
                return None
            found = effect_of(weight, adapter)
            if found.moved:
                return None
            updated = updated or found.updated
    if not updated:
        return no_update_text()
    return f"{rounded_away_text()}. Train it longer or at a higher rate, or on weights in torch.float32"
