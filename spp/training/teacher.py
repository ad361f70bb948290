"""Teachers: a model that runs beside the student, or a cache of what it said; how one is found, and checked.

A teacher is checked against the model that learns before the first step: one vocabulary, one tokenizer as far as both
are known; where hidden states count, as many blocks and as wide ones.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spp.certifying.save import origin_of
from spp.configs.distillation import DENSE, Distillation
from spp.errors import CheckpointError, ConfigError, DataError, arg
from spp.evaluation import evaluating
from spp.files.hashes import weights_fingerprint
from spp.files.hub import local_directory
from spp.models.targets import input_embedding
from spp.models.tokens import embedding_rows, position_limit
from spp.training.causal_loss import captured_states, check_form, form_of, output_head, unwrapped
from spp.training.distillation import FromLogits, FromTop, TaughtBatch, Weights, block_outputs, blocks_of
from spp.training.loading import load_model, load_tokenizer
from spp.training.teacher_cache import TeacherCache, row_key

_NOT_OF_A_FORWARD = ("labels", "num_items_in_batch")


class Teacher(ABC):
    """A teacher with the weights of what it says."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The hash that a run is resumed with."""

    @abstractmethod
    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Raise a ConfigError unless the model can learn from this teacher."""

    @abstractmethod
    def lesson(self, inputs: Mapping[str, Any]) -> TaughtBatch:
        """Return what the teacher says of a batch, of which `inputs` has labels too."""

    def check_rows(self, rows: Any) -> None:
        """Raise a DataError unless the teacher can speak of all rows of a data set, as far as that is known."""
        return

    def place(self, device: torch.device) -> None:
        """Move to the device of the training."""
        return


class ModelTeacher(Teacher):
    """A model that runs on every batch, in evaluation mode, without gradients and in its own dtype.

    Args:
        model: a causal language model.
        weights: of the terms.
    """

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        super().__init__(weights)
        self.model = model
        self._identity: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of all its values."""
        if self._identity is None:
            self._identity = {"fingerprint": weights_fingerprint(self.model)}
        return self._identity

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Compare vocabularies and positions; where hidden states count, blocks."""
        mine, his = unwrapped(model), unwrapped(self.model)
        if mine is his:
            raise ConfigError(f"{arg('teacher')} is the model that learns: pass the dense model")
        pairs = [("vocabulary", _vocabulary(mine), _vocabulary(his))]
        if self.weights.hidden:
            pairs += [("blocks", len(blocks_of(mine)), len(blocks_of(his))), ("hidden size", _width(mine), _width(his))]
        for what, one, other in pairs:
            if one != other:
                hidden = "" if what == "vocabulary" else f", or leave {arg('hidden_weight')} out"
                raise ConfigError(
                    f"{arg('teacher')} is a {type(his).__name__} with the {what} {other}, the model that learns has "
                    f"{one}: pass the dense model that it was pruned from{hidden}"
                )
        limits = position_limit(mine), position_limit(his)
        if limits[1] is not None and (limits[0] is None or limits[0] > limits[1]):
            raise ConfigError(f"{arg('teacher')} has {limits[1]} positions, fewer than the model that learns")

    def lesson(self, inputs: Mapping[str, Any]) -> TaughtBatch:
        """Run the model on a batch, all but its output head."""
        bare: Any = unwrapped(self.model)
        device = next(bare.parameters()).device
        given = {name: _moved(value, device) for name, value in inputs.items() if name not in _NOT_OF_A_FORWARD}
        cache = {"use_cache": False} if hasattr(getattr(bare, "config", None), "use_cache") else {}
        hidden: Any = block_outputs(bare) if self.weights.hidden else contextlib.nullcontext([])
        with evaluating(bare):
            check_form(bare, given)
            with captured_states(bare) as states, hidden as outputs:
                bare(**given, **cache)
        if len(states) != 1:
            raise ConfigError(f"{arg('teacher')} used its output head {len(states)} times in one forward")
        flat, head, form = states[0].flatten(0, -2), output_head(bare), form_of(bare)

        def make(places: Tensor) -> FromLogits:
            return FromLogits(self.weights, head, form, flat[places.to(flat.device)])

        return TaughtBatch(self.weights, make, outputs)

    def place(self, device: torch.device) -> None:
        """Move the model, unless it is spread over devices or quantized, which have their places."""
        bare: Any = unwrapped(self.model)
        spread = getattr(bare, "hf_device_map", None) or getattr(bare, "is_quantized", False)
        if not spread and next(bare.parameters()).device != device:
            bare.to(device)


class CachedTeacher(Teacher):
    """A cache of a teacher on the training data, whose rows are found by their hashes.

    Args:
        cache: of `spp teacher-cache`.
        weights: of the terms.
    """

    def __init__(self, cache: TeacherCache, weights: Weights) -> None:
        super().__init__(weights)
        self.cache = cache

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of the cache's head, which has those of its rows and of the model."""
        return {"cache": self.cache.sha256}

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Compare vocabulary and tokenizer."""
        self.cache.check(_vocabulary(unwrapped(model)), tokenizer)

    def check_rows(self, rows: Any) -> None:
        """Look every row up."""
        self.cache.check_rows(rows)

    def lesson(self, inputs: Mapping[str, Any]) -> TaughtBatch:
        """Find the rows of a batch, by their tokens without padding."""
        ids, labels, mask = inputs.get("input_ids"), inputs["labels"], inputs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ConfigError(f"{arg('teacher_cache')} needs input_ids (batch, tokens)")
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found = []
        for row, label, kept in zip(ids.cpu(), labels.cpu(), keep.cpu(), strict=True):
            entries = self.cache.find(row_key(row[kept], label[kept]))
            if entries is None:
                raise DataError(f"a row of a batch is not in {self.cache.path}, {arg('teacher_cache')}")
            found.append(entries)
        entries = torch.cat(found)  # (k,), in the order of the batch

        def make(places: Tensor) -> FromTop:
            if len(places) != len(entries):
                raise ConfigError(
                    f"a batch has {len(places)} tokens to learn, its rows in {self.cache.path} have {len(entries)}: "
                    f"rows must be padded on the right"
                )
            return FromTop(self.weights, *self.cache.entries(entries))

        return TaughtBatch(self.weights, make)


def find_teacher(
    options: Distillation,
    student: nn.Module,
    tokenizer: Any = None,
    *,
    model: nn.Module | None = None,
    dense: str | None = None,
) -> Teacher | None:
    """Return the teacher that the options name, checked against the model that learns; None where there is none.

    Args:
        options: of the loss.
        student: the model that learns, plain or wrapped; "dense" means the model that it was pruned from.
        tokenizer: the student's, where it is known.
        model: a teacher in memory, in place of one that the options name.
        dense: the model that "dense" means, where it is known; None asks the student's certificate.

    Raises:
        ConfigError: there are two teachers, or weights without one, or it does not fit the student, or "dense" is
            not known.
        CheckpointError: it cannot be loaded.
    """
    if model is not None and (options.teacher is not None or options.teacher_cache is not None):
        raise ConfigError(f"two teachers: one in memory, and {arg('teacher')} or {arg('teacher_cache')} by name")
    options.require_weights(any(one is not None for one in (model, options.teacher, options.teacher_cache)))
    weights = Weights(options.ce_weight, options.kl_weight, options.hidden_weight, options.temperature)
    found: Teacher
    if options.teacher_cache is not None:
        found = CachedTeacher(TeacherCache.open(options.teacher_cache), weights)
    elif options.teacher is not None:
        name = os.fspath(options.teacher)
        if name == DENSE:
            bare: Any = unwrapped(student)
            source = getattr(getattr(bare, "config", None), "_name_or_path", None)
            name = dense_of(source, dense or getattr(bare, "_spp_origin", None))
        if tokenizer is not None:
            require_tokenizer(name, tokenizer)
        found = ModelTeacher(load_model(name, bits=options.teacher_bits), weights)
    elif model is not None:
        found = ModelTeacher(model, weights)
    else:
        return None
    found.check(student, tokenizer)
    return found


def dense_of(source: str | None, noted: str | None = None) -> str:
    """Return the dense model that a pruned one was made from.

    Args:
        source: directory or hub id of the pruned model, whose certificate may say it.
        noted: what is known of one in memory.

    Raises:
        ConfigError: nothing says so, or that model is not where it was.
    """
    name = noted
    if name is None and source:
        with contextlib.suppress(CheckpointError):
            name = origin_of(local_directory(source, "model"))
    told, remedy = f"{arg('teacher', DENSE)}: ", f"name that model's directory or hub id: {arg('teacher', 'DIR')}"
    if name is None:
        raise ConfigError(
            f"{told}{source or 'the model'} has no certificate that names the dense model it was pruned from",
            remedy=remedy,
        )
    try:
        local_directory(name, "teacher")
    except CheckpointError as error:
        where = f"the certificate of {source or 'the model'} names {name}"
        raise ConfigError(f"{told}{where}, which is not there ({error})", remedy=remedy) from error
    return name


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise a ConfigError where a teacher's checkpoint has another tokenizer."""
    try:
        other = load_tokenizer(name)
    except CheckpointError:
        if local_directory(name, "teacher"):  # which says that there is none
            return
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{arg('teacher')} is {name}, which has another tokenizer than the model that learns: pass the dense model "
            f"that it was pruned from"
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many logits a token has."""
    rows = getattr(output_head(model), "out_features", None)
    return rows if isinstance(rows, int) else embedding_rows(model)


def _width(model: nn.Module) -> int | None:
    """Return the width of hidden states."""
    width = getattr(_text_config(model), "hidden_size", None)
    return width if isinstance(width, int) else getattr(input_embedding(model), "embedding_dim", None)
