"""TuneConfig: everything that `tune` and `spp tune` can be told, in one frozen, validated value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spp.config import SPPConfig
from spp.errors import ConfigError
from spp.kernels import check_saved_activations
from spp.patterns import Pattern
from spp.pst import PSTConfig
from spp.pst.schedule import check_schedule
from spp.rules import get_rule
from spp.training.checks import check_choice, check_int, check_number, check_path
from spp.training.mask_options import check_mask_updates
from spp.training.recipes import recipe_of

METHODS = ("spp", "pst")
DATA_FORMATS = ("auto", "text", "alpaca", "chat")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
DEVICES = ("auto", "cpu")

LR = {"spp": 4e-3, "pst": 1e-4}  # the papers'
LARGEST_LR = 1e30  # far beyond any sense, and what AdamW makes of it still is a float32
# Options that one method alone has.
_OWN = {
    "spp": ("r", "scaling", "dropout", "dropout_mode", "rule", "saved_activations", "strict_values"),
    "pst": (
        *("pattern", "initial_sparsity", "initial_warmup", "final_warmup"),
        *("weight_rank", "weight_scale", "mask_rank", "low_rank_scale", "structured_scale"),
    ),
}
_MASK_UPDATES = tuple(f"mask_update_{name}" for name in ("every", "fraction", "until", "decay", "drop", "grow"))


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The options of one tuning run; the defaults are the paper's recipe without dropout.

    Options of another method than the run's, and of mask updates where there are none, must keep their defaults.

    Args:
        method: "spp", an adapter on a pruned model, or "pst", which prunes a dense one while it trains (spp.pst).
        data: training file (or several): .txt is plain text, .json / .jsonl holds Alpaca rows
            {"instruction", "input", "output"}, chat rows {"messages": [{"role", "content"}]} or
            {"conversations": [{"from", "value"}]}, or text rows {"text"}. Anything else is an id on the Hugging Face
            hub and is loaded by `datasets`.
        output_dir: the run directory: config.json, log.jsonl, eval.json, adapter/, checkpoints/.
        model: directory or hub id of the pruned model, for PST of the dense one; None where `tune` is handed a model.
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
        target_modules: None, "all-linear", names, or a regular expression.
        exclude_modules: names, or a regular expression.
        r: SPP: rank of the adapter; see SPPConfig for this and the next four.
        scaling: SPP: s.
        dropout: SPP: probability in [0, 1).
        dropout_mode: SPP: "input" or "alpha".
        rule: SPP: "spp", or a peer's, "hira" or "masked_lora".
        dense_model: SPP: directory or hub id of the dense model, for mask updates.
        mask_update_every: SPP: optimizer steps between two mask updates (spp.training.mask_updates); None has none.
            The run then writes the pruned model with its final masks to base/, and the adapter belongs to that.
        mask_update_fraction, mask_update_until, mask_update_decay, mask_update_drop, mask_update_grow: SPP: as
            `fraction`, … in MaskUpdates.
        pattern: PST: what is pruned at the end, "N:M" or a fraction; required.
        initial_sparsity, initial_warmup, final_warmup: PST: as in SparsitySchedule.
        weight_rank, weight_scale, mask_rank, low_rank_scale, structured_scale: PST: as in PSTConfig.
        lr: peak learning rate of AdamW; None is the method's, 4e-3 for SPP and 1e-4 for PST, the papers'. SPP's is for
            about 1,200 steps; for some hundred, 2e-2 ends lower.
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
        seed: of the initial values, the order of the data and dropout.
        log_every: steps between two lines of log.jsonl.
        save_every: steps between two checkpoints; None saves only at the end and on interruption.
        save_limit: complete checkpoints to keep, at least 1.
        overwrite: replace an earlier run in `output_dir`.
        resume: continue the run in `output_dir` from its last complete checkpoint; start it if there is none.
        strict_values: SPP: refuse to resume on a base with other values than the checkpoint was trained on, instead of
            warning (spp.base_values); PST always refuses.
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
    method: str = "spp"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    r: int = 16
    scaling: float = 2.0
    dropout: float = 0.0
    dropout_mode: str = "input"
    rule: str = "spp"
    dense_model: str | os.PathLike[str] | None = None
    mask_update_every: int | None = None
    mask_update_fraction: float = 0.1
    mask_update_until: float = 0.75
    mask_update_decay: str = "cosine"
    mask_update_drop: str = "activation"
    mask_update_grow: str = "gradient"
    pattern: str | float | None = None
    initial_sparsity: float = 0.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3
    weight_rank: int = 8
    weight_scale: float = 1.0
    mask_rank: int = 8
    low_rank_scale: float = 1.0
    structured_scale: float = 1.0
    lr: float | None = None
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
    strict_values: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        self._normalise_paths()
        self._check_methods()
        if self.lr is None:
            object.__setattr__(self, "lr", LR[self.method])
        check_choice("data_format", self.data_format, DATA_FORMATS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, DEVICES)
        for name in ("data_split", "text_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a name")
        for name in ("block_length", "eval_window"):
            check_int(name, getattr(self, name), least=2)  # one token is no prediction
        for name in ("batch_size", "gradient_accumulation", "log_every", "save_limit"):
            check_int(name, getattr(self, name), least=1)
        check_saved_activations(self.saved_activations)
        for name in ("eval_windows", "steps", "save_every", "loss_chunk"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least=1)
        check_int("seed", self.seed, least=0)
        check_number("lr", self.lr, above=0.0, most=LARGEST_LR)
        check_number("epochs", self.epochs, above=0.0)
        for name in ("weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), least=0.0)
        for name in ("eval_fraction", "warmup_ratio"):
            check_number(name, getattr(self, name), least=0.0, below=1.0)
        for name in ("completions_only", "gradient_checkpointing", "bf16", "overwrite", "resume", "strict_values"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise ConfigError(f"progress is {self.progress!r}; it must be True, False or None")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume are both True; choose to replace the earlier run or to continue it")
        adapter = self.adapter_config() if self.method == "spp" else self.pst_config()  # raises for r, scaling, …
        get_rule(self.rule)
        object.__setattr__(self, "target_modules", adapter.target_modules)
        object.__setattr__(self, "exclude_modules", adapter.exclude_modules)

    @property
    def data_files(self) -> tuple[str, ...]:
        """`data`, which always is a tuple of str once the config is made."""
        assert isinstance(self.data, tuple)
        return tuple(map(str, self.data))

    @property
    def final_sparsity(self) -> float:
        """What PST prunes at the end, as a fraction."""
        assert self.pattern is not None
        return Pattern.parse(self.pattern).sparsity

    @property
    def learning_rate(self) -> float:
        """`lr`, which always is a number once the config is made."""
        assert self.lr is not None
        return self.lr

    def pst_config(self) -> PSTConfig:
        """Return the options of PST's layers; their initial values are drawn from `seed`."""
        assert self.pattern is not None
        pattern = Pattern.parse(self.pattern)
        return PSTConfig(
            weight_rank=self.weight_rank,
            weight_scale=self.weight_scale,
            mask_rank=self.mask_rank,
            low_rank_scale=self.low_rank_scale,
            structured_scale=self.structured_scale,
            pattern=str(pattern) if pattern.is_nm else None,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            seed=self.seed,
        )

    def adapter_config(self) -> SPPConfig:
        """Return the options of SPP's adapter; its initial values are drawn from `seed`."""
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
            recipe: of the method that the options name (spp.training.recipes): "default", "paper" or "short", for
                some hundred steps.
            options: fields of this class.
        """
        return cls.from_dict({**recipe_of(recipe, options.get("method", "spp")), **options})

    def _normalise_paths(self) -> None:
        files = self.data if isinstance(self.data, (tuple, list)) else (self.data,)
        if not files:
            raise ConfigError("data is empty; give at least one file or hub id")
        object.__setattr__(self, "data", tuple(check_path("data", f) for f in files))
        object.__setattr__(self, "output_dir", check_path("output_dir", self.output_dir))
        for name in ("model", "eval_text", "dense_model"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_path(name, getattr(self, name)))

    def _check_methods(self) -> None:
        """Check the options that one method alone has: that they are its, and make sense."""
        defaults = {f.name: f.default for f in fields(self)}
        others = {name: method for method in METHODS if method != self.method for name in _OWN[method]}
        if self.method != "spp":
            others |= dict.fromkeys((*_MASK_UPDATES, "dense_model"), "spp")
        for name, method in others.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which means nothing to method={self.method!r}: it is an "
                    f"option of method={method!r}"
                )
        if self.method == "pst":
            if self.pattern is None:
                raise ConfigError('pattern= is missing: PST needs what to prune at the end, "N:M" or a fraction')
            object.__setattr__(self, "pattern", str(Pattern.parse(self.pattern)))
            check_schedule(self.initial_warmup, self.final_warmup, self.initial_sparsity, self.final_sparsity)
        elif self.mask_update_every is None:
            for name in (*_MASK_UPDATES, "dense_model"):
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, but there are no mask updates without mask_update_every="
                    )
        else:
            check_mask_updates(*(getattr(self, name) for name in _MASK_UPDATES))
            if self.dense_model is None:
                raise ConfigError("dense_model= is missing: mask updates take the values of regrown weights from there")
