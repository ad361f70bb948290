"""The contenders by name: a kind, and options after a colon, such as "spp:r=8,dropout=0.05".

The name is the row's label and all that is needed to run it again. `rank` is the option that sets how many parameters
train, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError


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

KINDS: Mapping[str, Kind] = {
    "spp": Kind(
        "SPP: W ⊙ (1 + s·A ⊙ β)",
        (1e-2, 2e-2, 4e-2),
        {**_SPP, "dropout": 0.0, "dropout_mode": "input"},
        rank="r",
    ),
    "spp-no-beta": Kind("SPP without β: W ⊙ (1 + s·A), A from zero", (4e-3, 1e-2, 2e-2), _SPP, rank="r"),
    "spp-random-beta": Kind(
        "SPP, β drawn as α is: it starts away from the pruned model", (1e-2, 2e-2, 4e-2), _SPP, rank="r"
    ),
    "hira": Kind("PEFT's HiRA: W ⊙ (1 + BA)", (4e-3, 1e-2, 2e-2), {"r": 8}, rank="r"),
    "hira-rule": Kind("the same formula as a rule of spp", (4e-3, 1e-2, 2e-2), {"r": 8, "scaling": 1.0}, rank="r"),
    "masked-lora": Kind("SparsePEFT: W + s·BA on the mask, a rule of spp", (2e-3, 4e-3, 8e-3), _LOW_RANK, rank="r"),
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
_SHARED = ("r", "scaling", "dropout", "dropout_mode")
REFERENCE = "spp"  # that costs are relative to


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
    def lrs(self) -> tuple[float, ...]:
        """The learning rates tried where none are given."""
        return KINDS[self.kind].lrs

    @property
    def keeps(self) -> bool:
        """Whether it keeps the pruned model's zeros by construction."""
        return KINDS[self.kind].keeps

    @property
    def from_dense(self) -> bool:
        """Whether it starts from the dense model."""
        return KINDS[self.kind].from_dense

    @property
    def needs_dense(self) -> bool:
        """Whether it needs the dense model."""
        return KINDS[self.kind].needs_dense

    @property
    def rank(self) -> str | None:
        """The option that is its rank."""
        return KINDS[self.kind].rank

    def with_rank(self, r: int) -> Contender:
        """Return the same with another rank."""
        assert self.rank is not None
        return replace(make_contender(self.kind, {**self.options, self.rank: r}), asked=self.asked)


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
