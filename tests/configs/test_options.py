"""What fields say of themselves: their types, spellings and defaults, and that names agree with what they stand for."""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from spp.configs.adapter import RULES
from spp.configs.checkpoints import CertifyConfig, ExportConfig, InspectConfig, MergeConfig, PushConfig, VerifyConfig
from spp.configs.checks import AUTO_DTYPES
from spp.configs.comparing import CompareConfig
from spp.configs.evaluating import EvalConfig
from spp.configs.options import GROUPS, MODEL, RUN, Option, options_of
from spp.configs.pruning import METHODS, OWL, PruneConfig, PruneOptions
from spp.configs.tuning import TuneConfig
from spp.errors import ConfigError
from spp.rules import RULES as REGISTRY

VERBS = (PruneConfig, TuneConfig, MergeConfig, VerifyConfig, CertifyConfig)
CONFIGS = (*VERBS, InspectConfig, EvalConfig, CompareConfig, ExportConfig, PushConfig)


@dataclass(frozen=True)
class _Inner:
    depth: Annotated[int, Option("Depth.")] = 2


@dataclass(frozen=True)
class _Config:
    place: Annotated[Path, Option("Where.", argument=True)]
    word: Annotated[str | float | None, Option("A word.", MODEL)] = None
    size: Annotated[int, Option("Size.", name="--width", short="-w")] = 3
    both: Annotated[bool, Option("Both.", negatable=True)] = True
    on: Annotated[bool, Option("On.")] = False
    inner: Annotated[_Inner | None, Option("Inner.")] = None
    told: Annotated[int | None, Option("Told.", default="all")] = None
    hidden: int = 5


def test_what_fields_say() -> None:
    found = {field.name: field for field in options_of(_Config)}
    assert list(found) == ["place", "word", "size", "both", "on", "inner", "told"]
    assert [field.type for field in found.values()] == [Path, str, int, bool, bool, _Inner, int]
    assert [field.spelling for field in found.values()] == [
        *("PLACE", "--word", "--width", "--both", "--on", "--inner", "--told"),
    ]
    assert [field.off for field in found.values() if field.off] == ["--no-both"]
    assert [field.required for field in found.values()] == [True] + [False] * 6
    assert [field.help for field in found.values()] == [
        *("Where.", "A word.", "Size (default: 3).", "Both (default: on).", "On.", "Inner.", "Told (default: all)."),
    ]
    assert [(part.name, part.spelling) for part in found["inner"].nested] == [("inner_depth", "--inner-depth")]


def test_parameters_of_a_function_say_the_same() -> None:
    def build(name: Annotated[str, Option("Name.", RUN)] = "x", **others: Any) -> None: ...

    (field,) = options_of(build)
    assert (field.name, field.type, field.default, field.option.group) == ("name", str, "x", RUN)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_what_every_verb_says_is_whole(config: type) -> None:
    for field in options_of(config):
        assert field.option.group in GROUPS, field.name
        assert field.option.help.endswith("."), field.name
        assert "(default" not in field.option.help or config is MergeConfig, field.name  # the generator adds it
        if field.option.choices and field.default not in (MISSING, None):
            assert field.default in field.option.choices, field.name
        if field.option.many:
            assert field.option.parse is not None, field.name


@pytest.mark.parametrize("config", [c for c in CONFIGS if c is not CompareConfig], ids=lambda c: c.__name__)
def test_every_field_of_a_verb_is_an_option(config: type) -> None:
    assert {field.name for field in options_of(config)} == {field.name for field in fields(config)}


def test_names_stand_for_what_there_is() -> None:
    assert sorted(RULES) == sorted(REGISTRY)
    for name in AUTO_DTYPES[1:]:
        assert isinstance(getattr(torch, name), torch.dtype)
    assert all(PruneOptions(name, calibration="a/b").method == name for name in METHODS)


def test_a_verb_on_pruning_hands_on_the_options_of_the_function() -> None:
    config = PruneConfig(model="m", output=Path("o"), method="magnitude", pattern=0.5, owl=None)
    plain = PruneOptions("magnitude", 0.5)
    assert {f.name: getattr(config, f.name) for f in fields(plain)} == asdict(plain)
    with pytest.raises(ConfigError, match="OWL's threshold is 0"):
        OWL(threshold=0)


@pytest.mark.parametrize(
    ("make", "said", "option"),
    [
        (lambda: ExportConfig(directory="d", output=Path("o")), "pass one of packed=True and dense=True", None),
        (lambda: VerifyConfig(before="a", after="b", against="c"), "against names the pruned checkpoint", "against"),
        (lambda: MergeConfig(base="b", adapters=(("a", 1.0),), output=Path("o"), dtype="auto"), "dtype is", "dtype"),
        (lambda: EvalConfig(model="m", text=Path("t"), window=1), "window is 1", "window"),
        (lambda: InspectConfig(path="p", plot=Path("a.bmp")), "plot is a.bmp", "plot"),
        (lambda: PushConfig(directory=Path("d"), repo_id="alone"), "repo_id is 'alone'", "repo_id"),
        (lambda: PruneConfig(model="m", output=Path("o"), method="magnitude", device="tpu"), "device is", "device"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(make: Any, said: str, option: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value).startswith(said)
    assert refused.value.option == option


def test_the_two_ways_to_name_the_checkpoints_of_verify() -> None:
    assert VerifyConfig(before="a", after="b").pair == ("a", "b")
    assert VerifyConfig(before="b", against="a").pair == ("a", "b")
    assert VerifyConfig(before="a").pair == ("a", None)


def test_paths_may_be_of_any_kind() -> None:
    config = TuneConfig(model=Path("m"), data=Path("a.txt"), output_dir=Path("run"))
    assert (config.model, config.data, config.output_dir) == ("m", ("a.txt",), "run")
    assert os.fspath(config.output_dir) == "run"
