"""PSTTrainer: transformers' Trainer for a model wrapped by spp.pst, with the sparsity schedule of the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from spp.errors import MaskError
from spp.pst import load, pst_layers
from spp.pst.files import base_checksums, write
from spp.pst.model import require_layers, trained_parameters
from spp.training.adapter_trainer import AdapterTrainer
from spp.training.sparsity_schedule import SparsitySchedule


class PSTTrainer(AdapterTrainer):
    """Trains what `spp.pst.wrap` put into a model; takes the arguments of `transformers.Trainer`.

    The sparsity rises by the cubic schedule. Checkpoints and `save_model` write what `spp.pst.load` reads; resuming is
    exact, as SPPTrainer's. With `load_best_model_at_end` only models of the final sparsity are compared.

    Args:
        model: wrapped by `spp.pst.wrap`.
        args: TrainingArguments; rest, options: as in transformers.Trainer.
        final_sparsity: s_f in [0, 1), the share that is pruned at the end; None is that of the N:M pattern.
        initial_sparsity, initial_warmup, final_warmup: as in SparsitySchedule; the defaults are the authors'.
        loss_chunk: as in SPPTrainer.

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

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the factors, and the modules that train as a whole."""
        return list(trained_parameters(model).values())

    def check(self, model: nn.Module) -> None:
        """Raise a MaskError if frozen weights have changed: the masks hang on every bit of them."""
        now = base_checksums(model)
        changed = sorted(path for path, checksum in self._weights.items() if now.get(path) != checksum)
        if changed:
            raise MaskError(
                f"frozen weights changed during training: {', '.join(changed)}. Nothing was saved; something wrote to "
                "them: load the model anew and resume from the last checkpoint"
            )

    def write(self, model: nn.Module, directory: Path) -> None:
        """Write what is trained."""
        write(model, directory, self._weights)  # `check` has compared them

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
