"""Which of transformers' auto classes makes a model: that of causal language models, or, with images, of its own."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """Return AutoModelForCausalLM, or AutoModelForImageTextToText where only that knows the config.

    Args:
        config: of the model, as AutoConfig gives it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    def knows(auto: Any) -> bool:
        remote = getattr(config, "auto_map", None) or {}
        return type(config) in auto._model_mapping or auto.__name__ in remote

    if knows(AutoModelForCausalLM) or not knows(AutoModelForImageTextToText):
        return AutoModelForCausalLM  # whose error says what it knows
    return AutoModelForImageTextToText
