"""spp prune: a dense model in, a pruned checkpoint with its certificate out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spp.cli import console
from spp.cli.options import command
from spp.cli.ranks import ranks
from spp.configs.checks import finite
from spp.configs.pruning import PruneConfig
from spp.distributed.ranks import is_first
from spp.errors import CheckpointError

if TYPE_CHECKING:
    from spp.pruning import PruneReport

NAME = "prune"


@command(PruneConfig)
@ranks()
def run(config: PruneConfig) -> None:
    """Prune a dense model, one block at a time in memory, and write a plain checkpoint.

    A run that was killed continues after its last finished block when the same command is given again. Started by
    torchrun or accelerate launch, each process runs its share of the calibration windows.

    Example: spp prune MODEL pruned --method wanda --pattern 2:4 --calibration texts.txt
    """
    from spp.files import atomic_file, write_json
    from spp.files.provenance import Provenance, peak_bytes
    from spp.files.recognised import PRUNE_REPORT
    from spp.pruning.plan import tell_patterns
    from spp.report import pattern_text, prune_lines, prune_table, reconstruction_table

    where, overwrite = console.pick_device(config.device), config.overwrite
    console.check_directory(config.output, overwrite, [("the model", config.model)])
    if config.report is not None:
        console.check_file(config.report, overwrite, PRUNE_REPORT)
    console.quiet_libraries()
    told = f"pruning {config.model} by {config.method} to {pattern_text(config.described)}"
    with console.step(told), console.log():
        tell_patterns(config.pattern)
        found = None if config.in_memory else stream(config, where)
        found = found or load_and_prune(config, where)
    values = {**found.to_dict(), "peak_bytes": peak_bytes(where)}
    console.answer({**Provenance.here(where).to_dict(), **values})
    console.show(prune_table(found, every=config.every))
    if found.reconstruction is not None and config.every:
        console.show(reconstruction_table(found.reconstruction))
    for line in prune_lines(found):
        console.say(line)
    console.wrote(config.output)
    if config.report is not None:
        if is_first():
            with atomic_file(config.report, overwrite=overwrite, kind=PRUNE_REPORT) as path:
                write_json(path, finite(values))
        console.wrote(config.report)


def stream(config: PruneConfig, device: str) -> PruneReport | None:
    """Prune block by block from the disk; None, with a line that says why, where that cannot be."""
    import torch

    from spp.files.hub import local_directory
    from spp.pruning.disk import prune_checkpoint_by
    from spp.pruning.windows import needs_tokenizer
    from spp.training.loading import load_tokenizer

    directory = local_directory(config.model, "model")
    tokenizer = None
    if config.calibration is not None and needs_tokenizer(config.calibration):
        tokenizer = load_tokenizer(directory)
    with console.streaming(config.output, "loading the whole model"):
        return prune_checkpoint_by(
            directory,
            config.output,
            config,
            tokenizer=tokenizer,
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            device=device,
            overwrite=config.overwrite,
        )


def load_and_prune(config: PruneConfig, device: str) -> PruneReport:
    """Load the model, prune it and save it."""
    from spp.certifying.save import save_model
    from spp.files import check_target
    from spp.files.carry import refuse_overlap
    from spp.files.hub import local_directory
    from spp.models.streamed import refuse_quantized
    from spp.pruning.model import prune_by
    from spp.pruning.windows import needs_tokenizer
    from spp.training.loading import load_model, load_tokenizer

    directory = local_directory(config.model, "model")
    refuse_overlap(config.output, directory, "the model")
    refuse_quantized(directory)
    check_target(config.output, overwrite=config.overwrite, copies=[directory])
    tokenizer = None
    try:
        tokenizer = load_tokenizer(directory)
    except CheckpointError as error:
        if config.calibration is not None and needs_tokenizer(config.calibration):
            raise
        console.note(f"no tokenizer is saved: {console.said(error).splitlines()[0]}")
    loaded = load_model(directory, config.dtype).to(device)
    report = prune_by(loaded, config, tokenizer)
    if is_first():
        save_model(loaded, config.output, tokenizer=tokenizer, overwrite=config.overwrite)
    return report
