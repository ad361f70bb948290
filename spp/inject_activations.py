"""What of the activations a wrapped model keeps for backward: a choice of the run, not of the adapter."""

from __future__ import annotations

from torch import nn

from spp.inject import require_layers
from spp.kernels import check_saved_activations


def set_saved_activations(model: nn.Module, choice: str) -> None:
    """Choose in what form all layers of a wrapped model keep their input for backward.

    It is no part of SPPConfig and is not saved with the adapter: it does not change what the adapter is, and an adapter
    directory stays readable by every version that knows format_version 1.

    Args:
        choice: "full", or "bfloat16": float32 inputs are kept rounded to bfloat16, at half the memory. Outputs and the
            gradients of activations do not change; those of W_α and W_β see inputs that are off by at most 2⁻⁸ of each
            entry. 16-bit inputs stay as they are.

    Raises:
        ConfigError: another choice.
        WrapError: the model is not wrapped.

    Example:
        >>> set_saved_activations(spp.wrap(model), "bfloat16")  # doctest: +SKIP
    """
    check_saved_activations(choice)
    for layer in require_layers(model).values():
        layer.saved_activations = choice
