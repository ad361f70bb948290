"""Names of contenders: what they mean, and what is wrong with them."""

from __future__ import annotations

import pytest

from spp.comparing.methods import _METHODS, PST_KINDS
from spp.configs.comparing import GROUPS, KINDS, CompareConfig, parse_contender, parse_contenders
from spp.errors import ConfigError


def test_names_are_canonical() -> None:
    assert parse_contender("spp:dropout=0.05,r=16").name == "spp:dropout=0.05"
    spp = {"r": 8, "scaling": 2.0, "dropout": 0.0, "dropout_mode": "input", "also_train": ""}
    assert parse_contender("spp:r=8").options == spp
    assert parse_contender("spp:also_train=norms+head").options["also_train"] == "norms+head"
    with pytest.raises(ConfigError, match="names out of norms, biases, head"):
        parse_contender("hira-rule:also_train=all")
    assert parse_contender(" ia3 ").name == "ia3"
    for kind in KINDS:
        assert parse_contender(kind).name == kind


def test_groups_and_doubles() -> None:
    names = [contender.name for contender in parse_contenders(["ranks", "spp", "hira", "spp:r=4"])]
    assert names == ["spp:r=4", "spp:r=8", "spp", "spp:r=32", "hira"]
    for members in GROUPS.values():
        assert all(parse_contender(name).name for name in members)


def test_every_kind_has_a_method() -> None:
    assert {*_METHODS, *PST_KINDS, "spp-mask-updates"} == KINDS.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dora", "known are spp, .*groups main"),
        ("spp:alpha=3", "there is no option 'alpha'; spp has the options r, scaling"),
        ("spp:r=4,r=8", "r is given twice; several contenders have blanks between them"),
        ("spp:r", "no option=value"),
        ("spp:r=x", "r is 'x'; it must be int"),
        ("norms:r=3", "norms has no options"),
        ("hira:r=0", "contender 'hira:r=0': r is 0"),
        ("spp:dropout=1", "dropout is 1.0"),
        ("", "known are"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_contender(text)


def make(**options: object) -> CompareConfig:
    return CompareConfig(**{"model": "m", "output_dir": "o", "data": "t.txt", **options})  # type: ignore[arg-type]


def test_learning_rates_of_a_name_before_its_kind_before_all() -> None:
    config = make(contenders=("spp", "spp:r=8", "hira", "ia3"), lr=("spp:r=8=1e-3", "spp=4e-2,2e-2", "5e-3"))
    found = config.learning_rates(config.parsed())
    assert found == {"spp": (2e-2, 4e-2), "spp:r=8": (1e-3,), "hira": (5e-3,), "ia3": (5e-3,)}
    first, second, *others = config.parsed()
    assert config.learning_rates([first, second.with_rank(9), *others])["spp:r=9"] == (1e-3,)  # as it was asked for
    assert make(contenders=("hira",)).learning_rates(make(contenders=("hira",)).parsed())["hira"] == KINDS["hira"].lrs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "money"}, "budget is 'money'"),
        ({"budget": "time", "cost_rounds": 0}, "needs the time of a step"),
        ({"seeds": ()}, "seeds is"),
        ({"seeds": (1, 1)}, "seeds is"),
        ({"test_windows": 0}, "test_windows is 0"),
        ({"lr": ("fast",)}, "lr is 'fast'"),
        ({"lr": ("spp=-1",)}, "number above 0 and at most 1e"),
        ({"lr": ("spp=1e99",)}, "number above 0 and at most 1e"),
        ({"lr": ("nan",)}, "number above 0 and at most 1e"),
        ({"lr": ("dora=1",)}, "contender 'dora'"),
        ({"contenders": ("spp",), "lr": ("spp:r=8=1e-2",)}, "spp:r=8 is not among the contenders"),
        ({"contenders": ("spp-mask-updates:every=0",), "dense": "d"}, "updates:every=0': mask_update_every is 0"),
        ({"contenders": ("spp-mask-updates:fraction=2",), "dense": "d"}, "mask_update_fraction is 2"),
        ({"steps": 0}, "steps is 0"),
        ({"contenders": ("pst",)}, "dense is None, but pst"),
        ({"window": 1}, "^window is 1; it must be an int of at least 2"),
        ({"overwrite": True, "resume": True}, "overwrite=True and resume=True exclude"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


def test_options_of_training_reach_it() -> None:
    given = {"weight_decay": 0.5, "warmup_ratio": 0.25, "schedule": "cosine", "max_grad_norm": 2.0, "window": 64}
    given |= {"completions_only": False, "batch_size": 3, "block_length": 32, "dtype": "bfloat16", "device": "cpu"}
    given |= {"data_format": "text", "eval_text": "v.txt", "data": ("a.txt", "b.txt"), "model": "pruned", "steps": 7}
    config = make(**given)
    recipe = config.recipe(2e-3, 5)
    for name, value in given.items():
        assert getattr(recipe, {"window": "eval_window"}.get(name, name)) == value, name
    assert (recipe.lr, recipe.seed, config.recipe(1.0, 0, 9).steps) == (2e-3, 5, 9)


def test_conditions_hold_no_folder() -> None:
    config = make(model="/some/where/pruned", data="/a/t.txt", eval_text="/a/v.txt", dense="/b/dense")
    assert "/" not in "".join(str(value) for value in config.conditions().values())
