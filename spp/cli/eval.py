"""spp eval: the perplexity of a model, with or without an adapter."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import EvalConfig
from spp.errors import ConfigError, arg

if TYPE_CHECKING:
    from spp.weights.base_values import BaseVerdict

NAME = "eval"


@command(EvalConfig)
def run(config: EvalConfig) -> None:
    """Measure the perplexity of a model on a text, in windows that do not overlap.

    Example: spp eval merged --text valid.txt --window 1024
    """
    from spp.comparing.measure import environment, weights_fingerprint
    from spp.evaluation import perplexity_result
    from spp.files.hub import local_directory
    from spp.report import Table
    from spp.training.loading import load_model, load_tokenizer
    from spp.weights.base_values import BaseVerdict

    where = console.pick_device(config.device)
    passage = console.read_text_file(config.text)
    console.quiet_libraries()
    verdict = BaseVerdict()  # of a model alone, and of what PST trained, which loads onto its own values only
    with console.step(f"loading {config.model}"):
        directory = local_directory(config.model, "model")
        model = load_model(directory, config.dtype).to(where).eval()
        tokenizer = load_tokenizer(directory)
        if config.adapter is not None:
            verdict = load_trained(model, config.adapter, config.strict) or verdict
    start = time.perf_counter()
    found = perplexity_result(
        model,
        tokenizer,
        passage,
        window=config.window,
        batch_size=config.batch_size,
        max_windows=config.max_windows,
        progress=True,
    )
    seconds = time.perf_counter() - start
    adapter = "" if config.adapter is None else str(config.adapter)
    if config.json:
        values = {"model": config.model, "adapter": adapter or None, "text": str(config.text), **found.to_dict()}
        values |= {} if config.adapter is None else verdict.to_dict()
        text = hashlib.sha256(passage.encode()).hexdigest()
        read = {"text_sha256": text, "model_fingerprint": weights_fingerprint(model)}
        values |= replace(environment(where, model.dtype), seconds=seconds, hashes=read).to_dict()
        return console.say(json.dumps(values))
    columns = ("model", "adapter", "perplexity", "window", "windows", "tokens")
    row = (config.model, adapter, f"{found.perplexity:.4f}", *map(str, (found.window, found.windows, found.tokens)))
    console.show(Table(f"perplexity on {config.text}", columns, (row,)))
    if verdict.line:
        console.say(verdict.line)


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
