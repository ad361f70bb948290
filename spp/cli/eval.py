"""spp eval: the perplexity of a model, with or without an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console
from spp.report import Table

NAME = "eval"


def run(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the model.")],
    text: Annotated[Path, typer.Option(help="Plain text to measure on, the whole file.")],
    window: Annotated[int, typer.Option(help="Tokens of a window; perplexities compare at equal windows only.")] = 1024,
    adapter: Annotated[Path | None, typer.Option(help="Adapter, or what PST trained, to load onto the model.")] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            help="Refuse an adapter that was trained on other values than the model's, or accept one that was trained "
            "on other zeros (default: other zeros are refused, other values are said).",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of one forward pass.")] = 1,
    max_windows: Annotated[int | None, typer.Option(help="Measure the first windows only.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure perplexity: the text joined, tokenised once, cut into windows that do not overlap.

    Example: spp eval merged --text valid.txt --window 1024
    """
    from spp.adapter_files import PST_TYPE, method_of
    from spp.adapters import load_adapter
    from spp.base_values import BaseVerdict
    from spp.errors import ConfigError
    from spp.evaluation import check_windows, perplexity_result
    from spp.files.hub import local_directory
    from spp.inject import base_verdict
    from spp.pst import load
    from spp.training.loading import load_model, load_tokenizer

    where = console.pick_device(device)
    check_windows(window, batch_size, max_windows)  # before the model is loaded
    passage = console.read_text_file(text)
    console.quiet_libraries()
    verdict = BaseVerdict()  # of a model alone, and of what PST trained, which loads onto its own values only
    with console.step(f"loading {model}"):
        directory = local_directory(model, "model")
        loaded = load_model(directory, console.pick_dtype(dtype)).to(where).eval()
        tokenizer = load_tokenizer(directory)
        if adapter is not None and method_of(adapter) == PST_TYPE:
            if strict is False:
                raise ConfigError("--no-strict is for adapters of SPP; what PST trained fits its own weights alone")
            load(loaded, adapter)
        elif adapter is not None:
            verdict = base_verdict(
                load_adapter(loaded, adapter, strict=strict is not False, strict_values=strict is True)
            )
    found = perplexity_result(
        loaded, tokenizer, passage, window=window, batch_size=batch_size, max_windows=max_windows, progress=True
    )
    if as_json:
        values = {"model": model, "adapter": adapter and str(adapter), "text": str(text), **found.to_dict()}
        values |= {} if adapter is None else verdict.to_dict()
        return console.say(json.dumps(values))
    columns = ("model", "adapter", "perplexity", "window", "windows", "tokens")
    row = (model, str(adapter or ""), f"{found.perplexity:.4f}", str(window), str(found.windows), str(found.tokens))
    console.show(Table(f"perplexity on {text}", columns, (row,)))
    if verdict.line:
        console.say(verdict.line)
