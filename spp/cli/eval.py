"""spp eval: the perplexity of a model and its scores on tasks, with or without an adapter."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import EvalConfig
from spp.errors import ConfigError, arg

if TYPE_CHECKING:
    from spp.evaluation import PerplexityResult, TaskResults
    from spp.weights.base_values import BaseVerdict

NAME = "eval"


@command(EvalConfig)
def run(config: EvalConfig) -> None:
    """Measure the perplexity of a model on a text, in windows that do not overlap, or its scores on tasks, or both.

    Example: spp eval merged --text valid.txt --window 1024

    Example: spp eval merged --tasks paper --limit 100
    """
    from spp.data.encoding import source_tokens
    from spp.data.parsing import read_measured
    from spp.evaluation import evaluate_tasks, load_tasks, token_perplexity
    from spp.files.hub import local_directory
    from spp.models.tokens import check_ids
    from spp.report import Table, tasks_table
    from spp.training.loading import load_model, load_tokenizer
    from spp.weights.base_values import BaseVerdict

    where = console.pick_device(config.device)
    source = None if config.text is None else read_measured(str(config.text))
    console.quiet_libraries()
    loaded = None
    if config.tasks:
        console.quiet_imports()  # of lm-eval's own libraries
        with console.step(f"loading {', '.join(config.tasks)}"):
            loaded = load_tasks(
                config.tasks,
                num_fewshot=config.num_fewshot,
                data_dir=config.data_dir,
                split=config.split,
                progress=True,
            )
    verdict = BaseVerdict()  # of a model alone, and of what PST trained, which loads onto its own values only
    with console.step(f"loading {config.model}"):
        directory = local_directory(config.model, "model")
        model = load_model(directory, config.dtype).to(where).eval()
        tokenizer = load_tokenizer(directory)
        if config.adapter is not None:
            verdict = load_trained(model, config.adapter, config.strict) or verdict
    found, scored = None, None
    start = time.perf_counter()
    if source is not None:
        tokens = source_tokens(tokenizer, source)
        check_ids(model, tokens, str(config.text), tokenizer)
        found = token_perplexity(
            model,
            tokens,
            window=config.window,
            batch_size=config.batch_size,
            max_windows=config.max_windows,
            progress=True,
        )
    if loaded is not None:
        scored = evaluate_tasks(
            model,
            tokenizer,
            loaded,
            limit=config.limit,
            batch_size=config.batch_size,
            apply_chat_template=config.apply_chat_template,
            progress=True,
        )
    seconds = time.perf_counter() - start
    if console.in_json():
        values = {} if config.adapter is None else verdict.to_dict()
        return console.answer(to_dict(config, model, where, seconds, found, scored) | values)
    if found is not None:
        columns = ("model", "adapter", "perplexity", "window", "windows", "tokens")
        adapter = "" if config.adapter is None else str(config.adapter)
        counts = map(str, (found.window, found.windows, found.tokens))
        row = (config.model, adapter, f"{found.perplexity:.4f}", *counts)
        console.show(Table(f"perplexity on {config.text}", columns, (row,)))
    if scored is not None:
        console.show(tasks_table(scored, " with ".join(filter(None, (config.model, str(config.adapter or ""))))))
    if verdict.line:
        console.say(verdict.line)


def to_dict(
    config: EvalConfig,
    model: Any,
    where: str,
    seconds: float,
    found: PerplexityResult | None,
    scored: TaskResults | None,
) -> dict[str, Any]:
    """Return what was measured and where it comes from, as one object of JSON-ready values."""
    from spp.comparing.measure import environment, weights_fingerprint
    from spp.data.reading import file_sha256

    values: dict[str, Any] = {"model": config.model, "adapter": str(config.adapter) if config.adapter else None}
    read = {"model_fingerprint": weights_fingerprint(model)}
    here = environment(where, model.dtype)
    versions = dict(here.versions or {})
    if config.text is not None and found is not None:
        values |= {"text": str(config.text), **found.to_dict()}
        read["text_sha256"] = file_sha256(config.text)
    if scored is not None:
        values |= scored.to_dict()
        versions |= scored.provenance.versions or {}
    return values | replace(here, seconds=seconds, versions=versions, hashes=read).to_dict()


def load_trained(model: Any, adapter: Path, strict: bool | None) -> BaseVerdict | None:
    """Load an adapter, or what PST trained, onto a model.

    Args:
        strict: refuse other values of the base too; False accepts other zeros; None is neither.

    Returns:
        Whether the model has the values that the adapter was trained on; None for what PST trained.
    """
    from spp.pst import load
    from spp.wrapping.adapter_files import PST_TYPE, method_of
    from spp.wrapping.adapters import load_adapter
    from spp.wrapping.wrap import base_verdict

    if method_of(adapter) != PST_TYPE:
        return base_verdict(load_adapter(model, adapter, strict=strict is not False, strict_values=strict is True))
    if strict is False:
        raise ConfigError(f"{arg('strict', False)} is for adapters of SPP; what PST trained fits its own weights alone")
    load(model, adapter)
    return None
