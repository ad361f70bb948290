"""spp bench: the benchmarks of spp.bench, whose own options are passed on to them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Benchmarks to run on your own machine.\n\nExample: spp bench step --model DIR --rounds 10 --out step.json",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}
Options = Annotated[list[str] | None, typer.Argument(help="Options of the benchmark; see its --help.")]


@app.command("step", **PASSED_ON)
def step(options: Options = None) -> None:
    """Time one training step of a whole model against PEFT's LoRA and HiRA.

    Example: spp bench step --model DIR --rounds 10 --out step.json
    """
    from spp.bench.step import main

    main(options or [], prog="spp bench step")


@app.command("layer", **PASSED_ON)
def layer(options: Options = None) -> None:
    """Time one training step of a linear layer against its peers and against full fine-tuning of the layer.

    Example: spp bench layer --layers 4096x4096 11008x4096 --tokens 512 2048 --plot layer.png
    """
    from spp.bench.layer import main

    main(options or [], prog="spp bench layer")


@app.command("prune", **PASSED_ON)
def prune(options: Options = None) -> None:
    """Time pruning, method by method, against the forward passes that it cannot avoid.

    Example: spp bench prune --model DIR --calibration texts.txt --out prune.json
    """
    from spp.bench.prune import main

    main(options or [], prog="spp bench prune")


@app.command("merge", **PASSED_ON)
def merge(options: Options = None) -> None:
    """Time the merge of an adapter into a checkpoint on disk against a plain copy of the same files.

    Example: spp bench merge --shape llama-7b --blocks 16 --directory scratch
    """
    from spp.bench.merge import main

    main(options or [], prog="spp bench merge")


@app.command("gpu", **PASSED_ON)
def gpu(options: Options = None) -> None:
    """Check every GPU kernel against float64, and time a layer's training step on a GPU against its peers.

    Without a GPU, --interpret runs the checks alone.

    Example: spp bench gpu --out gpu.json
    """
    from spp.bench.gpu import main

    main(options or [], prog="spp bench gpu")


@app.command("memory", **PASSED_ON)
def memory(options: Options = None) -> None:
    """Measure the memory of a training step of a whole model, each contender in a fresh process.

    Example: spp bench memory --model DIR --contenders spp spp-low-memory lora --out memory.json
    """
    from spp.bench.memory import main

    main(options or [], prog="spp bench memory")
