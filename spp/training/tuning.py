"""tune: the whole recipe on a model, from files to a final adapter and its perplexities."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from spp.certifying.save import origin_of
from spp.configs.tuning import TuneConfig
from spp.data.encoding import read_tokens
from spp.data.reading import file_facts
from spp.data.tokens import cut_windows, find_bos
from spp.distributed.ranks import is_first, world
from spp.distributed.sums import ending_all, gathered, of_first, together
from spp.errors import CheckpointError, ConfigError, DataError, SPPWarning, WrapError, arg, call
from spp.evaluation import PerplexityResult, rows_perplexity, token_perplexity, with_provenance
from spp.files.formats import other_weights, pickled, stored_format
from spp.files.hub import local_directory
from spp.files.provenance import peak_bytes
from spp.files.tables import Table, time_text
from spp.models.streamed import trim_memory
from spp.models.tokens import check_ids, check_length
from spp.pruning.own_text import own_windows
from spp.pruning.plan import tell_patterns
from spp.training.adapter_trainer import AdapterTrainer
from spp.training.callbacks import LogFile, ProgressBar, StopOnSignal, TrainingInterrupted
from spp.training.checkpoints import last_complete
from spp.training.data import (
    DataSummary,
    TokenRows,
    TrainingData,
    batches,
    check_data,
    load_data,
    own_data,
    shown_rows,
    tokens_sha256,
)
from spp.training.loading import load_model, load_tokenizer
from spp.training.methods import Method, method_of
from spp.training.run_directory import RunDirectory
from spp.training.teacher import Teacher, find_teacher
from spp.wrapping.wrap import is_wrapped

logger = logging.getLogger(__name__)

_EVAL_TOKENS = 2048  # tokens of one forward pass of the perplexity: bounds its logits


@dataclass(frozen=True)
class TuneResult:
    """The result of a tuning run.

    Args:
        model: the tuned model, still wrapped: `spp.merge(result.model)` merges it; one that PST trained,
            `spp.pst.convert(result.model)` makes plain.
        tokenizer: its tokenizer.
        run_dir: the run directory.
        adapter_dir: the final adapter in it, or what PST trained.
        base_dir: after mask updates, the pruned model with its final masks, which the adapter belongs to; else None.
        perplexity_before: of the given model on the held-out text; None where none is measured.
        perplexity_after: of the tuned model on the same.
        eval_window: the window of both; None where instruction rows were measured, on the tokens to be learned.
        measured_on: what both were measured on: hashes of the text, the tokenizer and the tuned model, tokens, windows,
            BOS, protocol, dtype, versions; empty where nothing was measured.
        steps: optimizer steps of the whole run.
        seconds: time spent in them.
        sparsity: fraction of zeros in the tuned layers, in [0, 1]; of PST what its masks prune.
        data: what became of the training data.
        without_effect: a sentence that says why the adapter changes no weight, if it changes none: it learned nothing,
            or rounding to the model's dtype takes all of it.
    """

    model: Any
    tokenizer: Any
    run_dir: Path
    adapter_dir: Path
    base_dir: Path | None
    perplexity_before: float | None
    perplexity_after: float | None
    eval_window: int | None
    steps: int
    seconds: float
    sparsity: float
    data: DataSummary
    without_effect: str | None = None
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model and the tokenizer as JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "tokenizer", "data")}
        values |= {"run_dir": str(self.run_dir), "adapter_dir": str(self.adapter_dir), "data": self.data.to_dict()}
        values["base_dir"] = None if self.base_dir is None else str(self.base_dir)
        return values

    def table(self) -> Table:
        """Return the perplexities, steps, time and sparsity as a table."""
        columns = ("perplexity before", "after", "window", "steps", "time", "sparsity")
        measured = ["–" if p is None else f"{p:.4f}" for p in (self.perplexity_before, self.perplexity_after)]
        window = "rows" if self.eval_window is None else str(self.eval_window)
        row = (*measured, window, str(self.steps), time_text(self.seconds), f"{self.sparsity:.4f}")
        return Table("tuned", columns, (row,))

    def _repr_html_(self) -> str:
        """Return the table, for notebooks."""
        return self.table().html()


def tune(config: TuneConfig, *, model: Any = None, tokenizer: Any = None, teacher: Any = None) -> TuneResult:
    """Tune a model and write a run directory (config.json, log.jsonl, checkpoints/, adapter/, eval.json).

    Args:
        config: all options; `config.model` names what to load, unless a model is given.
        model: a causal language model in memory, pruned (for PST, dense), not wrapped; it comes back wrapped and tuned
            in the result, or as it was if anything fails. Goes with `tokenizer`.
        tokenizer: its tokenizer.
        teacher: a causal language model in memory to learn from too, in place of `config.teacher`; it stays as it is.

    Returns:
        The tuned model, still wrapped, and the results of the run; a warning if the adapter changes no weight.

    Raises:
        ConfigError: options contradict each other, or those of the run that is resumed; or a teacher does not fit.
        DataError: the data is missing, malformed or too short; nothing has been written then.
        CheckpointError: the model cannot be loaded.
        OutputExistsError: the run directory holds something already.
        OutputError: another process is at work there, or it cannot be written.
        NonFiniteError: training diverged.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint to resume from was saved first.

    Example:
        >>> config = TuneConfig(data="train.txt", output_dir="run", steps=100, lr=2e-2)  # doctest: +SKIP
        >>> result = tune(config, model=pruned, tokenizer=tokenizer)  # doctest: +SKIP
        >>> spp.merge(result.model)  # doctest: +SKIP
    """
    _check_model(config, model, tokenizer)
    config.require_weights(any(one is not None for one in (teacher, config.teacher, config.teacher_cache)))
    if model is None:
        _check_base(local_directory(str(config.model), "model"))
    if config.pattern is not None:
        tell_patterns(config.pattern)
    with together(), RunDirectory(config) as run:
        return _tune(config, run, model, tokenizer, teacher)


def _tune(config: TuneConfig, run: RunDirectory, model: Any, tokenizer: Any, teacher: Any) -> TuneResult:
    with together():
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(config.model))
        data = _load_data(config, tokenizer, model)
        for number, row in enumerate(shown_rows(data, tokenizer, config.show_rows), start=1):
            logger.info("row %d, what is learned in [+ +]: %s", number, row)
        measure = _Measure(config, tokenizer, data)
        model = model if model is not None else load_model(str(config.model), config.dtype)
        _check_tokens(config, model, tokenizer, data, measure)
        taught = find_teacher(config, model, tokenizer, model=teacher)
        if taught is not None:
            taught.check_rows(data.train)
        method = method_of(config)
        method.prepare(model)
    try:
        with together():
            run.begin(data.summary.to_dict(), None if taught is None else taught.identity)
        _require_one_text(data)
        with _settings_kept(model):
            return _run(config, method, run, model, tokenizer, data, measure, taught)
    except BaseException:
        method.undo(model)
        raise


def _run(
    config: TuneConfig,
    method: Method,
    run: RunDirectory,
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    measure: _Measure,
    teacher: Teacher | None,
) -> TuneResult:
    with together():
        started = _start(config, run, model, measure) if is_first() else None
    checkpoint, perplexities = of_first(started)
    log = LogFile(run.log)
    stop = StopOnSignal()
    arguments = training_arguments(config, run.checkpoints, len(data.train))
    if world() > 1:  # an expert may get no token; elsewhere every parameter has a gradient
        arguments.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_parameters())
    trainer = method.trainer(
        model,
        arguments,
        train_dataset=data.train,
        data_collator=data.collate,
        callbacks=[log, ProgressBar(config.progress), stop],
        loss_chunk=config.loss_chunk,
        teacher=teacher,
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    timed = log.seconds
    with stop, ending_all():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if log.seconds > timed:  # resuming a finished run changes nothing
        run.write_peak(peak_bytes(next(model.parameters()).device))
    received = stop.agree()
    if received is not None:
        saved = of_first(last_complete(run.checkpoints))
        assert saved is not None, "the callback asked for a checkpoint"
        raise TrainingInterrupted(received, saved, trainer.state.global_step)
    base = _finish(method, trainer, model, tokenizer, run)
    with together():
        if is_first() or trainer.is_sharded:  # each rank computes a part of the layers then
            perplexities["after"] = measure(model)
        run.write_eval(perplexities)
    base, perplexities = of_first((base, perplexities))
    before, after = perplexities["before"], perplexities["after"]
    return TuneResult(
        model=model,
        tokenizer=tokenizer,
        run_dir=run.path,
        adapter_dir=run.adapter,
        base_dir=base,
        perplexity_before=before and before["perplexity"],
        perplexity_after=after and after["perplexity"],
        eval_window=after and after["window"],
        steps=trainer.state.global_step,
        seconds=log.seconds,
        sparsity=trainer.sparsity,
        data=data.summary,
        without_effect=None if trainer.is_sharded else method.without_effect(model),
        measured_on={
            name: value for name, value in (after or {}).items() if name not in ("perplexity", "loss", "window")
        },
    )


def _finish(method: Method, trainer: AdapterTrainer, model: Any, tokenizer: Any, run: RunDirectory) -> Path | None:
    """Write the final adapter, one of several ranks; return the path of the model that it belongs to, if it is new."""
    if trainer.is_sharded:
        trainer.save_model(str(run.adapter), _internal_call=True)  # every rank gathers
        return None
    with together():
        frozen = trainer.check(model)
        return method.finish(model, tokenizer, run, frozen) if is_first() else None


def _start(config: TuneConfig, run: RunDirectory, model: nn.Module, measure: _Measure) -> tuple[Any, dict[str, Any]]:
    """Return the checkpoint to go on from, and the perplexity before, which is measured where it is not known yet."""
    checkpoint = last_complete(run.checkpoints) if config.resume else None
    if config.resume and checkpoint is None:
        logger.info("there is no whole checkpoint in %s: training starts anew", run.checkpoints)
    perplexities = run.read_eval() if checkpoint is not None else {}
    if "before" not in perplexities:
        perplexities = {"text": measure.text, **measure.hashes, "before": measure(model), "after": None}
        run.write_eval(perplexities)
    return checkpoint, perplexities


def _require_one_text(data: TrainingData) -> None:
    """Raise a DataError where the ranks have read other data: each computes a part of every batch."""
    hashes = gathered(data.summary.sha256)
    other = [place for place, found in enumerate(hashes) if found != hashes[0]]
    if other:
        raise DataError(
            f"rank {other[0]} has read other training data than rank 0 ({hashes[other[0]]}, {hashes[0]})",
            remedy="give every machine the same files",
        )


def _check_tokens(config: TuneConfig, model: nn.Module, tokenizer: Any, data: TrainingData, measure: _Measure) -> None:
    """Raise a DataError where the model cannot read all of the data: padding too, which stands beside shorter rows."""
    check_data(model, data.train, data.collate, "the training data", "block_length", tokenizer)
    if measure.rows is not None:
        check_data(model, measure.rows, data.collate, "the held-out rows", "block_length", tokenizer)
    elif measure.tokens is not None:
        check_ids(model, measure.tokens, "the text of the perplexity", tokenizer)
        check_length(model, config.eval_window, "windows", "eval_window")


class _Measure:
    """Measures the perplexity on the held-out text, which it prepares first so that too short a text fails early.

    Attributes:
        tokens, rows: what it measures on; one of them is None, or both are.
    """

    def __init__(self, config: TuneConfig, tokenizer: Any, data: TrainingData) -> None:
        self._config = config
        self._collate = data.collate
        self.tokens: Tensor | None = data.held_out_tokens
        self.rows: TokenRows | None = data.held_out_rows
        self.hashes: dict[str, str] = {}  # of the text; what is held out is known by the data's
        self.text = f"held out: {data.summary.held_out} {'tokens' if self.rows is None else 'rows'}"
        if config.eval_text is not None:
            self.tokens = read_tokens(tokenizer, str(config.eval_text), text_field=config.text_field)
            self.rows = None
            if Path(config.eval_text).is_file():
                self.hashes["text_sha256"] = file_facts(config.eval_text)[0]
            if not len(cut_windows(self.tokens, config.eval_window, data.bos_id)):
                raise DataError(
                    f"{config.eval_text} has {self.tokens.numel()} tokens, fewer than one window of "
                    f"{config.eval_window}: give a longer text, or a smaller {arg('eval_window')}"
                )
            self.text = str(config.eval_text)
        self._bos = data.bos_id
        self._tokenizer = tokenizer

    def __call__(self, model: nn.Module) -> dict[str, Any] | None:
        """Return the fields of a PerplexityResult, or None where nothing is held out."""
        found: PerplexityResult
        if self.rows is not None:
            size = max(1, _EVAL_TOKENS // self._config.block_length)
            found = rows_perplexity(
                model,
                batches(self.rows, self._collate, size),
                total=math.ceil(len(self.rows) / size),
                progress=self._config.progress is not False,
            )
        elif self.tokens is not None:
            found = token_perplexity(
                model,
                self.tokens,
                window=self._config.eval_window,
                batch_size=max(1, _EVAL_TOKENS // self._config.eval_window),
                max_windows=self._config.eval_windows,
                progress=self._config.progress is not False,
                bos_id=self._bos,
            )
        else:
            return None
        logger.info("perplexity %.4f on %s", found.perplexity, self.text)
        values = with_provenance(found, model, self._tokenizer, *self._measured()).to_dict()
        return {name: value for name, value in values.items() if name != "seconds"}  # a resumed run has the same bytes

    def _measured(self) -> tuple[str, int | None]:
        """Return the hash and the size of the file that is measured on; without one, of the tokens, and None."""
        path = self._config.eval_text
        if path is not None and Path(path).is_file():
            return file_facts(path)
        if self.rows is not None:
            return tokens_sha256(*(part for row in self.rows.rows for part in row)), None
        assert self.tokens is not None
        return tokens_sha256(self.tokens), None


def _check_model(config: TuneConfig, model: Any, tokenizer: Any) -> None:
    if (model is None) != (tokenizer is None):
        missing = "tokenizer" if tokenizer is None else "model"
        raise ConfigError(f"tune was given only one of model and tokenizer; give the {missing} too, or neither")
    if model is None and config.model is None:
        raise ConfigError(
            f"there is no model: give TuneConfig {arg('model', ...)}, a directory or hub id, or tune a model in memory"
        )
    if model is not None and config.model is not None:
        raise ConfigError(f"two models: {arg('model', config.model)} of TuneConfig and one in memory; give one of them")
    if model is not None and config.dtype != "auto":
        raise ConfigError(
            f"{arg('dtype', config.dtype)} is for a model that tune loads; this one is in memory: use model.to()"
        )
    if model is not None and is_wrapped(model):
        raise WrapError(
            "the model is wrapped already, and tune wraps it itself: pass the pruned model (spp.unwrap), or train the "
            "wrapped one with SPPTrainer"
        )


def _check_base(directory: Path) -> None:
    """Refuse a base whose format cannot be trained on; warn of one that merging from the disk does not read."""
    found, foreign = stored_format(directory), other_weights(directory)
    if foreign is not None:
        raise CheckpointError(foreign)
    if found is not None and not found.trainable:
        raise CheckpointError(f"{directory} is {found}, on which nothing is trained: {found.remedy}")
    sentence = pickled(directory)
    if sentence is not None:
        merge = call("merge_checkpoint", "base, adapter, output")
        warnings.warn(
            f"{sentence}. It is trained on as it is, but {merge} needs a base of safetensors: what this converts it to",
            SPPWarning,
            stacklevel=3,
        )


def _load_data(config: TuneConfig, tokenizer: Any, model: Any) -> TrainingData:
    if config.own_tokens is not None:
        return _own_data(config, tokenizer, model, config.own_tokens)
    return load_data(
        config.data_files,
        tokenizer,
        block_length=config.block_length,
        data_format=config.data_format,
        split=config.data_split,
        text_field=config.text_field,
        completions_only=config.completions_only,
        held_out=0.0 if config.eval_text is not None else config.eval_fraction,
        least_held_out=config.eval_window,
        seed=config.seed,
        bos=config.bos,
    )


def _own_data(config: TuneConfig, tokenizer: Any, model: Any, tokens: int) -> TrainingData:
    """Let the dense model write what is tuned on; it is freed then, unless it is what is tuned."""
    name = config.dense_model
    if name is None and config.method != "pst":
        loaded = None if model is not None else local_directory(str(config.model), "model")
        given = loaded or getattr(model.config, "_name_or_path", None)
        name = getattr(model, "_spp_origin", None) or (origin_of(given) if given else None)
        if name is None:
            raise ConfigError(
                f"{arg('data')} is {config.data_files[0]}, and nothing names the dense model that is to write: no "
                f"certificate of {given or 'the model'} has it; pass {arg('dense_model', ...)}"
            )
    if name is None and model is not None:
        author = model
    else:
        author = load_model(str(name or config.model), config.dtype)
        if config.device != "cpu" and torch.cuda.is_available():
            author = author.to("cuda")
    length, seed = config.block_length, config.seed
    check_length(author, length, "blocks", "block_length")
    rows = math.ceil(tokens / length)
    windows = own_windows(author, tokenizer, count=rows, length=length, seed=seed, bos=config.bos)
    del author
    trim_memory()
    return own_data(
        windows,
        tokenizer,
        held_out=0.0 if config.eval_text is not None else config.eval_fraction,
        least_held_out=config.eval_window,
        bos=find_bos(tokenizer, config.bos),
        seed=seed,
    )


def training_arguments(config: TuneConfig, output_dir: Path, rows: int, *, save: bool = True) -> Any:
    """Return the TrainingArguments of a run.

    Args:
        config: the options.
        output_dir: where checkpoints go.
        rows: of the training data.
        save: False writes no checkpoint at all.
    """
    passes = math.ceil(rows / (config.batch_size * world()))  # forward passes of an epoch, on each rank
    steps = config.steps or math.ceil(config.epochs * math.ceil(passes / config.gradient_accumulation))
    known = {f.name for f in fields(TrainingArguments)}
    # The option was renamed within transformers 5.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.bf16,
        use_cpu=config.device == "cpu" or not torch.accelerator.is_available(),  # else no bf16 on a CPU
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # LogFile stops a run whose loss is not finite
        save_strategy="steps" if save else "no",  # "steps" also saves at the end
        save_steps=config.save_every or steps,
        save_total_limit=config.save_limit,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
        **{checkpointing: config.gradient_checkpointing},
    )


@contextlib.contextmanager
def _settings_kept(model: Any) -> Iterator[None]:
    """Undo what the Trainer changes on a model beyond its parameters: mode, config.use_cache, checkpointing."""
    training, had = model.training, [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = any(module is one for one in had)
