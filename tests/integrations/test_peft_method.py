"""How SPP becomes a PEFT method: the enumeration, the registration, the versions."""

from __future__ import annotations

import copy
import enum
import importlib.metadata
import json
import pickle
import re

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from spp.errors import ConfigError, DependencyError
from spp.integrations import peft as method
from spp.integrations.peft import SPPPeftConfig, SPPPeftModel, add_member, register


class Fruit(str, enum.Enum):
    PEAR = "PEAR"
    FIG = "FIG"


def test_a_member_is_added_as_if_it_had_been_declared() -> None:
    plum = add_member(Fruit, "PLUM")
    assert Fruit("PLUM") is plum and Fruit["PLUM"] is plum and Fruit.PLUM is plum  # type: ignore[attr-defined]
    assert list(Fruit) == [Fruit.PEAR, Fruit.FIG, plum] and len(Fruit) == 3 and plum in Fruit
    assert plum == "PLUM" and hash(plum) == hash("PLUM") and {plum: 1}["PLUM"] == 1  # type: ignore[index]
    assert isinstance(plum, Fruit) and plum.name == plum.value == "PLUM" and repr(plum) == "<Fruit.PLUM: 'PLUM'>"
    assert pickle.loads(pickle.dumps(plum)) is plum and copy.deepcopy(plum) is plum
    assert json.dumps({"type": plum}) == '{"type": "PLUM"}'
    assert add_member(Fruit, "PLUM") is plum and len(Fruit) == 3
    with pytest.raises(ValueError, match="QUINCE"):
        Fruit("QUINCE")


def test_peft_knows_the_method() -> None:
    spp_type = PeftType("SPP")
    assert PEFT_TYPE_TO_TUNER_MAPPING[spp_type] is SPPPeftModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPP"] is SPPPeftConfig  # as a config file names it
    assert PEFT_TYPE_TO_PREFIX_MAPPING[spp_type] == "spp_"
    register()  # again: nothing happens
    assert list(PeftType).count(spp_type) == 1


@pytest.mark.parametrize(
    ("version", "works"),
    [("0.19.1", False), ("0.20.0", True), ("0.21.2", True), ("0.21.9", True), ("0.22.0", False), ("1.0", False)],
)
def test_other_versions_are_refused(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if works:
        assert method.require_peft() == version
        return
    message = rf"does not work with peft {re.escape(version)}.*0\.20\.0 to 0\.21.*'peft>=0\.20\.0,<0\.22'"
    with pytest.raises(DependencyError, match=message):
        method.require_peft()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DependencyError, match=r"pip install 'spp\[peft\]'"):
        method.require_peft()


def test_a_version_that_is_built_otherwise_gives_one_message() -> None:
    message = r"it was tested with .*AttributeError: no register"
    with pytest.raises(DependencyError, match=message), method.explained():
        raise AttributeError("no register")


def test_the_range_is_that_of_pyproject() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    wanted = f'"peft>={method.OLDEST.removesuffix(".0")},<{method.BEYOND}"'
    assert text.count(wanted) == text.count('"peft>=') == 2  # the extras peft and test


def test_config_fields_are_those_of_spp_and_are_checked() -> None:
    config = SPPPeftConfig(r=8, target_modules={"up_proj", "q_proj"}, rank_pattern={})
    assert config.spp_config().target_modules == ("q_proj", "up_proj") and config.spp_config().rank_pattern is None
    assert config.to_dict()["target_modules"] == ["q_proj", "up_proj"]
    assert "also_train" not in config.to_dict()
    assert config.peft_type is PeftType("SPP") and not config.is_prompt_learning
    for options, message in [
        ({"r": 0}, "r is 0"),
        ({"scaling": -1.0}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
        ({"rule": "other"}, "rule is 'other'"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"base_masks": ["x"]}, "base_masks"),
        ({"also_train": ["norms"]}, "modules_to_save"),
        ({"format_version": 2}, "newer spp"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SPPPeftConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task type"):
        SPPPeftConfig(task_type="NONE")


def test_config_copies_and_pickles() -> None:
    config = SPPPeftConfig(r=8)
    assert copy.deepcopy(config) == config and pickle.loads(pickle.dumps(config)) == config
    assert isinstance(config, PeftConfig)
