"""spp bench: the benchmarks of spp.bench, whose own options are passed on to them."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Benchmarks to run on your own machine.", no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "step",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def step(
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the benchmark; see `spp bench step --help`.")
    ] = None,
) -> None:
    """Time one training step of a whole model against PEFT's LoRA and HiRA.

    Example: spp bench step --model DIR --rounds 10 --out step.json
    """
    from spp.bench.step import main

    main(options or [], prog="spp bench step")
