"""spp compare: SPP and its peers on one pruned model, one data set, one trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spp.cli import console

NAME = "compare"


def _show_all(wanted: bool) -> None:
    if not wanted:
        return
    from spp.bench.compare.contenders import GROUPS, KINDS
    from spp.report import Table

    rows = []
    for name, kind in KINDS.items():
        options = ", ".join(f"{option}={value}" for option, value in kind.options.items())
        rows.append((name, kind.summary, options, ", ".join(f"{lr:g}" for lr in kind.lrs)))
    console.show(Table("contenders", ("name", "what it is", "options", "learning rates"), tuple(rows)))
    for name, members in GROUPS.items():
        console.say(f"{name}: {' '.join(members)}")
    raise typer.Exit()


def run(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the pruned model.")],
    output_dir: Annotated[Path, typer.Argument(help="Directory for results.json and results.md.")],
    data: Annotated[list[str], typer.Option(help="Training data, as for spp tune; may be repeated.")],
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with options, such as spp:r=8,dropout=0.05, or the groups main, ranks, dropout, ablations; "
            "several with blanks between them, or repeated (default: main). --list shows all."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The model before it was pruned: for a row of its own, for PST and mask updates.")
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text to measure on (default: held out from the data).")
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Learning rates to choose from: 4e-3,1e-2 for all, hira=4e-3,1e-2 for one; may be repeated "
            "(default: three of each contender's own)."
        ),
    ] = None,
    extend: Annotated[int, typer.Option(help="Learning rates tried beyond these where the best is at an end.")] = 1,
    seeds: Annotated[str, typer.Option(help="Seeds; the learning rate is chosen with the first.")] = "0",
    budget: Annotated[
        str, typer.Option(help="What is equal: steps, time, or parameters (where there is a rank).")
    ] = "steps",
    steps: Annotated[int, typer.Option(help="Optimizer steps; with --budget time, those of spp.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 2,
    block_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens of a window of text that is measured.")] = 512,
    test_windows: Annotated[int, typer.Option(help="Windows of text, or instruction rows, to measure on.")] = 20,
    validation_windows: Annotated[int, typer.Option(help="Others, to choose the learning rate by.")] = 10,
    cost_rounds: Annotated[int, typer.Option(help="Interleaved rounds of the step times; 0 measures no cost.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw quality against cost: a .png, .svg or .pdf file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where there are results.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the results that there are.")] = False,
    list_all: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_show_all, help="Show the contenders and their options.")
    ] = False,
) -> None:
    """Compare SPP with its peers: perplexity, zeros, parameters, time and memory under one trainer.

    Every contender trains on the same batches at its best learning rate, and is measured after its own merge. Ctrl-C
    loses the trial that runs; the same command with --resume goes on, in several processes at once if need be.

    Example: spp compare pruned comparison --data train.txt --eval-text valid.txt --contenders "spp hira masked-lora"
    """
    given: dict[str, Any] = {k: v for k, v in locals().items() if v is not None and k not in ("plot", "list_all")}
    given["contenders"] = tuple(name for text in contenders or ["main"] for name in text.split())
    given["lr"], given["data"] = tuple(lr or ()), tuple(data)
    given["seeds"] = tuple(_seed(text) for text in seeds.replace(",", " ").split())
    compare_with(given, plot, overwrite=overwrite or resume)


def compare_with(given: dict[str, Any], plot: Path | None, *, overwrite: bool) -> None:
    """Run the comparison and print its table."""
    from spp.bench.compare.chart import draw
    from spp.bench.compare.config import CompareConfig
    from spp.bench.compare.results import NAME, REPORT
    from spp.bench.compare.study import compare
    from spp.bench.compare.tables import main_table, notes, verdict
    from spp.files.hub import local_directory
    from spp.files.recognised import PICTURE
    from spp.report_plot import check_plot

    config = CompareConfig(**given)
    if plot is not None:
        check_plot(plot)
        console.check_file(plot, overwrite, PICTURE)
    local_directory(given["model"], "model")
    console.quiet_libraries()
    with console.log():
        try:
            results = compare(config)
        except KeyboardInterrupt:  # typer turns it into exit code 130 and says nothing
            path = Path(str(config.output_dir)) / NAME
            console.note(f"interrupted{f'; --resume goes on with what {path} holds' if path.exists() else ''}")
            raise
    contents = results.read()
    console.show(main_table(contents))
    for line in filter(None, (verdict(contents), *notes(contents))):
        console.say(line)
    console.wrote(results.path)
    console.wrote(results.path.with_name(REPORT))
    if plot is not None:
        draw(contents, plot, overwrite=overwrite)
        console.wrote(plot)


def _seed(text: str) -> int:
    from spp.errors import ConfigError

    if not text.isdigit():
        raise ConfigError(f"--seeds: {text!r} is no whole number of at least 0")
    return int(text)
