"""The methods of `tune`: which layers go into the model, which trainer trains it, what is written."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spp.certifying.save import save_model
from spp.configs.tuning import TuneConfig
from spp.files import atomic_directory
from spp.packing.model import pack, packed_layers, unpack
from spp.pst import unwrap as unwrap_pst
from spp.pst import wrap as wrap_pst
from spp.pst.files import write as write_pst
from spp.training.adapter_trainer import AdapterTrainer
from spp.training.mask_updates import MaskUpdates
from spp.training.pst_trainer import PSTTrainer
from spp.training.run_directory import RunDirectory
from spp.training.trainer import SPPTrainer
from spp.weights import Layout
from spp.wrapping.adapters import load_adapter, warn_without_effect, write_adapter
from spp.wrapping.wrap import is_wrapped, set_saved_activations, unwrap, wrap


class Method(ABC):
    """A method with the options of one run."""

    def __init__(self, config: TuneConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, model: Any) -> None:
        """Wrap the model."""

    @abstractmethod
    def undo(self, model: Any) -> None:
        """Restore the model as it was before `prepare`, wherever the run has failed."""

    @abstractmethod
    def trainer(self, model: Any, arguments: Any, **options: Any) -> AdapterTrainer:
        """Return the trainer."""

    @abstractmethod
    def finish(self, model: Any, tokenizer: Any, run: RunDirectory, frozen: dict[str, Any]) -> Path | None:
        """Write the final adapter, and the model that it belongs to where it is a new one; return that one's path.

        Args:
            frozen: what the trainer's `check` has returned.
        """

    def without_effect(self, model: Any) -> str | None:
        """Return, and warn, why the weights are what they were before; None where they are not."""
        return None


class SPPMethod(Method):
    """SPP's adapter, with or without mask updates."""

    def prepare(self, model: Any) -> None:
        """Wrap, and find the dense model for mask updates."""
        # A quantized weight is small as it is.
        packed = any(isinstance(layer.packed_layout, Layout) for layer in packed_layers(model).values())
        config = replace(self.config.adapter_config(), packed=packed)
        self._wrap_options(wrap(model, config))
        try:
            self._updates = self._mask_updates(model)
        except BaseException:
            unwrap(model)
            raise

    def undo(self, model: Any) -> None:
        """Restore the masks, and take the adapter out."""
        if self._updates is not None:
            self._updates.restore()
        if is_wrapped(model):
            unwrap(model)

    def trainer(self, model: Any, arguments: Any, **options: Any) -> AdapterTrainer:
        """Return an SPPTrainer."""
        options |= {"strict_values": self.config.strict_values, "also_lr": self.config.also_lr}
        return SPPTrainer(model, arguments, mask_updates=self._updates, **options)

    def finish(self, model: Any, tokenizer: Any, run: RunDirectory, frozen: dict[str, Any]) -> Path | None:
        """Write the adapter; after mask updates, the pruned model with its final masks too, which it then names.

        A packed model is unpacked for that: the checkpoint is a plain one.
        """
        with atomic_directory(run.adapter, overwrite=True) as directory:
            write_adapter(model, directory, frozen)
        if self._updates is None:
            return None
        unwrap(model)
        try:
            with _unpacked(model):
                save_model(model, run.base, tokenizer=tokenizer, overwrite=True)
        finally:
            self._wrap_options(load_adapter(model, run.adapter))
            self._updates.state.follow(model)
        with atomic_directory(run.adapter, overwrite=True) as directory:
            write_adapter(model, directory, frozen)  # whose base has a name now
        return run.base

    def without_effect(self, model: Any) -> str | None:
        """Warn where the adapter changes no weight."""
        return warn_without_effect(model)

    def _mask_updates(self, model: Any) -> MaskUpdates | None:
        config = self.config
        if config.mask_update_every is None:
            return None
        assert config.dense_model is not None
        updates = MaskUpdates(config.dense_model, **asdict(config.mask_updates()))
        updates.attach(model)
        return updates

    def _wrap_options(self, model: Any) -> None:
        set_saved_activations(model, self.config.saved_activations)


class PSTMethod(Method):
    """PST: the mask is learned while a dense model trains."""

    def prepare(self, model: Any) -> None:
        """Wrap."""
        wrap_pst(model, self.config.pst_config())

    def undo(self, model: Any) -> None:
        """Take the layers out."""
        unwrap_pst(model)

    def trainer(self, model: Any, arguments: Any, **options: Any) -> AdapterTrainer:
        """Return a PSTTrainer."""
        return PSTTrainer(
            model,
            arguments,
            final_sparsity=self.config.final_sparsity,
            initial_sparsity=self.config.initial_sparsity,
            initial_warmup=self.config.initial_warmup,
            final_warmup=self.config.final_warmup,
            **options,
        )

    def finish(self, model: Any, tokenizer: Any, run: RunDirectory, frozen: dict[str, Any]) -> Path | None:
        """Write what PST trained."""
        with atomic_directory(run.adapter, overwrite=True) as directory:
            write_pst(model, directory, frozen)
        return None


@contextlib.contextmanager
def _unpacked(model: Any) -> Iterator[None]:
    """Unpack the packed weights, and pack them again: a context manager."""
    paths = list(packed_layers(model))
    if paths:
        unpack(model)
    try:
        yield
    finally:
        if paths:
            pack(model, target_modules=paths)


def method_of(config: TuneConfig) -> Method:
    """Return the method of a run."""
    return SPPMethod(config) if config.method == "spp" else PSTMethod(config)
