"""CompareConfig: what is compared, on what, how long, and how a learning rate is chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spp.configs.checks import AUTO_DTYPES, check_choice, check_int
from spp.configs.contenders import Contender, parse_contender, parse_contenders
from spp.configs.mask_updates import MaskUpdateOptions
from spp.configs.options import DATA, EVALUATION, METHOD, MODEL, OPTIMISATION, RUN, Option
from spp.configs.tuning import LARGEST_LR, TRAINING_DEVICES, TuneConfig
from spp.errors import ConfigError, arg

BUDGETS = ("steps", "time", "parameters")


def parse_contenders_typed(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names that `--contenders` means: several with blanks between them, or repeated."""
    return tuple(name for text in values for name in text.split())


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds that `--seeds` means, with blanks or commas between them.

    Raises:
        ConfigError: one is no whole number.
    """
    for part in (parts := text.replace(",", " ").split()):
        if not part.isdigit():
            raise ConfigError(f"{arg('seeds')}: {part!r} is no whole number of at least 0")
    return tuple(map(int, parts))


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The options of a comparison.

    Args:
        model: directory or hub id of the pruned model.
        output_dir: where results.json and results.md go.
        data: training files, as in TuneConfig: text, or instruction rows, of which the answers are learned.
        contenders: names (spp.configs.contenders) and groups: main, ranks, dropout, ablations.
        dense: the model before it was pruned: for a row of its own, for PST to start from, for mask updates; None
            leaves them out.
        eval_text: text to measure on; None holds back part of the training data.
        lr: learning rates: "4e-3" for every contender, "hira=4e-3,1e-2" for one (a name or a kind); what is not named
            takes those of its kind.
        extend: how many learning rates beyond the given ones may be tried where the best is the lowest or highest.
        seeds: of initial values and order of data; learning rates are searched with the first.
        budget: "steps": each contender gets `steps`; "time": as many as fit into the time of the reference's;
            "parameters": contenders with a rank get the one whose parameters are nearest to the reference's; others
            have as many as they have.
        steps: optimizer steps, of the reference where the budget is time.
        batch_size, block_length: rows and tokens of a step.
        window: tokens of a window of text.
        test_windows, validation_windows: windows of text, or instruction rows, to measure on and to choose by.
        cost_rounds: interleaved rounds for step times; 0 measures no cost.
        dtype: to load models in.
        overwrite: begin anew in an output directory that holds results.
        resume: go on with the results in the output directory.
        data_format, completions_only, weight_decay, warmup_ratio, schedule, max_grad_norm, device: as in TuneConfig.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """

    model: Annotated[str | os.PathLike[str], Option("Directory or hub id of the pruned model.", argument=True)]
    output_dir: Annotated[
        str | os.PathLike[str], Option("Directory for results.json and results.md.", type=Path, argument=True)
    ]
    data: Annotated[
        str | os.PathLike[str] | tuple[str | os.PathLike[str], ...],
        Option("Training data, as for spp tune; may be repeated.", DATA, many=True, parse=tuple),
    ]
    contenders: Annotated[
        tuple[str, ...],
        Option(
            "Names with options, such as spp:r=8,dropout=0.05, or the groups main, ranks, dropout, ablations; "
            "several with blanks between them, or repeated. --list shows all.",
            METHOD,
            default="main",
            type=str,
            many=True,
            parse=parse_contenders_typed,
        ),
    ] = ("main",)
    dense: Annotated[
        str | os.PathLike[str] | None,
        Option("The model before it was pruned: for a row of its own, for PST and mask updates.", MODEL),
    ] = None
    eval_text: Annotated[
        str | os.PathLike[str] | None,
        Option("Text to measure on.", EVALUATION, type=Path, default="held out from the data"),
    ] = None
    lr: Annotated[
        tuple[str, ...],
        Option(
            "Learning rates to choose from: 4e-3,1e-2 for all, hira=4e-3,1e-2 for one; may be repeated.",
            OPTIMISATION,
            default="three of each contender's own",
            type=str,
            many=True,
            parse=tuple,
        ),
    ] = ()
    extend: Annotated[int, Option("Learning rates tried beyond these where the best is at an end.", OPTIMISATION)] = 1
    seeds: Annotated[
        tuple[int, ...],
        Option(
            "Seeds; the learning rate is chosen with the first.",
            OPTIMISATION,
            default="0",
            type=str,
            parse=parse_seeds,
        ),
    ] = (0,)
    budget: Annotated[
        str,
        Option("What is equal: steps, time, or parameters (where there is a rank).", METHOD, choices=BUDGETS),
    ] = "steps"
    steps: Annotated[int, Option("Optimizer steps; with --budget time, those of spp.", OPTIMISATION)] = 100
    batch_size: Annotated[int, Option("Rows of a step.", OPTIMISATION)] = 2
    block_length: Annotated[int, Option("Tokens of a row.", DATA)] = 128
    window: Annotated[int, Option("Tokens of a window of text that is measured.", EVALUATION)] = 512
    test_windows: Annotated[int, Option("Windows of text, or instruction rows, to measure on.", EVALUATION)] = 20
    validation_windows: Annotated[int, Option("Others, to choose the learning rate by.", EVALUATION)] = 10
    cost_rounds: Annotated[int, Option("Interleaved rounds of the step times; 0 measures no cost.", EVALUATION)] = 5
    dtype: Annotated[str, Option("auto, float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)] = "float32"
    overwrite: Annotated[bool, Option("Begin anew where there are results.", RUN)] = False
    resume: Annotated[bool, Option("Go on with the results that there are.", RUN)] = False
    data_format: str = "auto"
    completions_only: bool = True
    weight_decay: float = 0.001
    warmup_ratio: float = 0.03
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    device: Annotated[str, Option("auto or cpu.", MODEL, choices=TRAINING_DEVICES)] = "auto"

    def __post_init__(self) -> None:
        for name in ("contenders", "lr", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choice("budget", self.budget, BUDGETS)
        leasts = {"extend": 0, "window": 2, "test_windows": 1, "validation_windows": 1, "cost_rounds": 0}
        for name, least in leasts.items():
            check_int(name, getattr(self, name), least=least)
        if self.budget == "time" and not self.cost_rounds:
            raise ConfigError(
                f"{arg('budget')} is 'time', which needs the time of a step, but {arg('cost_rounds')} is 0"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"{arg('seeds')} is {self.seeds!r}; it must name each seed once, and one at least")
        for seed in self.seeds:
            self.recipe(1.0, seed)  # checks the options that it shares with tuning
        contenders = self.parsed()
        self.learning_rates(contenders)
        needy = [contender.name for contender in contenders if contender.needs_dense]
        if needy and self.dense is None:
            raise ConfigError(f"{arg('dense')} is None, but {', '.join(needy)} needs the dense model: say where it is")
        for contender in contenders:
            if contender.kind == "spp-mask-updates":
                _check_mask_updates(contender)

    def parsed(self) -> list[Contender]:
        """Return the contenders, each once, in order."""
        return parse_contenders(self.contenders)

    def learning_rates(self, contenders: Sequence[Contender]) -> dict[str, tuple[float, ...]]:
        """Return {contender's name: learning rates to try, ascending}; those of its name, its kind, all, or its own."""
        given: dict[str, list[float]] = {}
        for text in self.lr:
            name, equals, numbers = text.rpartition("=")
            name = parse_contender(name).name if equals else ""
            if name and not any(name in (contender.asked, contender.kind) for contender in contenders):
                raise ConfigError(
                    f"{arg('lr')} is {text!r}, but {name} is not among the contenders; leave it out, or add it"
                )
            given.setdefault(name, []).extend(_numbers(text, numbers))
        chosen = {}
        for contender in contenders:
            found = next((given[n] for n in (contender.asked, contender.kind, "") if n in given), contender.lrs)
            chosen[contender.name] = tuple(sorted(set(found)))
        return chosen

    def recipe(self, lr: float, seed: int, steps: int | None = None) -> TuneConfig:
        """Return the options of one training run; every contender's are the same but for these three."""
        return TuneConfig(
            data=self.data,
            output_dir=self.output_dir,
            model=self.model,
            eval_text=self.eval_text,
            lr=lr,
            seed=seed,
            steps=steps or self.steps,
            batch_size=self.batch_size,
            block_length=self.block_length,
            eval_window=self.window,
            dtype=self.dtype,
            data_format=self.data_format,
            completions_only=self.completions_only,
            weight_decay=self.weight_decay,
            warmup_ratio=self.warmup_ratio,
            schedule=self.schedule,
            max_grad_norm=self.max_grad_norm,
            device=self.device,
            overwrite=self.overwrite,
            resume=self.resume,
        )

    def conditions(self) -> dict[str, Any]:
        """Return what all rows of one results.json share, paths by their last part: they differ between machines."""
        recipe = self.recipe(1.0, 0)
        names = ("budget", "steps", "batch_size", "block_length", "test_windows", "validation_windows", "dtype")
        shared = ("data_format", "completions_only", "weight_decay", "warmup_ratio", "schedule", "max_grad_norm")
        return {
            **{name: getattr(self, name) for name in (*names, *shared)},
            "window": self.window,
            "model": Path(str(self.model)).name,
            "dense": None if self.dense is None else Path(str(self.dense)).name,
            "data": [Path(name).name for name in recipe.data_files],
            "eval_text": None if self.eval_text is None else Path(str(self.eval_text)).name,
        }


def _check_mask_updates(contender: Contender) -> None:
    options = contender.options
    try:
        MaskUpdateOptions(every=options["every"], fraction=options["fraction"])
    except ConfigError as error:
        raise ConfigError(f"contender {contender.name!r}: {error}") from None


def _numbers(text: str, numbers: str) -> list[float]:
    try:
        found = [float(number) for number in numbers.split(",")]
    except ValueError:
        raise ConfigError(f"{arg('lr')} is {text!r}; it must be a number, or CONTENDER=number,number") from None
    if not all(0 < number <= LARGEST_LR for number in found):
        raise ConfigError(
            f"{arg('lr')} is {text!r}; a learning rate must be a number above 0 and at most {LARGEST_LR:g}"
        )
    return found
