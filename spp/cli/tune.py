"""spp tune: a model and data in, a run directory with the tuned adapter out."""

from __future__ import annotations

from typing import Any

from spp.cli import console
from spp.cli.options import command
from spp.cli.ranks import ranks
from spp.configs.tuning import TuneConfig

NAME = "tune"


@command(TuneConfig, build=TuneConfig.from_recipe)
@ranks()
def run(config: TuneConfig) -> None:
    """Tune a pruned model with an adapter that keeps its zeros, or prune a dense one while it trains (--method pst).

    Ctrl-C saves a checkpoint; the same command with --resume continues from it. Then: spp merge MODEL RUN/adapter
    MERGED; after mask updates, with RUN/base for MODEL.

    Started by torchrun or accelerate launch, each process trains on its share of every batch: --batch-size is that of
    each.

    Example: spp tune pruned run --data train.txt --steps 200 --lr 2e-2

    Example: spp tune dense run --data train.txt --method pst --pattern 2:4 --recipe short --steps 300
    """
    from spp.files.hub import local_directory
    from spp.training import TrainingInterrupted, tune

    local_directory(str(config.model), "model")  # fails, or fetches a hub id, before anything else
    console.quiet_libraries()
    with console.step(f"tuning {config.model}"), console.log():
        try:
            result = tune(config)
        except TrainingInterrupted as stop:  # typer turns a KeyboardInterrupt into exit code 130 and says nothing
            console.note(console.said(stop))
            raise
    show(result)


def show(result: Any) -> None:
    """Print the perplexities, and where the run is."""
    from spp.files.provenance import Provenance

    here = Provenance.here(str(result.model.device), result.model.dtype)
    console.answer({**here.to_dict(), **result.to_dict()})
    console.show(result.table())
    console.wrote(result.run_dir)
    console.wrote(result.adapter_dir)
    if result.base_dir is not None:
        console.wrote(result.base_dir)
