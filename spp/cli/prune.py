"""spp prune: a dense model in, a pruned checkpoint with its certificate out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spp.cli import console
from spp.errors import CheckpointError, ConfigError, PatternError, StreamingError

if TYPE_CHECKING:
    from spp.calibrate import PruneReport
    from spp.calibrate.plan import PruneOptions
    from spp.pruning import OWL

NAME = "prune"


def run(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the dense model.")],
    output: Annotated[Path, typer.Argument(help="Directory to write the pruned checkpoint to.")],
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt, dsnot, or one+dsnot, such as sparsegpt+dsnot.")
    ] = "wanda",
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="N:M (N kept of every M) or the fraction pruned, such as 0.5 (default: 2:4). Repeated, NAME=PATTERN "
            "for layers by name suffix or regular expression, of which the first that matches counts; one without NAME "
            "is for all others."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data for the methods that look at activations: a text file (.txt, .md, .raw), rows with a field text "
            "(.json, .jsonl), token ids (.pt, .safetensors), or a data set, NAME[:CONFIG[:SPLIT[:FIELD]]] with a "
            "folder or hub id as NAME, such as allenai/c4:en."
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration windows at most.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window that is cut from text.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the draw of windows.")] = 0,
    owl: Annotated[
        bool, typer.Option("--owl", help="Prune blocks with many outliers less (OWL); the pattern must be a fraction.")
    ] = False,
    owl_threshold: Annotated[
        float | None, typer.Option(help="OWL: times the mean that an outlier is above (default: 5).")
    ] = None,
    owl_spread: Annotated[
        float | None, typer.Option(help="OWL: how far a block may be from the fraction (default: 0.08).")
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--target-modules", help="Names, a regular expression or all-linear; may be repeated."),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option("--exclude-modules", help="Names or a regular expression to leave dense.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model instead of one block at a time.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="JSON file to write what was done to each layer to.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer in the table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Prune a dense model, one block at a time in memory, and write a plain checkpoint.

    A run that was killed goes on behind its last finished block when the same command is given again.

    Example: spp prune MODEL pruned --method wanda --pattern 2:4 --calibration texts.txt
    """
    from spp.calibrate.plan import PruneOptions
    from spp.files import atomic_file, write_json
    from spp.files.recognised import PRUNE_REPORT
    from spp.report import pattern_text, prune_lines, prune_table

    options = PruneOptions(
        method=method,
        pattern=parse_patterns(pattern),
        calibration=calibration,
        target_modules=console.names(target_modules),
        exclude_modules=console.names(exclude_modules),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        owl=parse_owl(owl, owl_threshold, owl_spread),
    )
    where = console.pick_device(device)
    console.pick_dtype(dtype)
    console.check_directory(output, overwrite)
    if report is not None:
        console.check_file(report, overwrite, PRUNE_REPORT)
    console.quiet_libraries()
    with console.step(f"pruning {model} by {method} to {pattern_text(options.described)}"), console.log():
        found = None if in_memory else stream(model, output, options, dtype, where, overwrite)
        found = found or load_and_prune(model, output, options, dtype, where, overwrite)
    console.show(prune_table(found, every=every))
    for line in prune_lines(found):
        console.say(line)
    console.wrote(output)
    if report is not None:
        with atomic_file(report, overwrite=overwrite, kind=PRUNE_REPORT) as path:
            write_json(path, found.to_dict())
        console.wrote(report)


def stream(
    model: str, output: Path, options: PruneOptions, dtype: str, device: str, overwrite: bool
) -> PruneReport | None:
    """Prune block by block from the disk; None, with a line that says why, where that cannot be."""
    import torch

    from spp.calibrate.windows import needs_tokenizer
    from spp.checkpoint_prune import prune_checkpoint
    from spp.checkpoint_prune_work import work_folder
    from spp.files.hub import local_directory
    from spp.training.loading import load_tokenizer

    directory = local_directory(model, "model")
    tokenizer = None
    if options.calibration is not None and needs_tokenizer(options.calibration):
        tokenizer = load_tokenizer(directory)
    try:
        return prune_checkpoint(
            directory,
            output,
            **options.arguments(),
            tokenizer=tokenizer,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            device=device,
            overwrite=overwrite,
        )
    except StreamingError as error:
        console.note(f"{error}: loading the whole model")
        return None
    except KeyboardInterrupt:
        folder = work_folder(Path(os.path.realpath(output)))
        if folder.exists():
            console.note(f"interrupted; what is finished is kept in {folder}: the same command goes on behind it")
        raise


def load_and_prune(
    model: str, output: Path, options: PruneOptions, dtype: str, device: str, overwrite: bool
) -> PruneReport:
    """Load the model, prune it and save it."""
    from spp.calibrate import prune
    from spp.calibrate.windows import needs_tokenizer
    from spp.checkpoint import save_model
    from spp.checkpoint.carrying import refuse_overlap
    from spp.checkpoint_prune_model import refuse_quantized
    from spp.files import check_target
    from spp.files.hub import local_directory
    from spp.training.loading import load_model, load_tokenizer

    directory = local_directory(model, "model")
    refuse_overlap(output, directory, "the model")
    refuse_quantized(directory)
    check_target(output, overwrite=overwrite, copies=[directory])
    tokenizer = None
    try:
        tokenizer = load_tokenizer(directory)
    except CheckpointError as error:
        if options.calibration is not None and needs_tokenizer(options.calibration):
            raise
        console.note(f"no tokenizer is saved: {str(error).splitlines()[0]}")
    loaded = load_model(directory, dtype).to(device)
    report = prune(loaded, **options.arguments(), tokenizer=tokenizer)
    save_model(loaded, output, tokenizer=tokenizer, overwrite=overwrite)
    return report


def parse_patterns(values: list[str] | None) -> Any:
    """Return what `--pattern` means: one pattern, or {name: pattern} with the one without a name last, for all others.

    Raises:
        PatternError: two patterns without a name, or a name given twice.
    """
    named: dict[str, str] = {}
    plain = []
    for value in values or ["2:4"]:
        name, equals, pattern = value.rpartition("=")
        if not equals:
            plain.append(value)
        elif not name or name in named:
            what = "has no name before =" if not name else f"is the second for {name}"
            raise PatternError(f"--pattern {value} {what}; write NAME=PATTERN, each name once")
        else:
            named[name] = pattern
    if len(plain) > 1:
        raise PatternError(
            f"--pattern is given {len(plain)} times without a name ({', '.join(plain)}); one is enough, or write "
            f"NAME=PATTERN for layers of that name"
        )
    if not named:
        return plain[0]
    return named | ({".*": plain[0]} if plain else {})


def parse_owl(wanted: bool, threshold: float | None, spread: float | None) -> OWL | None:
    """Return the options of OWL, or None without `--owl`."""
    from spp.pruning import OWL

    given = {name: value for name, value in (("threshold", threshold), ("spread", spread)) if value is not None}
    if given and not wanted:
        raise ConfigError(f"--owl-{next(iter(given))} is an option of OWL: add --owl, or leave it out")
    return OWL(**given) if wanted else None
