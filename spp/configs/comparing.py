"""CompareConfig: what is compared, on what, how long, and how a learning rate is chosen; the contenders by name.

The name of a contender is a kind, with options after a colon, such as "spp:r=8,dropout=0.05". It is the row's label and
all that is needed to run the contender again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from spp.configs.adapter import SPPConfig
from spp.configs.checks import AUTO_DTYPES, check_choice, check_int
from spp.configs.distillation import Distillation
from spp.configs.options import DATA, EVALUATION, METHOD, MODEL, OPTIMISATION, RUN, Option
from spp.configs.pruning import BOS_OPTION, MaskUpdateOptions
from spp.configs.tuning import LARGEST_LR, TRAINING_DEVICES, TuneConfig
from spp.errors import ConfigError, arg

BUDGETS = ("steps", "time", "parameters")


@dataclass(frozen=True)
class Kind:
    """One way to train a pruned model.

    Attributes:
        summary: for the help.
        lrs: learning rates that are tried where none are given; for some hundred steps.
        options: names and defaults.
        keeps: whether the merged model has the pruned one's zeros, by construction.
        rank: the option that is its rank.
        from_dense: whether it starts from the model before it was pruned.
        needs_dense: whether it needs that model at all.
    """

    summary: str
    lrs: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    keeps: bool = True
    rank: str | None = None
    from_dense: bool = False
    needs_dense: bool = False


_SPP = {"r": 16, "scaling": 2.0}
_LOW_RANK = {"r": 8, "scaling": 2.0}
_ALSO = {"also_train": ""}  # such as norms+biases, at a rate of their own

KINDS: Mapping[str, Kind] = {
    "spp": Kind(
        "SPP: W ⊙ (1 + s·A ⊙ β)",
        (1e-2, 2e-2, 4e-2),
        {**_SPP, "dropout": 0.0, "dropout_mode": "input", **_ALSO},
        rank="r",
    ),
    "spp-no-beta": Kind("SPP without β: W ⊙ (1 + s·A), A from zero", (4e-3, 1e-2, 2e-2), _SPP, rank="r"),
    "spp-random-beta": Kind(
        "SPP, β drawn as α is: it starts away from the pruned model", (1e-2, 2e-2, 4e-2), _SPP, rank="r"
    ),
    "hira": Kind("PEFT's HiRA: W ⊙ (1 + BA)", (4e-3, 1e-2, 2e-2), {"r": 8}, rank="r"),
    "hira-rule": Kind(
        "the same formula as a rule of spp", (4e-3, 1e-2, 2e-2), {"r": 8, "scaling": 1.0, **_ALSO}, rank="r"
    ),
    "masked-lora": Kind(
        "SparsePEFT: W + s·BA on the mask, a rule of spp", (2e-3, 4e-3, 8e-3), {**_LOW_RANK, **_ALSO}, rank="r"
    ),
    "lora-remasked": Kind("PEFT's LoRA, masked once it is trained", (2e-3, 4e-3, 8e-3), _LOW_RANK, rank="r"),
    "lora": Kind("PEFT's LoRA, which fills the zeros", (2e-3, 4e-3, 8e-3), _LOW_RANK, keeps=False, rank="r"),
    "ia3": Kind("PEFT's IA³ on keys, values and down projections", (1e-2, 3e-2, 1e-1)),
    "norms": Kind("norm weights and biases alone", (5e-3, 1e-2, 2e-2)),
    "full": Kind("every parameter, zeros frozen", (1e-4, 2e-4, 4e-4)),
    "spp-mask-updates": Kind(
        "SPP that prunes and regrows every so many steps",
        (1e-2, 2e-2, 4e-2),
        {**_SPP, "every": 10, "fraction": 0.1},
        keeps=False,
        rank="r",
        needs_dense=True,
    ),
    "pst": Kind(
        "PST from the dense model: it learns its own zeros, as many",
        (1e-3, 2e-3, 4e-3),
        {"r": 8},
        keeps=False,
        rank="r",
        from_dense=True,
        needs_dense=True,
    ),
    "pst-pruned": Kind(
        "PST from the pruned model: zeros may move", (1e-3, 2e-3, 4e-3), {"r": 8}, keeps=False, rank="r"
    ),
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "main": ("spp", "hira", "masked-lora", "lora-remasked", "ia3", "norms", "full", "pst-pruned"),
    "ranks": ("spp:r=4", "spp:r=8", "spp:r=16", "spp:r=32"),
    "dropout": ("spp:dropout=0.05", "spp:dropout=0.05,dropout_mode=alpha"),
    "ablations": ("spp-no-beta", "spp-random-beta"),
}
_SHARED = ("r", "scaling", "dropout", "dropout_mode", "also_train")
REFERENCE = "spp"  # that costs are relative to
_TRAINING = (  # options that CompareConfig shares with TuneConfig, and all rows of one results.json
    *("batch_size", "block_length", "dtype", "data_format", "completions_only"),
    *("weight_decay", "warmup_ratio", "schedule", "max_grad_norm"),
)
_OF_A_RUN = ("bos", "data", "output_dir", "model", "eval_text", "device", "overwrite", "resume")  # others shared


@dataclass(frozen=True)
class Contender:
    """A kind with its options.

    Attributes:
        name: canonical: options that are the defaults left out, others in the kind's order.
        kind: its name in KINDS.
        options: all of them.
        asked: the name that was asked for, where a budget of parameters has given it another rank.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    asked: str

    @property
    def traits(self) -> Kind:
        """The facts of its kind."""
        return KINDS[self.kind]

    def with_rank(self, r: int) -> Contender:
        """Return the same with another rank."""
        assert self.traits.rank is not None
        return replace(make_contender(self.kind, {**self.options, self.traits.rank: r}), asked=self.asked)


def parse_contender(text: str) -> Contender:
    """Return the contender that a name means.

    Raises:
        ConfigError: no such kind or option, or a value that is none.

    Example:
        >>> parse_contender("spp:r=16,dropout=0.05").name
        'spp:dropout=0.05'
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise ConfigError(f"contender {text!r}: known are {', '.join(KINDS)}, and the groups {', '.join(GROUPS)}")
    known, given = KINDS[kind].options, {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        has = f"has the options {', '.join(known)}" if known else "has no options"
        if not equals:
            raise ConfigError(f"contender {text!r}: {part!r} is no option=value; {kind} {has}")
        if name not in known:
            raise ConfigError(f"contender {text!r}: there is no option {name!r}; {kind} {has}")
        if name in given:
            raise ConfigError(f"contender {text!r}: {name} is given twice; several contenders have blanks between them")
        given[name] = _value(text, name, value, known[name])
    return make_contender(kind, {**known, **given})


def make_contender(kind: str, options: Mapping[str, Any]) -> Contender:
    """Return a contender with its canonical name."""
    known = KINDS[kind].options
    ordered = {name: options[name] for name in known}
    told = [f"{name}={_text(value)}" for name, value in ordered.items() if value != known[name]]
    name = f"{kind}:{','.join(told)}" if told else kind
    try:
        # What it allows for r, scaling and dropout, every method does.
        SPPConfig(**{name: value for name, value in ordered.items() if name in _SHARED})
    except ConfigError as error:
        raise ConfigError(f"contender {name!r}: {error}") from None
    return Contender(name, kind, ordered, name)


def parse_contenders(names: Sequence[str]) -> list[Contender]:
    """Return the contenders of a list of names and groups, each once, in order."""
    texts = [text for name in names for text in GROUPS.get(name, (name,))]
    found = {contender.name: contender for contender in map(parse_contender, texts)}
    if not found:
        raise ConfigError(f"there is no contender; known are {', '.join(KINDS)}, and the groups {', '.join(GROUPS)}")
    return list(found.values())


def _value(text: str, name: str, value: str, default: Any) -> Any:
    kind = type(default)
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"contender {text!r}: {name} is {value!r}; it must be {kind.__name__}") from None


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
class CompareConfig(Distillation):
    """The options of a comparison: each field has its Option, whose text is the help; those without are TuneConfig's.

    With a budget of "steps" each contender gets `steps`; of "time", as many as fit into the time of the reference's; of
    "parameters", contenders with a rank get the one whose parameters are nearest to the reference's. Learning rates
    (`lr`) are those of every contender, "4e-3", or of one by its name or kind, "hira=4e-3,1e-2". With a teacher, every
    contender has the loss of spp.training.distillation; "dense" is `dense`, or what the certificate names.

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
            "several in quotes with blanks between them, or repeated. --list shows all.",
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
    extend: Annotated[
        int, Option("Further learning rates to try where the best is the lowest or the highest.", OPTIMISATION)
    ] = 1
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
        Option(
            "Equal for all contenders: steps, time, or parameters (where there is a rank).", METHOD, choices=BUDGETS
        ),
    ] = "steps"
    steps: Annotated[int, Option("Optimizer steps; with --budget time, those of spp.", OPTIMISATION)] = 100
    batch_size: Annotated[int, Option("Rows of a step.", OPTIMISATION)] = 2
    block_length: Annotated[int, Option("Tokens of a row.", DATA)] = 128
    bos: Annotated[str, BOS_OPTION] = "auto"
    window: Annotated[int, Option("Tokens of a window of text that is measured.", EVALUATION)] = 512
    test_windows: Annotated[int, Option("Windows of text, or instruction rows, to measure on.", EVALUATION)] = 20
    validation_windows: Annotated[int, Option("Other windows or rows, to choose the learning rate by.", EVALUATION)] = (
        10
    )
    cost_rounds: Annotated[int, Option("Interleaved rounds of the step times; 0 measures no cost.", EVALUATION)] = 5
    dtype: Annotated[str, Option("auto, float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)] = "float32"
    overwrite: Annotated[bool, Option("Replace the results that are there.", RUN)] = False
    resume: Annotated[bool, Option("Continue with the results that are there.", RUN)] = False
    data_format: str = "auto"
    completions_only: bool = True
    weight_decay: float = 0.001
    warmup_ratio: float = 0.03
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    device: Annotated[str, Option("auto or cpu.", MODEL, choices=TRAINING_DEVICES)] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_weights(self.taught)
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
        if self.budget == "time" and self.taught:
            raise ConfigError(
                f"{arg('budget')} is 'time', which is the time of a step without a teacher: pass "
                f"{arg('budget', 'steps')}, or leave the teacher out"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"{arg('seeds')} is {self.seeds!r}; it must name each seed once, and one at least")
        for seed in self.seeds:
            self.recipe(1.0, seed)  # checks the options that it shares with tuning
        contenders = self.parsed()
        self.learning_rates(contenders)
        needy = [contender.name for contender in contenders if contender.traits.needs_dense]
        if needy and self.dense is None:
            raise ConfigError(f"{arg('dense')} is None, but {', '.join(needy)} needs the dense model: say where it is")
        for contender in contenders:
            if contender.kind == "spp-mask-updates":
                _check_mask_updates(contender)

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.teacher_cache is not None

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
            found = next((given[n] for n in (contender.asked, contender.kind, "") if n in given), contender.traits.lrs)
            chosen[contender.name] = tuple(sorted(set(found)))
        return chosen

    def recipe(self, lr: float, seed: int, steps: int | None = None) -> TuneConfig:
        """Return the options of one training run; every contender's are the same but for these three."""
        same = {name: getattr(self, name) for name in (*_TRAINING, *_OF_A_RUN)}
        return TuneConfig(**same, lr=lr, seed=seed, steps=steps or self.steps, eval_window=self.window)

    def conditions(self) -> dict[str, Any]:
        """Return what all rows of one results.json share, paths by their last part: they differ between machines."""
        recipe = self.recipe(1.0, 0)
        names = ("budget", "steps", "test_windows", "validation_windows", "window")
        taught = self.distillation if self.taught else {}
        return {
            **{name: Path(one).name if isinstance(one, str) else one for name, one in taught.items()},
            **{name: getattr(self, name) for name in (*names, *_TRAINING)},
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
