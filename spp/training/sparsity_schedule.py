"""The cubic schedule of PST as a callback of the Trainer (the formula: spp.pst.schedule)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from spp.configs.pst import check_schedule
from spp.errors import ConfigError
from spp.pst import set_sparsity, sparsity_schedule
from spp.pst.model import require_layers


class SparsitySchedule(TrainerCallback):
    """Sets the sparsity of a model's PST layers before the first step and after every one.

    PSTTrainer adds one; with another trainer, pass it among the callbacks.

    Args:
        final_sparsity: s_f in [0, 1); None is that of the layers' N:M pattern.
        initial_sparsity: s_i in [0, 1), at most `final_sparsity`.
        initial_warmup: w_i, the share of the steps that stays at the initial sparsity.
        final_warmup: w_f, the share that stays at the final one; together at most 1.

    Raises:
        ConfigError: a number is out of its range.

    Example:
        >>> SparsitySchedule(0.9).at(50, 100)
        0.8666666666666667
    """

    def __init__(
        self,
        final_sparsity: float | None = None,
        *,
        initial_sparsity: float = 0.0,
        initial_warmup: float = 0.1,
        final_warmup: float = 0.3,
    ) -> None:
        final = initial_sparsity if final_sparsity is None else final_sparsity
        check_schedule(initial_warmup, final_warmup, initial_sparsity, final)
        self.final_sparsity = final_sparsity
        self.initial_sparsity = initial_sparsity
        self.initial_warmup, self.final_warmup = initial_warmup, final_warmup

    @property
    def final_sparsity(self) -> float | None:
        """s_f: what was given, or what the last model's pattern says; None before there is one."""
        return self._final

    @final_sparsity.setter
    def final_sparsity(self, value: float | None) -> None:
        self._given = self._final = value

    def fit(self, model: nn.Module) -> None:
        """Take the final sparsity from a model's pattern where none is given; anew for every model.

        Raises:
            ConfigError: none is given and there is no pattern, or it is above the pattern's.
        """
        layers = require_layers(model)
        patterns = {layer.pattern for layer in layers.values()}
        (pattern,) = patterns if len(patterns) == 1 else (None,)
        final = self._given
        if final is None:
            if pattern is None:
                raise ConfigError("final_sparsity is None, and the layers have no N:M pattern that would say it")
            final = pattern.sparsity
        check_schedule(self.initial_warmup, self.final_warmup, self.initial_sparsity, final)
        for path, layer in layers.items():
            if layer.pattern is not None and final > layer.pattern.sparsity:
                raise ConfigError(
                    f"final_sparsity is {final}, above the {layer.pattern.sparsity} of pattern "
                    f"{layer.pattern} in {path}"
                )
        self._final = final

    def at(self, step: int, total_steps: int) -> float:
        """Return the sparsity after so many optimizer steps."""
        assert self.final_sparsity is not None
        return sparsity_schedule(
            step,
            total_steps,
            self.initial_warmup,
            self.final_warmup,
            self.initial_sparsity,
            self.final_sparsity,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        """Set the sparsity of the step that training starts from."""
        self.fit(model)
        set_sparsity(model, self.at(state.global_step, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        """Set the sparsity that the next step computes with, and a checkpoint holds."""
        set_sparsity(model, self.at(state.global_step, state.max_steps))
