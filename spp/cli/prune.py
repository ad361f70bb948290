"""spp prune: a dense model in, a pruned checkpoint with its certificate out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "prune"


def run(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the dense model.")],
    output: Annotated[Path, typer.Argument(help="Directory to write the pruned checkpoint to.")],
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt, dsnot, or one+dsnot, such as wanda+dsnot.")
    ] = "wanda",
    pattern: Annotated[str, typer.Option(help="N:M (N kept of every M) or the fraction pruned, such as 0.5.")] = "2:4",
    calibration: Annotated[
        Path | None, typer.Option(help="Text for the methods that look at activations: .txt, .json or .jsonl.")
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 2048,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--target-modules", help="Names, a regular expression or all-linear; may be repeated."),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option("--exclude-modules", help="Names or a regular expression to leave dense.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of calibration sequences.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="List every layer in the table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Prune a dense model and write a plain checkpoint.

    Example: spp prune MODEL pruned --method wanda --pattern 2:4 --calibration texts.txt
    """
    from spp.calibrate import prune
    from spp.checkpoint import save_model
    from spp.checkpoint.merging import refuse_overlap
    from spp.errors import CheckpointError
    from spp.files.hub import local_directory
    from spp.report import prune_table
    from spp.training.loading import load_model, load_tokenizer

    where = console.pick_device(device)
    console.check_output(output, overwrite)
    console.quiet_libraries()
    with console.step(f"loading {model}"):
        directory = local_directory(model, "model")
        refuse_overlap(output, directory, "the model")
        loaded = load_model(directory, console.pick_dtype(dtype)).to(where)
        try:
            tokenizer = load_tokenizer(directory)
        except CheckpointError as error:
            if calibration is not None:
                raise
            tokenizer = None
            console.note(f"no tokenizer is saved: {str(error).splitlines()[0]}")
    with console.step(f"pruning by {method} to {pattern}"):
        report = prune(
            loaded,
            method,
            pattern,
            calibration,
            target_modules=console.names(target_modules),
            exclude_modules=console.names(exclude_modules),
            tokenizer=tokenizer,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
        )
    save_model(loaded, output, tokenizer=tokenizer, overwrite=overwrite)
    console.show(prune_table(report, every=every))
    console.wrote(output)
