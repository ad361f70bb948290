"""spp export: a pruned checkpoint packed, and a packed one dense again."""

from __future__ import annotations

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import ExportConfig

NAME = "export"


@command(ExportConfig)
def run(config: ExportConfig) -> None:
    """Pack a pruned checkpoint, which then takes the space of its kept weights, or make a packed one plain again.

    spp.load_packed loads a packed checkpoint, spp verify checks it, and it comes back bit for bit.

    Example: spp export pruned packed --packed
    """
    from spp.packing.export import export_dense, export_packed
    from spp.report import byte_text, export_table

    directory, output, overwrite = config.directory, config.output, config.overwrite
    console.check_directory(output, overwrite, [("the checkpoint", directory)])
    with console.step(f"{'packing' if config.packed else 'unpacking'} {directory}"):
        if config.packed:
            report = export_packed(directory, output, strict_bits=config.strict_bits, overwrite=overwrite)
        else:
            report = export_dense(directory, output, overwrite=overwrite)
    console.answer(report.to_dict())
    console.show(export_table(report, every=config.every))
    console.say(f"all weights: {byte_text(report.dense_bytes)} dense, {byte_text(report.packed_bytes)} packed")
    console.wrote(output)
