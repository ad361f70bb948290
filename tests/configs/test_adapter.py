"""SPPConfig: validation, round trip, versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spp import SPPConfig
from spp.configs.checks import name_matches
from spp.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -3}, "r is -3"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"scaling": -1.0}, "scaling is -1.0"),
        ({"scaling": 0}, "scaling is 0"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"scaling": float("inf")}, "scaling is inf"),
        ({"scaling": "2"}, "scaling is '2'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout_mode": "output"}, "dropout_mode is 'output'"),
        ({"packed": 1}, "packed is 1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "empty string"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"format_version": 0}, "format_version"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SPPConfig(**options)
    with pytest.raises(ValueError):
        SPPConfig(**options)


def test_files_say_how_it_starts_and_no_other_start_is_known() -> None:
    values = SPPConfig().to_dict()
    assert values["init"] == "paper"
    assert SPPConfig.from_dict({k: v for k, v in values.items() if k != "init"}) == SPPConfig.from_dict(values)
    with pytest.raises(ConfigError, match="init is 'zeros'"):
        SPPConfig.from_dict({**values, "init": "zeros"})


def test_round_trip_through_json() -> None:
    config = SPPConfig(
        r=8,
        scaling=1.5,
        dropout=0.1,
        dropout_mode="alpha",
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 4},
        seed=7,
    )
    assert SPPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_newer_format_and_unknown_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="newer spp"):
        SPPConfig.from_dict({"format_version": 2, "something_new": 1})
    with pytest.raises(ConfigError, match="unknown config fields colour"):
        SPPConfig.from_dict({"colour": "red"})


def test_rank_for_takes_the_entry_that_matches() -> None:
    config = SPPConfig(r=16, rank_pattern={"mlp.up_proj": 4, r".*layers\.1\..*": 8})
    assert config.rank_for("model.layers.0.mlp.up_proj") == 4
    assert config.rank_for("model.layers.1.self_attn.q_proj") == 8
    assert config.rank_for("model.layers.0.self_attn.q_proj") == 16


def test_names_come_before_expressions_and_longer_ones_before_shorter() -> None:
    config = SPPConfig(r=16, rank_pattern={".*": 4, "self_attn.q_proj": 8, "q_proj": 2})
    assert SPPConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config
    assert config.rank_for("model.layers.0.self_attn.q_proj") == 8
    assert config.rank_for("model.layers.0.cross_attn.q_proj") == 2
    assert config.rank_for("model.layers.0.mlp.up_proj") == 4


def test_numbers_are_floats_whatever_was_given() -> None:
    assert json.dumps(SPPConfig(scaling=2, dropout=0).to_dict()) == json.dumps(SPPConfig(scaling=2.0).to_dict())


def test_a_name_matches_components_and_not_parts_of_them() -> None:
    assert name_matches("model.layers.0.mlp.up_proj", "up_proj")
    assert not name_matches("model.layers.0.mlp.gate_up_proj", "up_proj")
    assert name_matches("up_proj", "up_proj")
