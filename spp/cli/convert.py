"""spp convert: what another tool compressed, or masked, as a dense checkpoint with exact zeros."""

from __future__ import annotations

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import ConvertConfig

NAME = "convert"


@command(ConvertConfig)
def run(config: ConvertConfig) -> None:
    """Make a compressed checkpoint plain, or prune a dense one by ready-made masks; the zeros are exact and certified.

    Read are compressed-tensors' sparse-bitmask and sparse-24-bitmask, and masks in a safetensors or an .npz file, such
    as MaskLLM's: one for each weight, by its name, 1 or True where the weight is kept.

    Example: spp convert compressed pruned

    By masks: spp convert masks.safetensors pruned --dense MODEL
    """
    from spp.converting.checkpoint import convert
    from spp.report import sparsity_table

    sources = [("the source", config.source), ("the dense model", config.dense)]
    console.check_directory(config.output, config.overwrite, sources)
    with console.step(f"converting {config.source}"), console.log():
        report = convert(config.source, config.output, dense=config.dense, overwrite=config.overwrite)
    console.answer(report.to_dict())
    console.show(sparsity_table(report, every=config.every))
    console.wrote(config.output)
