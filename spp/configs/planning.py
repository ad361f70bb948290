"""PlanConfig: what `spp plan` is asked for: a model, a pattern, the ranks, how they share, and the memory of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from spp.configs.adapter import RULES, SPPConfig
from spp.configs.checks import check_choice, check_flag, check_int
from spp.configs.options import ADAPTER, DATA, METHOD, MODEL, OPTIMISATION, RUN, Option
from spp.configs.pattern import Pattern
from spp.errors import ConfigError, arg

STRATEGIES = ("none", "ddp", "fsdp", "zero2", "zero3")
FORMS = ("dense", "packed", "int8", "nf4")  # of the frozen weights
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes that "80GB" or "24GiB" means.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]) > 0:
        raise ConfigError(f"{arg('memory')} is {text!r}; write a size such as 80GB (10⁹ bytes) or 24GiB (2³⁰)")
    return int(float(found[1]) * unit)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The options of `spp plan`.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> PlanConfig(model="llama-7b.json", world=8, strategy="fsdp").strategy
        'fsdp'
    """

    model: Annotated[
        str, Option("Directory or hub id of a model, or its config.json: no weights are read.", argument=True)
    ]
    pattern: Annotated[str, Option("N:M or the fraction of zeros: what packed weights take.", METHOD)] = "2:4"
    world: Annotated[int, Option("Devices.", RUN)] = 1
    strategy: Annotated[str, Option("How they share the work.", RUN, choices=STRATEGIES)] = "none"
    memory: Annotated[
        str | None, Option("Of one device, such as 80GB: find the largest batch that fits.", RUN, default="not asked")
    ] = None
    weights: Annotated[str, Option("Form of the frozen weights.", MODEL, choices=FORMS)] = "dense"
    dtype: Annotated[str, Option("Of the model.", MODEL, choices=tuple(DTYPES))] = "bfloat16"
    batch_size: Annotated[int, Option("Rows of a forward pass on each device.", OPTIMISATION)] = 1
    block_length: Annotated[int, Option("Tokens of a row.", DATA)] = 2048
    rule: Annotated[str, Option("Of the adapter.", ADAPTER, choices=RULES)] = SPPConfig.rule
    r: Annotated[int, Option("Rank of the adapter.", ADAPTER)] = SPPConfig.r
    gradient_checkpointing: Annotated[bool, Option("Compute blocks again in the backward pass.", OPTIMISATION)] = False
    loss_chunk: Annotated[
        int | None, Option("Tokens whose logits exist at once.", OPTIMISATION, default="all of them")
    ] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", str(Pattern.parse(self.pattern)))
        for name in ("world", "batch_size", "block_length", "r"):
            check_int(name, getattr(self, name), least=1)
        if self.loss_chunk is not None:
            check_int("loss_chunk", self.loss_chunk, least=1)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("weights", self.weights, FORMS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("rule", self.rule, RULES)
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        if self.strategy == "none" and self.world > 1:
            raise ConfigError(
                f"{arg('world')} is {self.world}, and {arg('strategy', 'none')} uses one device",
                remedy=f"pass {arg('strategy', 'ddp')}, fsdp, zero2 or zero3",
            )
        if self.memory is not None:
            parse_size(self.memory)
        if self.loss_chunk is not None and self.strategy in ("fsdp", "zero3"):
            raise ConfigError(f"{arg('loss_chunk')} needs a whole head on each device, and {self.strategy} shards it")
