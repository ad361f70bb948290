"""PSTTrainer: transformers' Trainer for a model wrapped by spp.pst, with the sparsity schedule of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from spp.configs.pst import check_schedule
from spp.errors import ConfigError
from spp.pst import load, pst_layers, set_sparsity, sparsity_schedule
from spp.pst.files import base_checksums, write
from spp.pst.model import require_layers, trained_parameters
from spp.training.adapter_trainer import AdapterTrainer


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
        self._given = self._final = final_sparsity
        self.initial_sparsity = initial_sparsity
        self.initial_warmup, self.final_warmup = initial_warmup, final_warmup

    @property
    def final_sparsity(self) -> float | None:
        """s_f: what was given, or what the last model's pattern says; None before there is one."""
        return self._final

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


class PSTTrainer(AdapterTrainer):
    """Trains what `spp.pst.wrap` put into a model; takes the arguments of `transformers.Trainer`.

    The sparsity rises by the cubic schedule. Checkpoints and `save_model` write what `spp.pst.load` reads; resuming is
    exact, as SPPTrainer's. With `load_best_model_at_end` only models of the final sparsity are compared.

    Args:
        model: wrapped by `spp.pst.wrap`.
        args: TrainingArguments; rest, options: as in transformers.Trainer.
        final_sparsity: s_f in [0, 1), the share that is pruned at the end; None is that of the N:M pattern.
        initial_sparsity, initial_warmup, final_warmup: as in SparsitySchedule; the defaults are the authors'.
        loss_chunk, and the options of a teacher: as in SPPTrainer.

    Raises:
        WrapError: the model is not wrapped, or others than PST's parameters require gradients.
        ConfigError: a number of the schedule is out of its range, or above what the pattern prunes.
        MaskError: at a save, frozen weights are not those at the start.
        AdapterError: a checkpoint does not fit the model.
        CheckpointError: a checkpoint to resume from is not whole.

    Example:
        >>> model = spp.pst.wrap(model)  # doctest: +SKIP
        >>> PSTTrainer(model, arguments, train_dataset=rows, final_sparsity=0.5).train()  # doctest: +SKIP
        >>> spp.save_model(spp.pst.convert(model), "sparse")  # doctest: +SKIP
    """

    compared = "frozen weights"

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        final_sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        initial_warmup: float = 0.1,
        final_warmup: float = 0.3,
        **options: Any,
    ) -> None:
        self.schedule = SparsitySchedule(
            final_sparsity,
            initial_sparsity=initial_sparsity,
            initial_warmup=initial_warmup,
            final_warmup=final_warmup,
        )
        super().__init__(model, args, *rest, **options)
        self.add_callback(self.schedule)

    def require_prepared(self, model: nn.Module) -> None:
        """Raise a WrapError unless the model is wrapped for PST."""
        require_layers(model)

    def begin(self, model: nn.Module) -> None:
        """Remember the frozen weights, and see that the schedule fits."""
        self.schedule.fit(model)
        self._weights = base_checksums(model)

    @property
    def expected(self) -> dict[str, int]:
        """The checksum of every frozen weight."""
        return self._weights

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the factors, and the modules that train as a whole."""
        return list(trained_parameters(model).values())

    def frozen(self, model: nn.Module) -> dict[str, Any]:
        """Return the checksum of every frozen weight: the masks depend on every bit of it."""
        return base_checksums(model)

    def write(self, model: nn.Module, directory: Path, frozen: dict[str, Any]) -> None:
        """Write what is trained."""
        write(model, directory, frozen)

    def read(self, model: nn.Module, directory: Path) -> None:
        """Load what `write` wrote."""
        load(model, directory)

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that the masks prune now."""
        layers = pst_layers(self._bare_model()).values()
        return sum(layer.pruned for layer in layers) / max(sum(layer.weight.numel() for layer in layers), 1)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare with the best model so far, but no model that is less sparse than it is to be."""
        if self.schedule.at(self.state.global_step, self.state.max_steps) != self.schedule.final_sparsity:
            return False
        return super()._determine_best_metric(metrics, trial)
