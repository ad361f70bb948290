"""The shape of a model, of which no weight is loaded: transformers builds it on the meta device."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spp.errors import CheckpointError, ConfigError
from spp.models.targets import resolve_projections

_BLOCK = re.compile(r"^(.*?\.\d+)\.")  # the path of the block that a module is in


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on.

    Attributes:
        name: what the config calls the architecture.
        hidden, vocabulary, blocks: h, V, L.
        keys: the width of the keys and of the values of a token, as they are saved.
        inner: the width of the feed-forward part that a token passes: of all experts that it is routed to.
        routed: experts that a token is routed to; 1 without experts.
        projections: the (m, n) of every matrix that an adapter would have, those of each expert too.
        others: parameters that are none of these: embeddings, norms, biases, head.
        outside: parameters outside the blocks: embeddings, last norm, head.
        largest_block: parameters of the largest block.
    """

    name: str
    hidden: int
    vocabulary: int
    blocks: int
    keys: int
    inner: int
    routed: int
    projections: tuple[tuple[int, int], ...]
    others: int
    outside: int
    largest_block: int

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return sum(m * n for m, n in self.projections) + self.others


def read_config(model: str) -> Any:
    """Return the config of a model: a directory, a hub id, or a config.json.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(model).exists():
            raise CheckpointError(f"{model} has no config that transformers reads: {reason}") from error
        raise CheckpointError(
            f"there is no model or config {model}, and fetching it as a hub id failed: {reason}",
            remedy="check the spelling and the network, or pass a local directory or config.json",
        ) from error


def shape_of(config: Any) -> ModelShape:
    """Return the shape of the model that a config describes.

    Args:
        config: of transformers.

    Raises:
        ConfigError: it describes no causal language model, or does not say what memory depends on.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{type(config).__name__} describes no causal language model: {error}") from error
    return shape_of_model(model)


def shape_of_model(model: nn.Module) -> ModelShape:
    """Return the shape of a model in memory or on the meta device; see `shape_of`."""
    config: Any = model.config
    config = getattr(config, "get_text_config", lambda: config)()
    found = resolve_projections(model)
    matrices: list[tuple[int, int]] = []
    for target in found.values():
        count = torch.Size(target.held().shape[:-2]).numel()  # of experts; 1 of a matrix
        matrices += [(target.out_features, target.in_features)] * count
    total = sum(p.numel() for p in model.parameters())
    by_block: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if block := _BLOCK.match(name):
            by_block[block[1]] += parameter.numel()
    heads = _known(config, "num_attention_heads", "n_head")
    hidden = _known(config, "hidden_size", "n_embd")
    width = getattr(config, "head_dim", None) or hidden // heads
    routed = int(getattr(config, "num_experts_per_tok", None) or 1)
    experts = any("expert" in path for path in found)
    inner = getattr(config, "moe_intermediate_size", None) if experts else None
    inner = inner or getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return ModelShape(
        name=type(model).__name__,
        hidden=hidden,
        vocabulary=_known(config, "vocab_size"),
        blocks=max(1, len(by_block)),
        keys=heads * width,  # of grouped queries, attention saves keys and values repeated
        inner=int(inner) * (routed if experts else 1),
        routed=routed if experts else 1,
        projections=tuple(matrices),
        others=total - sum(m * n for m, n in matrices),
        outside=total - sum(by_block.values()),
        largest_block=max(by_block.values(), default=total),
    )


def _known(config: Any, *names: str) -> int:
    """Return a field of a config under one of its names."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ConfigError(f"the config of {getattr(config, 'model_type', 'the model')} does not say its {names[0]}")
