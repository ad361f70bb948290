"""Reconstruction: the options of training a pruned block until it gives the dense one's outputs again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from spp.configs.adapter import RULES, SPPConfig
from spp.configs.checks import check_choice, check_int, check_number
from spp.configs.options import ADAPTER, DATA, OPTIMISATION, Option
from spp.errors import ConfigError, arg

REGIONS = ("submodule", "block")
TRAINS = ("weights", "adapter")
INPUTS = ("repaired", "dense")
LR, ADAPTER_LR = 1e-3, 2e-2  # where `lr` is open
LEAST_STEPS = 60  # optimizer steps a region at least, where `epochs` is open
LEAST_EPOCHS = 3
STEP_TOKENS = 512  # of a step at most, where `batch_size` is open


@dataclass(frozen=True)
class Reconstruction:
    """The options of reconstruction.

    Args:
        region: what is trained at a time: "submodule" is the attention, then the MLP, each with its norm and residual
            connection; "block" a whole decoder block.
        train: "weights": the kept weights, norms and biases of the region; "adapter": an adapter of its projections,
            beside frozen weights, which is left unmerged.
        inputs: of the region: "repaired", those that the blocks before it give now, or "dense", those of the dense
            model.
        epochs: passes over the windows; None takes 3, or as many as give 60 steps.
        lr: of Adam, reached after a tenth of the steps; it decays to zero. None takes 1e-3, for an adapter 2e-2.
        batch_size: windows of a step; None takes as many as have 512 tokens, one at least.
        held_out: share of the windows that is not trained on, and says when a region gets worse; 0 holds none out.
        seed: of the order of batches, and of the start of an adapter.
        rule, r, scaling: of the adapter, as in SPPConfig.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> Reconstruction(region="block", epochs=5).rate
        0.001
    """

    region: Annotated[
        str,
        Option("Submodule (attention, then MLP) or block.", OPTIMISATION, choices=REGIONS),
    ] = "submodule"
    train: Annotated[
        str,
        Option(
            "Weights, the kept ones with norms and biases; or adapter, one that is left unmerged.",
            OPTIMISATION,
            choices=TRAINS,
        ),
    ] = "weights"
    inputs: Annotated[
        str,
        Option(
            "A region reads what the repaired blocks before it give, or what dense ones give.",
            OPTIMISATION,
            choices=INPUTS,
        ),
    ] = "repaired"
    epochs: Annotated[
        int | None,
        Option("Passes over the windows.", OPTIMISATION, default="3, or as many as give 60 steps"),
    ] = None
    lr: Annotated[
        float | None, Option("The learning rate of Adam.", OPTIMISATION, default="0.001, for an adapter 0.02")
    ] = None
    batch_size: Annotated[
        int | None,
        Option("Windows of a step.", OPTIMISATION, default="as many as have 512 tokens"),
    ] = None
    held_out: Annotated[
        float,
        Option("Share of the windows that is held out to see whether a region gets worse.", DATA),
    ] = 0.125
    seed: Annotated[int, Option("Of the order of windows, and of the start of an adapter.", OPTIMISATION)] = 0
    rule: Annotated[str, Option("Of an adapter: spp, hira, masked_lora or full.", ADAPTER, choices=RULES)] = (
        SPPConfig.rule
    )
    r: Annotated[int, Option("Rank of an adapter.", ADAPTER)] = SPPConfig.r
    scaling: Annotated[float, Option("Factor s of an adapter.", ADAPTER)] = SPPConfig.scaling

    def __post_init__(self) -> None:
        check_choice("region", self.region, REGIONS)
        check_choice("train", self.train, TRAINS)
        check_choice("inputs", self.inputs, INPUTS)
        if self.epochs is not None:
            check_int("epochs", self.epochs, least=1)
        if self.lr is not None:
            check_number("lr", self.lr, above=0.0)
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size, least=1)
        check_number("held_out", self.held_out, least=0.0, below=1.0)
        check_int("seed", self.seed, least=0)
        check_choice("rule", self.rule, RULES)
        check_int("r", self.r, least=1)
        check_number("scaling", self.scaling, above=0.0)
        if self.adapter is None:
            given = {"rule": self.rule, "r": self.r, "scaling": self.scaling}
            idle = [name for name, value in given.items() if value != getattr(SPPConfig, name)]
            if idle:
                raise ConfigError(
                    f"{arg(idle[0], given[idle[0]])} is of an adapter: pass {arg('train', 'adapter')} with it"
                )

    @property
    def adapter(self) -> SPPConfig | None:
        """The config of the adapter that is trained; None where the weights themselves are."""
        if self.train != "adapter":
            return None
        return SPPConfig(r=self.r, scaling=self.scaling, rule=self.rule, seed=self.seed)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or (LR if self.train == "weights" or self.rule == "full" else ADAPTER_LR)

    def split(self, windows: int, length: int) -> tuple[list[int], list[int]]:
        """Return how many windows each batch has: those that are trained on, and those that are held out, last.

        Args:
            windows: how many there are.
            length: tokens of each.
        """
        held = min(windows - 1, max(1, round(self.held_out * windows))) if self.held_out else 0
        size = self.batch_size or max(1, STEP_TOKENS // length)
        return _batches(windows - held, size), _batches(held, size)

    def epochs_of(self, batches: int) -> int:
        """Return the passes over so many batches."""
        return self.epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / batches))


def _batches(windows: int, size: int) -> list[int]:
    return [min(size, windows - start) for start in range(0, windows, size)]
