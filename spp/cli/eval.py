"""spp eval: the perplexity of a model and its scores on tasks, with or without an adapter."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp.cli import console
from spp.cli.options import command
from spp.configs.evaluating import EvalConfig
from spp.errors import CheckpointError, ConfigError, arg

if TYPE_CHECKING:
    from spp.data.parsing import Source
    from spp.evaluation import PerplexityResult, TaskResults
    from spp.weights.base_values import BaseVerdict

NAME = "eval"
WINDOW, DATASET_WINDOW = 1024, 2048  # tokens of a window of a text, and of a data set


@command(EvalConfig)
def run(config: EvalConfig) -> None:
    """Measure the perplexity of a model on a text, in windows that do not overlap, or its scores on tasks, or both.

    Example: spp eval merged --text valid.txt --window 1024

    Example: spp eval merged --dataset wikitext2

    Example: spp eval merged --tasks paper --limit 100
    """
    from spp.evaluation import evaluate_tasks, load_tasks
    from spp.files.hub import local_directory
    from spp.report import Table, tasks_table
    from spp.training.loading import load_model, load_tokenizer
    from spp.weights.base_values import BaseVerdict

    where = console.pick_device(config.device)
    read = read_text_of(config)
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
    found: tuple[PerplexityResult, ...] = ()
    scored = None
    start = time.perf_counter()
    if read is not None:
        found = measure(config, model, tokenizer, read)
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
    values = to_dict(config, model, where, seconds, found, scored)
    values |= certificate_of(Path(directory))
    if console.in_json():
        return console.answer(values | ({} if config.adapter is None else verdict.to_dict()))
    if found:
        adapter = "" if config.adapter is None else str(config.adapter)
        columns: tuple[str, ...] = ("model", "adapter", "perplexity", "window", "windows", "tokens")
        rows = [
            (config.model, adapter, f"{one.perplexity:.4f}", *map(str, (one.window, one.windows, one.tokens)))
            for one in found
        ]
        if len(found) > 1:
            columns = (*columns, "protocol")
            rows = [(*row, str(one.protocol)) for row, one in zip(rows, found, strict=True)]
        console.show(Table(f"perplexity on {config.dataset or config.text}", columns, tuple(rows)))
    if scored is not None:
        console.show(tasks_table(scored, " with ".join(filter(None, (config.model, str(config.adapter or ""))))))
    console.say(provenance_line(values))
    if verdict.line:
        console.say(verdict.line)


def to_dict(
    config: EvalConfig,
    model: Any,
    where: str,
    seconds: float,
    found: Sequence[PerplexityResult],
    scored: TaskResults | None,
) -> dict[str, Any]:
    """Return what was measured and where it comes from, as one object of JSON-ready values.

    A second perplexity, by the other protocol, is under the name of that: "per_window".
    """
    from spp.comparing.measure import environment

    values: dict[str, Any] = {"model": config.model, "adapter": str(config.adapter) if config.adapter else None}
    here = environment(where, model.dtype)
    versions = dict(here.versions or {})
    for number, one in enumerate(found):
        if number == 0:
            values |= {"text": str(config.text)} if config.dataset is None else {"dataset": config.dataset}
            values |= one.to_dict()
        else:
            names = ("perplexity", "loss", "tokens", "windows", "window", "bos", "protocol")
            values[str(one.protocol).replace("-", "_")] = {name: getattr(one, name) for name in names}
    if scored is not None:
        values |= scored.to_dict()
        versions |= scored.provenance.versions or {}
    return values | replace(here, seconds=seconds, versions=versions).to_dict()


def read_text_of(config: EvalConfig) -> Read | None:
    """Return the text that the perplexity is measured on, before any model is loaded; None where none is."""
    from spp.data.parsing import Source, Text, read_measured
    from spp.data.reading import file_facts
    from spp.evaluation import dataset_text

    if config.dataset is not None:
        with console.step(f"loading {config.dataset}"):
            text = dataset_text(config.dataset, config.data_dir)
        data = text.encode("utf-8", "surrogatepass")
        source = Source((Text(config.dataset, text),), (), 0)
        return Read(source, hashlib.sha256(data).hexdigest(), len(data))
    if config.text is None:
        return None
    source = read_measured(str(config.text))  # first: it has the messages for what is no text
    return Read(source, *(file_facts(config.text) if config.text.is_file() else ("", None)))


@dataclass(frozen=True)
class Read:
    """A text, the sha256 of what was read of its file, and its size in bytes; of a folder of data the tokens' hash."""

    source: Source
    sha256: str
    size: int | None


def measure(config: EvalConfig, model: Any, tokenizer: Any, read: Read) -> tuple[PerplexityResult, ...]:
    """Return the perplexity by the protocol that was asked for; of a data set the one by windows with BOS beside it."""
    from spp.data.encoding import source_tokens
    from spp.data.tokens import find_bos
    from spp.evaluation import dataset_windows, paper_window, token_perplexity, with_provenance
    from spp.models.tokens import check_ids
    from spp.training.data import tokens_sha256

    first, tokens = find_bos(tokenizer, config.bos), source_tokens(tokenizer, read.source)
    check_ids(model, tokens, str(config.dataset or config.text), tokenizer)
    window = config.window or (WINDOW if config.dataset is None else DATASET_WINDOW)
    most = config.max_windows
    if config.dataset is not None and (papers := dataset_windows(config.dataset)) is not None:
        most = papers if most is None else min(most, papers)
    protocols = [config.protocol or ("per-window" if config.dataset is None else "paper")]
    if config.protocol is None and config.dataset is not None and first is not None:
        protocols.append("per-window")
    found = [
        token_perplexity(
            model,
            tokens,
            window=paper_window(model) if isinstance(window, str) else window,
            batch_size=config.batch_size,
            max_windows=most,
            progress=True,
            bos_id=first,
            protocol=protocol,
        )
        for protocol in protocols
    ]
    found[0] = with_provenance(found[0], model, tokenizer, read.sha256 or tokens_sha256(tokens), read.size)
    return tuple(found)


def certificate_of(directory: Path) -> dict[str, str]:
    """Return the fingerprint of a checkpoint's masks, by its certificate; nothing where there is none to read."""
    from spp.certifying.certificate import Certificate

    try:
        return {"certificate": Certificate.read(directory).fingerprint()}
    except CheckpointError:
        return {}


def provenance_line(values: Mapping[str, Any]) -> str:
    """Return where a result comes from, on one line below its table."""
    from spp.files.provenance import Provenance

    hashes = {"text": "text_sha256", "tokenizer": "tokenizer_sha256", "model": "model_fingerprint", "certificate": ""}
    told = []
    if "bos" in values:
        where = "in every window" if values["protocol"] == "per-window" else "at the start of the text"
        told = [f"BOS {where} (protocol {values['protocol']})" if values["bos"] else "no BOS"]
    told += [f"{name} {values[key or name][:12]}" for name, key in hashes.items() if values.get(key or name)]
    if values.get("text_bytes") is not None:
        told[1] += f" ({values['text_bytes']} bytes)"
    return f"{', '.join(told)}; {Provenance.from_dict(values).line}; {values['seconds']:.1f} s"


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
