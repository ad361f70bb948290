"""spp merge: a checkpoint and what was trained on it in, one plain checkpoint out; a pruned one keeps its zeros."""

from __future__ import annotations

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import MergeConfig
from spp.errors import ConfigError, arg

NAME = "merge"


@command(MergeConfig)
def run(config: MergeConfig) -> None:
    """Merge adapters into their pruned model, shard by shard; every zero stays a zero.

    Given the output of PST, prune the dense model by the masks that PST has learned.

    Example: spp merge pruned run/adapter merged

    Of several adapters the weighted sum is merged: spp merge pruned maths:0.7 code:0.3 merged
    """
    import torch

    from spp.merging.disk import merge_checkpoint
    from spp.pst.files import convert_checkpoint
    from spp.report import merge_table, sparsity_table
    from spp.wrapping.adapter_files import PST_TYPE, method_of

    base, adapters, output = config.base, config.adapters, config.output
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    sources = [("the base", base), *(("the adapter", name) for name, _ in adapters)]
    console.check_directory(output, config.overwrite, sources)
    of_pst = [name for name, _ in adapters if method_of(name) == PST_TYPE]
    if of_pst:
        _check_pst(of_pst[0], config)
        with console.step(f"converting {base} by {of_pst[0]}"):
            zeros = convert_checkpoint(
                base, of_pst[0], output, dtype=dtype, overwrite=config.overwrite, dry_run=config.dry_run
            )
        console.answer({"dry_run": config.dry_run, "sparsity_report": zeros.to_dict()})
        console.show(sparsity_table(zeros, every=config.every))
    else:
        names = [name if weight == 1 else f"{name}:{weight:g}" for name, weight in adapters]
        with console.step(f"merging {', '.join(names)} into {base}"):
            report = merge_checkpoint(
                base,
                list(adapters),
                output,
                dtype=dtype,
                rounding=config.rounding,
                seed=config.seed,
                overwrite=config.overwrite,
                dry_run=config.dry_run,
                strict_values=config.strict_values,
                dense=config.dense,
            )
        console.answer({"dry_run": config.dry_run, **report.to_dict()})
        console.show(merge_table(report, every=config.every))
        if report.also_line:
            console.say(report.also_line)
        if report.base.line:
            console.say(report.base.line)
    if config.dry_run:
        console.say(f"nothing was written: without --dry-run the merged checkpoint goes to {output}")
    else:
        console.wrote(output)


def _check_pst(name: str, config: MergeConfig) -> None:
    """Refuse what does not go with an output of PST."""
    if len(config.adapters) > 1 or config.adapters[0][1] != 1:
        raise ConfigError(f"{name} is what PST trained: it is merged alone, and without a weight")
    if config.dense is not None:
        raise ConfigError(f"{arg('dense')} is for checkpoints of runs with mask updates; what PST trained needs none")
    if config.rounding != "nearest" or config.seed is not None:
        raise ConfigError(
            f"{arg('rounding')} and {arg('seed')} are for adapters of SPP; what PST trained is rounded to nearest"
        )
