"""TuneConfig: everything that `tune` and `spp tune` can be told, in one frozen, validated value."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spp.config import SPPConfig
from spp.errors import ConfigError
from spp.kernels import check_saved_activations
from spp.rules import get_rule

DATA_FORMATS = ("auto", "text", "alpaca", "chat")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
DEVICES = ("auto", "cpu")

# What a recipe sets; whatever it does not name keeps the default of its field.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # SPP, Lu et al. 2024, its instruction-tuning setting without dropout: three matrix products a layer, not five.
    "default": {},
    # The same with the paper's dropout.
    "paper": {"dropout": 0.05, "dropout_mode": "input"},
    # For some hundred steps: the paper's learning rate is meant for about 1,200 and is too low for so few.
    "short": {"lr": 2e-2},
}


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The options of one tuning run; the defaults are the paper's recipe without dropout.

    Args:
        data: training file (or several): .txt is plain text, .json / .jsonl holds Alpaca rows
            {"instruction", "input", "output"}, chat rows {"messages": [{"role", "content"}]} or
            {"conversations": [{"from", "value"}]}, or text rows {"text"}. Anything else is an id on the Hugging Face
            hub and is loaded by `datasets`.
        output_dir: the run directory: config.json, log.jsonl, eval.json, adapter/, checkpoints/.
        model: directory or hub id of the pruned model; None where `tune` is handed a model.
        data_format: "auto" (by extension and by the fields of the first row), "text", "alpaca" or "chat".
        data_split: split of a hub dataset.
        text_field: field of a row that holds plain text.
        block_length: tokens of a training row; text is packed to exactly this length, instruction rows are cut to it.
        completions_only: for instruction data, learn the answers only; False learns prompts too.
        eval_text: plain-text file for the perplexity before and after; None holds back a part of the training text.
        eval_fraction: the part of the training data held back when `eval_text` is None, in [0, 1): the last tokens of
            text (at least one window), or rows of instruction data drawn with `seed`. 0 measures no perplexity.
        eval_window: window of the perplexity, in tokens.
        eval_windows: measure at most this many windows; None for all.
        r: rank of the adapter; see SPPConfig for this and the next six.
        scaling: s.
        dropout: probability in [0, 1).
        dropout_mode: "input" or "alpha".
        rule: "spp", "hira" or "masked_lora".
        target_modules: None, "all-linear", names, or a regular expression.
        exclude_modules: names, or a regular expression.
        lr: peak learning rate of AdamW. The paper's 4e-3 is for about 1,200 steps; for some hundred, 2e-2 ends lower.
        weight_decay: AdamW's decoupled weight decay.
        warmup_ratio: part of the steps in which the learning rate rises linearly, in [0, 1).
        schedule: "linear" (to zero), "cosine" (to zero) or "constant" after the warm-up.
        max_grad_norm: clip the gradient to this norm; 0 does not clip.
        epochs: passes over the data; may be a fraction. Unused where `steps` is given.
        steps: optimizer steps; None runs `epochs`.
        batch_size: rows of one forward pass.
        gradient_accumulation: forward passes of one optimizer step.
        gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
        loss_chunk: take the loss over so many tokens at a time, so that the logits of a batch never exist together;
            None takes it at once. Less memory, the same values up to the order of summation.
        saved_activations: "full", or "bfloat16": layers keep float32 inputs rounded for backward. Less memory; see
            spp.inject_activations for what the gradients lose.
        dtype: dtype to load the model in; "auto" is the checkpoint's own.
        bf16: autocast to bfloat16.
        device: "auto" (an accelerator where there is one) or "cpu".
        seed: of the adapter's initial values, the order of the data and dropout.
        log_every: steps between two lines of log.jsonl.
        save_every: steps between two checkpoints; None saves only at the end and on interruption.
        save_limit: complete checkpoints to keep, at least 1.
        overwrite: replace an earlier run in `output_dir`.
        resume: continue the run in `output_dir` from its last complete checkpoint; start it if there is none.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> TuneConfig(model="pruned", data="train.txt", output_dir="run", steps=100).lr
        0.004
        >>> TuneConfig.from_recipe("paper", model="pruned", data="alpaca.json", output_dir="run").dropout
        0.05
    """

    data: str | os.PathLike[str] | tuple[str | os.PathLike[str], ...]
    output_dir: str | os.PathLike[str]
    model: str | os.PathLike[str] | None = None
    data_format: str = "auto"
    data_split: str = "train"
    text_field: str = "text"
    block_length: int = 512
    completions_only: bool = True
    eval_text: str | os.PathLike[str] | None = None
    eval_fraction: float = 0.05
    eval_window: int = 512
    eval_windows: int | None = None
    r: int = 16
    scaling: float = 2.0
    dropout: float = 0.0
    dropout_mode: str = "input"
    rule: str = "spp"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    lr: float = 4e-3
    weight_decay: float = 0.001
    warmup_ratio: float = 0.03
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    loss_chunk: int | None = None
    saved_activations: str = "full"
    dtype: str = "auto"
    bf16: bool = False
    device: str = "auto"
    seed: int = 0
    log_every: int = 1
    save_every: int | None = 100
    save_limit: int = 2
    overwrite: bool = False
    resume: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        self._normalise_paths()
        _check_choice("data_format", self.data_format, DATA_FORMATS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("device", self.device, DEVICES)
        for name in ("data_split", "text_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a name")
        for name in ("block_length", "eval_window"):
            _check_int(name, getattr(self, name), least=2)  # one token is no prediction
        for name in ("batch_size", "gradient_accumulation", "log_every", "save_limit"):
            _check_int(name, getattr(self, name), least=1)
        check_saved_activations(self.saved_activations)
        for name in ("eval_windows", "steps", "save_every", "loss_chunk"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), least=1)
        _check_int("seed", self.seed, least=0)
        for name in ("lr", "epochs"):
            _check_number(name, getattr(self, name), above=0.0)
        for name in ("weight_decay", "max_grad_norm"):
            _check_number(name, getattr(self, name), least=0.0)
        for name in ("eval_fraction", "warmup_ratio"):
            _check_number(name, getattr(self, name), least=0.0, below=1.0)
        for name in ("completions_only", "gradient_checkpointing", "bf16", "overwrite", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise ConfigError(f"progress is {self.progress!r}; it must be True, False or None")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume are both True; choose to replace the earlier run or to continue it")
        adapter = self.adapter_config()  # raises for r, scaling, dropout, …
        get_rule(self.rule)
        object.__setattr__(self, "target_modules", adapter.target_modules)
        object.__setattr__(self, "exclude_modules", adapter.exclude_modules)

    @property
    def data_files(self) -> tuple[str, ...]:
        """`data`, which always is a tuple of str once the config is made."""
        assert isinstance(self.data, tuple)
        return tuple(map(str, self.data))

    def adapter_config(self) -> SPPConfig:
        """Return the options of the adapter; its initial values are drawn from `seed`."""
        return SPPConfig(
            r=self.r,
            scaling=self.scaling,
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
            rule=self.rule,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneConfig:
        """Build a config from `to_dict`'s values; an unknown field is a ConfigError that names it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown tuning options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**options)

    @classmethod
    def from_recipe(cls, recipe: str = "default", **options: Any) -> TuneConfig:
        """Build a config from a recipe's values and the `options` that override them.

        Args:
            recipe: "default" (the paper's, dropout 0), "paper" (dropout 0.05 on the input) or "short" (lr 2e-2, for
                some hundred steps).
            options: fields of this class.
        """
        if recipe not in RECIPES:
            raise ConfigError(f"recipe is {recipe!r}; known: {', '.join(RECIPES)}")
        return cls.from_dict({**RECIPES[recipe], **options})

    def _normalise_paths(self) -> None:
        files = self.data if isinstance(self.data, (tuple, list)) else (self.data,)
        if not files:
            raise ConfigError("data is empty; give at least one file or hub id")
        object.__setattr__(self, "data", tuple(_path("data", f) for f in files))
        object.__setattr__(self, "output_dir", _path("output_dir", self.output_dir))
        for name in ("model", "eval_text"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _path(name, getattr(self, name)))


def _path(name: str, value: object) -> str:
    if not isinstance(value, (str, Path, os.PathLike)) or not os.fspath(value):
        raise ConfigError(f"{name} is {value!r}; it must be a path or an id")
    return str(os.fspath(value))


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")


def _check_int(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be an int of at least {least}")


def _check_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", least), ("above", above), ("below", below))
        if bound is not None
    ]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not isinstance(value, (int, float))
        or not number
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number {' and '.join(bounds)}")
