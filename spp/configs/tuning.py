"""TuneConfig: everything that `tune` and `spp tune` can be told, in one frozen, validated value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from spp.configs.adapter import (
    ACTIVATIONS,
    ALSO_LR,
    DROPOUT_MODES,
    RULES,
    SPPConfig,
    check_also_train,
    parse_ranks,
)
from spp.configs.checks import (
    AUTO_DTYPES,
    DATA_FORMATS,
    LARGEST_SEED,
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_path,
    parse_names,
)
from spp.configs.distillation import Distillation
from spp.configs.methods import FULL_LR, LR, MASK_UPDATE_FIELDS, METHODS, RECIPES, check_methods, recipe_of
from spp.configs.options import ADAPTER, DATA, EVALUATION, MASK_UPDATES, METHOD, MODEL, OPTIMISATION, PST, RUN, Option
from spp.configs.pattern import Pattern
from spp.configs.pruning import BOS_OPTION, DECAYS, DROPS, GROWS, MaskUpdateOptions, own_tokens
from spp.configs.pst import PSTConfig
from spp.errors import ConfigError, arg

SCHEDULES = ("linear", "cosine", "constant")
TRAINING_DEVICES = ("auto", "cpu")

LARGEST_LR = 1e30  # far beyond any sense, and what AdamW makes of it still is a float32


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Distillation):
    """The options of one tuning run; the defaults are the paper's recipe without dropout.

    Options of another method than the run's, and of mask updates where there are none, must keep their defaults.

    Args:
        method: "spp", an adapter on a pruned model, or "pst", which prunes a dense one while it trains (spp.pst).
        data: training file (or several): .txt is plain text; .json, .jsonl, .csv and .parquet hold Alpaca rows
            {"instruction", "input", "output"}, chat rows {"messages": [{"role", "content"}]} or
            {"conversations": [{"from", "value"}]}, {"prompt", "completion"}, or text rows {"text"}
            (spp.data.parsing). A folder or an id on the Hugging Face hub is loaded by `datasets`. "self" or "self:N" is
            text of N tokens, 100,000 without N, that the dense model writes: `dense_model`, else the one that the
            pruned model's certificate names, for PST the model itself.
        output_dir: the run directory: config.json, log.jsonl, eval.json, adapter/, checkpoints/.
        model: directory or hub id of the pruned model, for PST of the dense one; None where `tune` is handed a model.
        data_format: "auto" (by extension and by the fields of the first row), "text", "alpaca" or "chat".
        data_split: split of a hub dataset.
        text_field: field of a row that holds plain text.
        block_length: tokens of a training row; text is packed to exactly this length, instruction rows are cut to it.
        show_rows: log the first rows as they will be learned before training starts (logger spp, level INFO; the
            command prints it): special tokens as they are, what is learned in [+ +].
        completions_only: for instruction data, learn the answers only; False learns prompts too.
        bos: "auto", "always" or "never": whether rows and windows of text begin with a BOS token (spp.data.tokens).
        eval_text: file for the perplexity before and after, text or rows, read as `data` is; None holds back a part of
            the training text.
        eval_fraction: the part of the training data held back when `eval_text` is None, in [0, 1): the last tokens of
            text (at least one window), or rows of instruction data drawn with `seed`. 0 measures no perplexity.
        eval_window: window of the perplexity, in tokens.
        eval_windows: measure at most this many windows; None for all.
        target_modules: None, "all-linear", names, or a regular expression.
        exclude_modules: names, or a regular expression.
        r: SPP: rank of the adapter; see SPPConfig for this and the next five.
        rank_pattern: SPP: {name suffix or regular expression: r}.
        scaling: SPP: s.
        dropout: SPP: probability in [0, 1).
        dropout_mode: SPP: "input" or "alpha".
        rule: SPP: "spp", "full" (every kept weight), "hira" or "masked_lora".
        also_train: SPP: what else trains, out of "norms", "biases" and "head"; see SPPConfig.
        dense_model: SPP: directory or hub id of the dense model, for mask updates and text of its own.
        mask_update_every: SPP: optimizer steps between two mask updates (spp.training.mask_updates); None has none.
            The run then writes the pruned model with its final masks to base/, and the adapter belongs to that.
        mask_update_fraction, mask_update_until, mask_update_decay, mask_update_drop, mask_update_grow: SPP: as
            `fraction`, … in MaskUpdates.
        pattern: PST: what is pruned at the end, "N:M" or a fraction; required.
        initial_sparsity, initial_warmup, final_warmup: PST: as in SparsitySchedule.
        weight_rank, weight_scale, mask_rank, low_rank_scale, structured_scale: PST: as in PSTConfig.
        lr: peak learning rate of AdamW; None is 4e-3 for SPP and 1e-4 for PST, the papers', and 4e-4 for the rule
            "full". SPP's is for
            about 1,200 steps; for some hundred, 2e-2 ends lower.
        also_lr: SPP: peak learning rate of what `also_train` names, which is not decayed; None is 1e-3.
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
            None takes it at once, or 256 with a teacher. Less memory, the same values up to the order of summation.
        teacher, teacher_bits, teacher_cache, ce_weight, kl_weight, temperature, hidden_weight: as in Distillation
            (spp.configs.distillation); a teacher in memory is an argument of `tune`.
        saved_activations: "full", or "bfloat16": layers keep float32 inputs rounded for backward. Less memory; see
            spp.wrapping.wrap for what the gradients lose.
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
            warning (spp.weights.base_values); PST always refuses.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> TuneConfig(model="pruned", data="train.txt", output_dir="run", steps=100).lr
        0.004
        >>> TuneConfig.from_recipe("paper", model="pruned", data="alpaca.json", output_dir="run").dropout
        0.05
    """

    model: Annotated[
        str | os.PathLike[str] | None,
        Option("Directory or hub id of the pruned model; for PST, of the dense one.", argument=True, required=True),
    ] = None
    output_dir: Annotated[
        str | os.PathLike[str],
        Option("Run directory: config, log, checkpoints, adapter, perplexities.", type=Path, argument=True),
    ]
    dtype: Annotated[str, Option("auto, float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)] = "auto"
    device: Annotated[str, Option("auto or cpu.", MODEL, choices=TRAINING_DEVICES)] = "auto"
    bf16: Annotated[bool, Option("Compute under bfloat16 autocast.", MODEL, negatable=True)] = False
    target_modules: Annotated[
        str | tuple[str, ...] | None,
        Option("Names, a regular expression or all-linear; may be repeated.", MODEL, many=True, parse=parse_names),
    ] = None
    exclude_modules: Annotated[
        str | tuple[str, ...] | None,
        Option("Names or a regular expression to leave alone.", MODEL, many=True, parse=parse_names),
    ] = None
    method: Annotated[
        str, Option("spp, or pst, which prunes a dense model while it trains.", METHOD, choices=METHODS)
    ] = "spp"
    data: Annotated[
        str | os.PathLike[str] | tuple[str | os.PathLike[str], ...],
        Option(
            ".txt, or text, Alpaca, chat or prompt and completion rows (.json, .jsonl, .csv, .parquet), or a folder or "
            "hub id of a dataset; may be repeated. self[:N]: N tokens of text that the dense model writes.",
            DATA,
            many=True,
            parse=tuple,
        ),
    ]
    data_format: Annotated[str, Option("auto, text, alpaca or chat.", DATA, choices=DATA_FORMATS)] = "auto"
    data_split: Annotated[str, Option("Split of a hub dataset.", DATA)] = "train"
    text_field: Annotated[str, Option("Field of a row with plain text.", DATA)] = "text"
    block_length: Annotated[int, Option("Tokens of a training row.", DATA)] = 512
    completions_only: Annotated[bool, Option("Learn the answers only, not the prompts.", DATA, negatable=True)] = True
    bos: Annotated[str, BOS_OPTION] = "auto"
    show_rows: Annotated[
        int, Option("Print the first rows as they will be learned, what is learned in [+ +], then train.", DATA)
    ] = 0
    r: Annotated[int, Option("SPP: rank of the adapter.", ADAPTER)] = SPPConfig.r
    rank_pattern: Annotated[
        Mapping[str, int] | None,
        Option(
            "SPP: rank of layers by name suffix or regular expression, such as lm_head=4; may be repeated.",
            ADAPTER,
            metavar="NAME=R",
            type=str,
            many=True,
            parse=parse_ranks,
        ),
    ] = None
    scaling: Annotated[float, Option("SPP: factor s of the adapter.", ADAPTER)] = SPPConfig.scaling
    dropout: Annotated[float, Option("SPP: dropout probability.", ADAPTER)] = SPPConfig.dropout
    dropout_mode: Annotated[str, Option("SPP: input or alpha.", ADAPTER, choices=DROPOUT_MODES)] = (
        SPPConfig.dropout_mode
    )
    rule: Annotated[
        str,
        Option(
            "SPP: spp, full (every kept weight), hira (--r 8 --scaling 1) or masked_lora (--r 8).",
            ADAPTER,
            choices=RULES,
        ),
    ] = SPPConfig.rule
    also_train: Annotated[
        str | tuple[str, ...],
        Option(
            "SPP: what else trains: norms, biases or head; may be repeated.",
            ADAPTER,
            default="nothing",
            many=True,
            parse=check_also_train,
        ),
    ] = ()
    saved_activations: Annotated[
        str,
        Option(
            "SPP: how inputs are saved for backward: full, or bfloat16 at half the memory.",
            ADAPTER,
            choices=ACTIVATIONS,
        ),
    ] = "full"
    steps: Annotated[int | None, Option("Optimizer steps.", OPTIMISATION, default="as many as --epochs has")] = None
    epochs: Annotated[float, Option("Passes over the data.", OPTIMISATION)] = 1.0
    lr: Annotated[
        float | None,
        Option(
            "Peak learning rate.",
            OPTIMISATION,
            default=f"SPP's {LR['spp']}, for some 1,200 steps; PST's {LR['pst']}; --rule full's {FULL_LR}",
        ),
    ] = None
    also_lr: Annotated[
        float | None, Option("SPP: peak learning rate of what else trains.", OPTIMISATION, default=f"{ALSO_LR:g}")
    ] = None
    batch_size: Annotated[int, Option("Rows of one forward pass.", OPTIMISATION)] = 4
    gradient_accumulation: Annotated[int, Option("Forward passes of a step.", OPTIMISATION)] = 1
    gradient_checkpointing: Annotated[
        bool, Option("Recompute activations: less memory, more time.", OPTIMISATION, negatable=True)
    ] = False
    loss_chunk: Annotated[
        int | None,
        Option("Take the loss over so many tokens at a time: less memory.", OPTIMISATION, default="all, or 256"),
    ] = None
    schedule: Annotated[str, Option("linear, cosine or constant.", OPTIMISATION, choices=SCHEDULES)] = "linear"
    warmup_ratio: Annotated[float, Option("Share of the steps that warm up; the first has lr 0.", OPTIMISATION)] = 0.03
    weight_decay: Annotated[float, Option("AdamW's weight decay.", OPTIMISATION)] = 0.001
    max_grad_norm: Annotated[float, Option("Clip the gradient to this norm; 0 does not clip.", OPTIMISATION)] = 1.0
    eval_text: Annotated[
        str | os.PathLike[str] | None,
        Option("Text for the perplexity before and after.", EVALUATION, type=Path, default="held out from the data"),
    ] = None
    eval_fraction: Annotated[float, Option("Share of the data held out.", EVALUATION)] = 0.05
    eval_window: Annotated[int, Option("Window of the perplexity.", EVALUATION, name="--window")] = 512
    eval_windows: Annotated[int | None, Option("Measure the first windows only.", EVALUATION, default="all")] = None
    seed: Annotated[int, Option("Of initial values, data order and dropout.", RUN)] = 0
    log_every: Annotated[int, Option("Steps between two lines of log.jsonl.", RUN)] = 1
    save_every: Annotated[int | None, Option("Steps between two checkpoints.", RUN)] = 100
    save_limit: Annotated[int, Option("Checkpoints to keep.", RUN)] = 2
    progress: Annotated[bool | None, Option("Show a progress bar.", RUN, default="on a terminal", negatable=True)] = (
        None
    )
    overwrite: Annotated[bool, Option("Replace an earlier run in the directory.", RUN)] = False
    resume: Annotated[bool, Option("Continue the run in the directory.", RUN)] = False
    strict_values: Annotated[
        bool,
        Option(
            "SPP: do not resume on a base with other values than the checkpoint was trained on.", RUN, name="--strict"
        ),
    ] = False
    mask_update_every: Annotated[
        int | None,
        Option("SPP: steps between two updates of the masks.", MASK_UPDATES, default="the masks stay"),
    ] = None
    dense_model: Annotated[
        str | os.PathLike[str] | None,
        Option("Directory or hub id of the dense model: mask updates need it, and data of its own.", MASK_UPDATES),
    ] = None
    mask_update_fraction: Annotated[
        float, Option("Share of kept weights that the first update exchanges.", MASK_UPDATES)
    ] = MaskUpdateOptions.fraction
    mask_update_until: Annotated[float, Option("Part of the steps after which masks stay.", MASK_UPDATES)] = (
        MaskUpdateOptions.until
    )
    mask_update_decay: Annotated[
        str, Option("How that share shrinks: cosine or cubic.", MASK_UPDATES, choices=tuple(DECAYS))
    ] = MaskUpdateOptions.decay
    mask_update_drop: Annotated[
        str, Option("Prune those of the lowest activation or magnitude.", MASK_UPDATES, choices=DROPS)
    ] = MaskUpdateOptions.drop
    mask_update_grow: Annotated[
        str, Option("Regrow those of the highest gradient or saliency.", MASK_UPDATES, choices=GROWS)
    ] = MaskUpdateOptions.grow
    pattern: Annotated[
        str | float | None,
        Option("PST: the final pattern, N:M (N kept of every M) or a fraction; required with --method pst.", PST),
    ] = None
    initial_sparsity: Annotated[float, Option("PST: fraction pruned at the start.", PST)] = 0.0
    initial_warmup: Annotated[float, Option("PST: share of the steps before pruning begins.", PST)] = 0.1
    final_warmup: Annotated[float, Option("PST: share of the steps at the final sparsity.", PST)] = 0.3
    weight_rank: Annotated[int, Option("PST: rank of the weight's update.", PST)] = PSTConfig.weight_rank
    weight_scale: Annotated[float, Option("PST: factor of that update.", PST)] = PSTConfig.weight_scale
    mask_rank: Annotated[int, Option("PST: rank of the importance.", PST)] = PSTConfig.mask_rank
    low_rank_scale: Annotated[float, Option("PST: factor of the low-rank importance.", PST)] = PSTConfig.low_rank_scale
    structured_scale: Annotated[float, Option("PST: factor of the structured importance.", PST)] = (
        PSTConfig.structured_scale
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, METHODS)
        self._normalise_paths()
        object.__setattr__(self, "also_train", check_also_train(self.also_train))
        check_methods(self)
        if self.lr is None:
            object.__setattr__(self, "lr", FULL_LR if self.rule == "full" else LR[self.method])
        self._check_choices()
        self._check_numbers()
        for name in ("completions_only", "gradient_checkpointing", "bf16", "overwrite", "resume", "strict_values"):
            check_flag(name, getattr(self, name))
        if self.progress is not None and not isinstance(self.progress, bool):
            raise ConfigError(f"{arg('progress')} is {self.progress!r}; it must be True, False or None")
        if self.overwrite and self.resume:
            raise ConfigError(
                f"{arg('overwrite', True)} and {arg('resume', True)} exclude each other; choose to replace the earlier "
                f"run or to continue it"
            )
        adapter = self.adapter_config() if self.method == "spp" else self.pst_config()  # raises for r, scaling, …
        if self.rule not in RULES:
            raise ConfigError(f"there is no rule {self.rule!r}; known: {', '.join(sorted(RULES))}", option="rule")
        if self.rank_pattern is not None:
            object.__setattr__(self, "rank_pattern", dict(sorted(self.rank_pattern.items())))
        object.__setattr__(self, "target_modules", adapter.target_modules)
        object.__setattr__(self, "exclude_modules", adapter.exclude_modules)

    def _check_choices(self) -> None:
        check_choice("data_format", self.data_format, DATA_FORMATS)
        check_choice("bos", self.bos, BOS_OPTION.choices)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, AUTO_DTYPES)
        check_choice("device", self.device, TRAINING_DEVICES)
        check_choice("saved_activations", self.saved_activations, ACTIVATIONS)
        for name in ("data_split", "text_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{arg(name)} is {getattr(self, name)!r}; it must be a name")

    def _check_numbers(self) -> None:
        for name in ("block_length", "eval_window"):
            check_int(name, getattr(self, name), least=2)  # one token is no prediction
        for name in ("batch_size", "gradient_accumulation", "log_every", "save_limit"):
            check_int(name, getattr(self, name), least=1)
        for name in ("eval_windows", "steps", "save_every", "loss_chunk"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least=1)
        check_int("seed", self.seed, least=0, most=LARGEST_SEED)
        check_int("show_rows", self.show_rows, least=0)
        for name in ("lr", "also_lr") if self.also_lr is not None else ("lr",):
            check_number(name, getattr(self, name), above=0.0, most=LARGEST_LR)
        check_number("epochs", self.epochs, above=0.0)
        for name in ("weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), least=0.0)
        for name in ("eval_fraction", "warmup_ratio"):
            check_number(name, getattr(self, name), least=0.0, below=1.0)

    @property
    def data_files(self) -> tuple[str, ...]:
        """`data`, which always is a tuple of str once the config is made."""
        assert isinstance(self.data, tuple)
        return tuple(map(str, self.data))

    @property
    def own_tokens(self) -> int | None:
        """Tokens that the dense model writes to tune on; None where data is read."""
        return own_tokens(self.data_files[0])

    @property
    def final_sparsity(self) -> float:
        """The fraction that PST prunes at the end."""
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

    def mask_updates(self) -> MaskUpdateOptions:
        """Return the options of mask updates, of a run that has them."""
        assert self.mask_update_every is not None
        return MaskUpdateOptions(
            **{name.removeprefix("mask_update_"): getattr(self, name) for name in MASK_UPDATE_FIELDS}
        )

    def adapter_config(self) -> SPPConfig:
        """Return the options of SPP's adapter; its initial values are drawn from `seed`."""
        return SPPConfig(
            r=self.r,
            rank_pattern=self.rank_pattern,
            scaling=self.scaling,
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
            rule=self.rule,
            also_train=self.also_train,
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
    def from_recipe(
        cls,
        recipe: Annotated[
            str,
            Option(
                "default, paper (SPP: dropout 0.05; PST: no decay, no warm-up), short (SPP: lr 2e-2; PST: lr 1e-3), "
                "best (every kept weight, taught by the dense model and the text) or lean (HiRA's form, taught so); "
                "other options override it.",
                METHOD,
                choices=tuple(RECIPES),
            ),
        ] = "default",
        **options: Any,
    ) -> TuneConfig:
        """Build a config from a recipe's values and the `options` that override them.

        Args:
            recipe: of the method that the options name (RECIPES, PST_RECIPES): "default", "paper", or for some
                hundred steps "short", "best" and "lean".
            options: fields of this class.
        """
        return cls.from_dict({**recipe_of(recipe, options.get("method", "spp")), **options})

    def _normalise_paths(self) -> None:
        files = self.data if isinstance(self.data, (tuple, list)) else (self.data,)
        if not files:
            raise ConfigError(f"{arg('data')} is empty; give at least one file or hub id")
        object.__setattr__(self, "data", tuple(check_path("data", f) for f in files))
        own = [name for name in self.data_files if own_tokens(name) is not None]
        if own and len(files) > 1:
            raise ConfigError(
                f"{arg('data')} has {own[0]} beside {len(files) - 1} others: what a model writes stands alone"
            )
        object.__setattr__(self, "output_dir", check_path("output_dir", self.output_dir))
        for name in ("model", "eval_text", "dense_model"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_path(name, getattr(self, name)))
