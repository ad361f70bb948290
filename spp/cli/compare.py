"""spp compare: SPP and its peers on one pruned model, one data set, one trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spp.cli import console
from spp.cli.options import command
from spp.configs.comparing import GROUPS, KINDS, CompareConfig
from spp.configs.options import RUN, Option

if TYPE_CHECKING:
    from spp.comparing.results import Results

NAME = "compare"


def _show_all(wanted: bool) -> None:
    if not wanted:
        return
    from spp.report import Table

    told = {name: {"summary": one.summary, "options": one.options, "lrs": one.lrs} for name, one in KINDS.items()}
    console.answer({"contenders": told, "groups": GROUPS})
    rows = []
    for name, kind in KINDS.items():
        options = ", ".join(f"{option}={value}" for option, value in kind.options.items())
        rows.append((name, kind.summary, options, ", ".join(f"{lr:g}" for lr in kind.lrs)))
    console.show(Table("contenders", ("name", "what it is", "options", "learning rates"), tuple(rows)))
    for name, members in GROUPS.items():
        console.say(f"{name}: {' '.join(members)}")
    raise typer.Exit()


@command(CompareConfig)
def run(
    config: CompareConfig,
    plot: Annotated[Path | None, Option("Draw quality against cost: a .png, .svg or .pdf file.", RUN)] = None,
    list_all: Annotated[
        bool,
        typer.Option(
            "--list",
            is_eager=True,
            callback=_show_all,
            help="Show the contenders and their options.",
            rich_help_panel=RUN,
        ),
    ] = False,
) -> None:
    """Compare SPP with its peers: perplexity, zeros, parameters, time and memory under one trainer.

    Every contender trains on the same batches at its best learning rate, and is measured after its own merge. Ctrl-C
    loses the trial that runs; the same command with --resume continues, also in several processes at once.

    Example: spp compare pruned comparison --data train.txt --eval-text valid.txt --contenders "spp hira masked-lora"
    """
    from spp.comparing.results import NAME
    from spp.comparing.study import compare
    from spp.files.hub import local_directory
    from spp.files.recognised import PICTURE
    from spp.report.plot import check_plot

    if plot is not None:
        check_plot(plot)
        console.check_file(plot, config.overwrite or config.resume, PICTURE)
    local_directory(str(config.model), "model")
    console.quiet_libraries()
    with console.log():
        try:
            results = compare(config)
        except KeyboardInterrupt:  # typer turns it into exit code 130 and says nothing
            path = Path(str(config.output_dir)) / NAME
            console.note(f"interrupted{f'; --resume goes on with what {path} holds' if path.exists() else ''}")
            raise
    show(results, plot, overwrite=config.overwrite or config.resume)


def show(results: Results, plot: Path | None, *, overwrite: bool) -> None:
    """Print the table of a comparison, and draw its chart."""
    from spp.comparing.chart import draw
    from spp.comparing.results import REPORT
    from spp.comparing.tables import main_table, notes, verdict

    contents = results.read()
    ranking, lines = verdict(contents), notes(contents)
    console.answer({**contents, "verdict": ranking, "notes": lines})
    console.show(main_table(contents))
    for line in filter(None, (ranking, *lines)):
        console.say(line)
    console.wrote(results.path)
    console.wrote(results.path.with_name(REPORT))
    if plot is not None:
        draw(contents, plot, overwrite=overwrite)
        console.wrote(plot)
