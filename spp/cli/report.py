"""spp report: one page of what was done, what came out, and whether it holds."""

from __future__ import annotations

from pathlib import Path

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import ReportConfig

NAME = "report"


@command(ReportConfig)
def run(config: ReportConfig) -> None:
    """Put runs, checkpoints and results side by side on one HTML page, which needs no network.

    Results are what spp eval --json and spp prune --report wrote; numbers of another text, tokenizer or window get a
    column of their own. Models are loaded for --prompts only.

    Example: spp report run pruned merged results.json --dense MODEL --out report.html
    """
    from spp.files.recognised import PAGE

    out = config.out if config.out is not None or console.in_json() else Path("report.html")
    if out is not None:
        console.check_file(out, config.overwrite, PAGE)
    where = "cpu" if config.prompts is None else console.pick_device(config.device)
    console.quiet_libraries()
    with console.step("reading " + ", ".join(config.runs)):
        from spp.report import html_report

        found = html_report(
            config.runs,
            out,
            dense=config.dense,
            prompts=config.prompts,
            max_new_tokens=config.max_new_tokens,
            verify=config.verify,
            device=where,
            overwrite=config.overwrite,
        )
    console.answer(found.to_dict())
    for table in found.results():
        console.show(table)
    for note in found.notes:
        console.say(note)
    if out is not None:
        console.wrote(out)
