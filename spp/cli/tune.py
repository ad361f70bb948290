"""spp tune: a model and data in, a run directory with the tuned adapter out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spp.cli import console
from spp.report import Table, time_text

NAME = "tune"


def run(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the pruned model; for PST, of the dense one.")],
    output_dir: Annotated[Path, typer.Argument(help="Run directory: config, log, checkpoints, adapter, perplexities.")],
    data: Annotated[
        list[str],
        typer.Option(help=".txt, .json, .jsonl (text, Alpaca or chat rows) or a hub id of a dataset; may be repeated."),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="default, paper (SPP: dropout 0.05; PST: no decay, no warm-up) or short (SPP: lr 2e-2; PST: lr 1e-3); "
            "other options override it."
        ),
    ] = "default",
    method: Annotated[
        str | None, typer.Option(help="spp, or pst, which prunes a dense model while it trains (default: spp).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (default: as many as --epochs has).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (default: 1.0).")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate (default: SPP's 0.004, for some 1,200 steps; PST's 0.0001)."),
    ] = None,
    r: Annotated[int | None, typer.Option(help="SPP: rank of the adapter (default: 16).")] = None,
    scaling: Annotated[float | None, typer.Option(help="SPP: factor s of the adapter (default: 2.0).")] = None,
    dropout: Annotated[float | None, typer.Option(help="SPP: dropout probability (default: 0.0).")] = None,
    dropout_mode: Annotated[str | None, typer.Option(help="SPP: input or alpha (default: input).")] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="SPP: spp, hira or masked_lora (default: spp). HiRA as spp compare has it is --r 8 --scaling 1, "
            "masked LoRA --r 8."
        ),
    ] = None,
    mask_update_every: Annotated[
        int | None, typer.Option(help="SPP: steps between two updates of the masks (default: the masks stay).")
    ] = None,
    dense_model: Annotated[
        str | None, typer.Option(help="Directory or hub id of the dense model, which mask updates need.")
    ] = None,
    mask_update_fraction: Annotated[
        float | None, typer.Option(help="Share of kept weights that the first update exchanges (default: 0.1).")
    ] = None,
    mask_update_until: Annotated[
        float | None, typer.Option(help="Part of the steps after which masks stay (default: 0.75).")
    ] = None,
    mask_update_decay: Annotated[
        str | None, typer.Option(help="How that share shrinks: cosine or cubic (default: cosine).")
    ] = None,
    mask_update_drop: Annotated[
        str | None, typer.Option(help="What goes: lowest activation or magnitude (default: activation).")
    ] = None,
    mask_update_grow: Annotated[
        str | None, typer.Option(help="What comes: highest gradient or saliency (default: gradient).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="PST: what is pruned at the end, N:M (N kept of M) or a fraction; required.")
    ] = None,
    initial_sparsity: Annotated[float | None, typer.Option(help="PST: pruned at the start (default: 0.0).")] = None,
    initial_warmup: Annotated[
        float | None, typer.Option(help="PST: share of the steps before pruning begins (default: 0.1).")
    ] = None,
    final_warmup: Annotated[
        float | None, typer.Option(help="PST: share of the steps at the final sparsity (default: 0.3).")
    ] = None,
    weight_rank: Annotated[int | None, typer.Option(help="PST: rank of the weight's update (default: 8).")] = None,
    weight_scale: Annotated[float | None, typer.Option(help="PST: factor of that update (default: 1.0).")] = None,
    mask_rank: Annotated[int | None, typer.Option(help="PST: rank of the importance (default: 8).")] = None,
    low_rank_scale: Annotated[
        float | None, typer.Option(help="PST: factor of the low-rank importance (default: 1.0).")
    ] = None,
    structured_scale: Annotated[
        float | None, typer.Option(help="PST: factor of the structured importance (default: 1.0).")
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--target-modules", help="Names, a regular expression or all-linear; may be repeated."),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option("--exclude-modules", help="Names or a regular expression to leave alone.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of one forward pass (default: 4).")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a training row (default: 512).")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes of a step (default: 1).")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations: less memory, more time (default: False).")
    ] = None,
    loss_chunk: Annotated[
        int | None, typer.Option(help="Take the loss over so many tokens at a time: less memory (default: all).")
    ] = None,
    saved_activations: Annotated[
        str | None,
        typer.Option(help="SPP: full or bfloat16: inputs kept for backward at half the memory (default: full)."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay (default: 0.001).")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of the steps that warm up (default: 0.03).")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or constant (default: linear).")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the gradient to this norm; 0 does not (default: 1.0).")
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text for the perplexity before and after (default: held out from the data).")
    ] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of the data held out (default: 0.05).")] = None,
    eval_window: Annotated[
        int | None, typer.Option("--window", help="Window of the perplexity (default: 512).")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Measure the first windows only (default: all).")] = None,
    data_format: Annotated[str | None, typer.Option(help="auto, text, alpaca or chat (default: auto).")] = None,
    data_split: Annotated[str | None, typer.Option(help="Split of a hub dataset (default: train).")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of a row with plain text (default: text).")] = None,
    completions_only: Annotated[
        bool | None, typer.Option(help="Learn the answers only, not the prompts (default: True).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (default: auto).")] = None,
    bf16: Annotated[bool | None, typer.Option(help="Compute under bfloat16 autocast (default: False).")] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu (default: auto).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial values, data order and dropout (default: 0).")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between two lines of log.jsonl (default: 1).")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints (default: 100).")] = None,
    save_limit: Annotated[int | None, typer.Option(help="Checkpoints to keep (default: 2).")] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Show a progress bar (default: on a terminal).", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the directory.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the directory.")] = False,
    strict_values: Annotated[
        bool | None,
        typer.Option(
            "--strict",
            help="SPP: do not resume on a base with other values than the checkpoint was trained on (default: False).",
        ),
    ] = None,
) -> None:
    """Tune a pruned model with an adapter that keeps its zeros, or prune a dense one while it trains (--method pst).

    Ctrl-C saves a checkpoint; the same command with --resume continues from it. Then: spp merge MODEL RUN/adapter
    MERGED; after mask updates, with RUN/base for MODEL.

    Example: spp tune pruned run --data train.txt --steps 200 --lr 2e-2

    Example: spp tune dense run --data train.txt --method pst --pattern 2:4 --recipe short --steps 300
    """
    given = {name: value for name, value in locals().items() if value is not None and name != "recipe"}
    result = tune_with(recipe, given)
    show(result)


def tune_with(recipe: str, given: dict[str, Any]) -> Any:
    """Run `spp.training.tune` with a recipe and the options that were given."""
    from spp.files.hub import local_directory
    from spp.training import TrainingInterrupted, TuneConfig, tune

    for name in ("target_modules", "exclude_modules"):
        if name in given:
            given[name] = console.names(given[name])
    config = TuneConfig.from_recipe(recipe, **{**given, "data": tuple(given["data"])})
    local_directory(given["model"], "model")  # fails, or fetches a hub id, before anything else
    console.quiet_libraries()
    with console.step(f"tuning {given['model']}"), console.log():
        try:
            return tune(config)
        except TrainingInterrupted as stop:  # typer turns a KeyboardInterrupt into exit code 130 and says nothing
            console.note(str(stop))
            raise


def show(result: Any) -> None:
    """Print the perplexities, and where the run is."""
    columns = ("perplexity before", "after", "window", "steps", "time", "sparsity")
    perplexities = [
        "–" if value is None else f"{value:.4f}" for value in (result.perplexity_before, result.perplexity_after)
    ]
    window = "rows" if result.eval_window is None else str(result.eval_window)
    row = (*perplexities, window, str(result.steps), time_text(result.seconds), f"{result.sparsity:.4f}")
    console.show(Table("tuned", columns, (row,)))
    console.wrote(result.run_dir)
    console.wrote(result.adapter_dir)
    if result.base_dir is not None:
        console.wrote(result.base_dir)
