"""spp reconstruct: a pruned checkpoint, repaired block by block against the dense one it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spp.cli import console
from spp.cli.options import command
from spp.cli.ranks import ranks
from spp.configs.checkpoints import ReconstructConfig
from spp.configs.checks import finite
from spp.distributed.ranks import is_first

if TYPE_CHECKING:
    from spp.pruning.report import ReconstructionReport

NAME = "reconstruct"


@command(ReconstructConfig)
@ranks()
def run(config: ReconstructConfig) -> None:
    """Train the kept weights of a pruned model until each block gives the dense one's outputs again; zeros stay.

    A run that was killed continues after its last finished block when the same command is given again. Started by
    torchrun or accelerate launch, each process computes its part of every batch.

    Example: spp reconstruct pruned repaired --dense MODEL --calibration texts.txt
    """
    from spp.files import atomic_file, write_json
    from spp.files.provenance import Provenance, peak_bytes
    from spp.files.recognised import RECONSTRUCTION_REPORT
    from spp.report import reconstruction_table

    where, overwrite = console.pick_device(config.device), config.overwrite
    sources = [("the pruned model", config.pruned), ("the dense model", config.dense)]
    console.check_directory(config.output, overwrite, sources)
    if config.report is not None:
        console.check_file(config.report, overwrite, RECONSTRUCTION_REPORT)
    console.quiet_libraries()
    with console.step(f"reconstructing {config.pruned}"), console.log():
        found = stream(config, where) or load_and_reconstruct(config, where)
    values = {**found.to_dict(), "peak_bytes": peak_bytes(where)}
    console.answer({**Provenance.here(where).to_dict(), **values})
    console.show(reconstruction_table(found))
    console.wrote(config.output)
    if config.report is not None:
        if is_first():
            with atomic_file(config.report, overwrite=overwrite, kind=RECONSTRUCTION_REPORT) as path:
                write_json(path, finite(values))
        console.wrote(config.report)


def stream(config: ReconstructConfig, device: str) -> ReconstructionReport | None:
    """Reconstruct block by block from the disk; None, with a line that says why, where that cannot be."""
    import torch

    from spp.files.hub import local_directory
    from spp.pruning.reconstruction import reconstruct_checkpoint
    from spp.pruning.windows import needs_tokenizer
    from spp.training.loading import load_tokenizer

    directory = local_directory(config.pruned, "model")
    tokenizer = load_tokenizer(directory) if needs_tokenizer(config.calibration) else None
    with console.streaming(config.output, "loading both models"):
        return reconstruct_checkpoint(
            directory,
            config.output,
            local_directory(config.dense, "model"),
            config.calibration,
            tokenizer=tokenizer,
            nsamples=config.nsamples,
            seqlen=config.seqlen,
            options=config.options,
            bos=config.bos,
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            device=device,
            overwrite=config.overwrite,
        )


def load_and_reconstruct(config: ReconstructConfig, device: str) -> ReconstructionReport:
    """Load both models, reconstruct the pruned one and save it."""
    from spp.certifying.save import save_model
    from spp.files import check_target
    from spp.files.carry import refuse_overlap
    from spp.files.hub import local_directory
    from spp.pruning import reconstruct
    from spp.training.loading import load_model, load_tokenizer
    from spp.wrapping.adapters import save_adapter

    directory = local_directory(config.pruned, "model")
    refuse_overlap(config.output, directory, "the pruned model")
    check_target(config.output, overwrite=config.overwrite, copies=[directory])
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, config.dtype).to(device)
    found = reconstruct(
        model,
        load_model(config.dense, config.dtype).to(device),
        config.calibration,
        tokenizer=tokenizer,
        nsamples=config.nsamples,
        seqlen=config.seqlen,
        options=config.options,
        bos=config.bos,
    )
    if not is_first():
        return found
    if config.adapter is not None:
        save_adapter(model, config.output, overwrite=config.overwrite)
    else:
        save_model(model, config.output, tokenizer=tokenizer, overwrite=config.overwrite)
    return found
