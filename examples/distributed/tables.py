"""Write the tables of README.md anew: what LLaMA-7B to 70B take on each GPU, by the planner.

Run it in this folder after a change of the planner: python tables.py
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from spp.configs.planning import FORMS, PlanConfig
from spp.files.tables import Table
from spp.planning import ModelShape, plan, shape_of
from spp.planning.shape import read_config

HERE = Path(__file__).parent
MODELS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-70b")
GPUS, GIB = 8, 2**30
PAPER = (("llama-7b", "ddp", False), ("llama-30b", "fsdp", True), ("llama-2-70b", "fsdp", True))


def config_of(model: str) -> str:
    """Return the path of a model's config."""
    return str(HERE / "configs" / f"{model}.json")


@cache
def shape(model: str) -> ModelShape:
    """Return the shape of a model, which takes the most of the time."""
    return shape_of(read_config(config_of(model)))


def forms() -> str:
    """A row a model and form of the weights: GiB on each GPU, with checkpointing, 1 × 2048 tokens."""
    rows = []
    for model in MODELS:
        for form in FORMS:
            cells = []
            for strategy, world in (("none", 1), ("ddp", GPUS), ("fsdp", GPUS)):
                found = plan(
                    PlanConfig(
                        model=config_of(model),
                        weights=form,
                        world=world,
                        strategy=strategy,
                        gradient_checkpointing=True,
                    ),
                    shape(model),
                )
                cells.append(f"{found.memory.total / GIB:.1f}")
            rows.append((model, form, *cells))
    return Table("", ("model", "weights", "one GPU", "8 × DDP", "8 × FSDP2"), tuple(rows)).markdown()


def paper() -> str:
    """The paper's rows on 8 GPUs of 80 GB: the plan of each, and its command."""
    parts = []
    for model, strategy, checkpointing in PAPER:
        found = plan(
            PlanConfig(
                model=config_of(model),
                world=GPUS,
                strategy=strategy,
                memory="80GB",
                gradient_checkpointing=checkpointing,
            ),
            shape(model),
        )
        assert found.largest_batch is not None
        command = found.command.replace(config_of(model), f"{model}-2of4")
        command = command.replace(" -m ", " \\\n  -m ").replace(" run --data", " run \\\n  --data")
        rows = ", ".join(map(str, found.largest_batch))
        totals = ", ".join(f"{one.total / GIB:.1f}" for one in (found.memory, found.lora, found.full))
        parts.append(
            f"**{model}**, 1 × 2048 tokens a GPU: {totals} GiB with SPP, with LoRA, and fine-tuned in full;\n"
            f"the largest batches in 80 GB are {rows} rows.\n\n```bash\n{command}\n```"
        )
    return "\n\n".join(parts)


def written(text: str) -> str:
    """Return README.md with its tables made anew."""
    for name, made in (("forms", forms()), ("paper", paper())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, b=begin, m=made, e=end: f"{b}\n{m}\n{e}", text, flags=re.S)
    return text


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
