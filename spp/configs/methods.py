"""The options, learning rates and recipes that each tuning method has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from spp.configs.checks import check_choice
from spp.configs.pattern import Pattern
from spp.configs.pst import check_schedule
from spp.errors import ConfigError, arg

METHODS = ("spp", "pst")
LR = {"spp": 4e-3, "pst": 1e-4}  # the papers'
FULL_LR = 4e-4  # of the rule "full", whose parameters are as small as the weights'

_TAUGHT = {"teacher": "dense", "ce_weight": 0.3, "kl_weight": 0.7}

Recipes = Mapping[str, Mapping[str, Any]]
# Named sets of options; what a recipe does not name keeps the default of its field.
RECIPES: Recipes = {
    # SPP, Lu et al. 2024, its instruction-tuning setting without dropout: three matrix products a layer, not five.
    "default": {},
    # The same with the paper's dropout.
    "paper": {"dropout": 0.05, "dropout_mode": "input"},
    # For some hundred steps: the paper's learning rate is meant for about 1,200 and is too low for so few.
    "short": {"lr": 2e-2},
    # What repaired most in some hundred steps: every kept weight, by the predictions of the model before pruning and a
    # part of cross-entropy. It takes 16 bytes of memory for each weight.
    "best": {"rule": "full", "lr": FULL_LR, "schedule": "cosine", **_TAUGHT},
    # The same where that is too much: HiRA's form, whose parameters are few.
    "lean": {"rule": "hira", "r": 8, "scaling": 1.0, "lr": 2e-2, "schedule": "cosine", **_TAUGHT},
}
PST_RECIPES: Recipes = {
    "default": {},
    # PST, Li et al. 2022: no weight decay, no warm-up of the learning rate; GPT-2's learning rate, 1e-4.
    "paper": {"lr": 1e-4, "weight_decay": 0.0, "warmup_ratio": 0.0},
    # For some hundred steps.
    "short": {"lr": 1e-3},
}

# Options that one method alone has.
_OWN = {
    "spp": (
        *("r", "rank_pattern", "scaling", "dropout", "dropout_mode", "rule", "saved_activations", "strict_values"),
        *("also_train", "also_lr"),
    ),
    "pst": (
        *("pattern", "initial_sparsity", "initial_warmup", "final_warmup"),
        *("weight_rank", "weight_scale", "mask_rank", "low_rank_scale", "structured_scale"),
    ),
}
MASK_UPDATE_FIELDS = tuple(f"mask_update_{name}" for name in ("every", "fraction", "until", "decay", "drop", "grow"))


def check_methods(config: Any) -> None:
    """Check the options that one method alone has: that they are its, and make sense.

    Args:
        config: a TuneConfig.

    Raises:
        ConfigError: an option of another method is set, or one that the method needs is missing.
    """
    defaults = {f.name: f.default for f in fields(config)}
    others = {name: method for method in METHODS if method != config.method for name in _OWN[method]}
    if config.method != "spp":
        others |= dict.fromkeys((*MASK_UPDATE_FIELDS, "dense_model"), "spp")
    for name, method in others.items():
        if getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{arg(name)} is {getattr(config, name)!r}, which means nothing to {arg('method', config.method)}: it "
                f"is an option of {arg('method', method)}"
            )
    if config.also_lr is not None and not config.also_train:
        raise ConfigError(
            f"{arg('also_lr')} is {config.also_lr!r}, but nothing trains beside the adapter without "
            f"{arg('also_train', ...)}"
        )
    if config.method == "pst":
        if config.pattern is None:
            raise ConfigError(
                f'{arg("pattern", ...)} is missing: PST needs what to prune at the end, "N:M" or a fraction'
            )
        object.__setattr__(config, "pattern", str(Pattern.parse(config.pattern)))
        check_schedule(config.initial_warmup, config.final_warmup, config.initial_sparsity, config.final_sparsity)
    elif config.mask_update_every is None:
        needs_dense = config.own_tokens is not None
        for name in MASK_UPDATE_FIELDS if needs_dense else (*MASK_UPDATE_FIELDS, "dense_model"):
            if getattr(config, name) != defaults[name]:
                raise ConfigError(
                    f"{arg(name)} is {getattr(config, name)!r}, but there are no mask updates without "
                    f"{arg('mask_update_every', ...)}"
                )
    else:
        config.mask_updates()  # raises for an option that makes no sense
        if config.dense_model is None:
            raise ConfigError(
                f"{arg('dense_model', ...)} is missing: mask updates take the values of regrown weights from there"
            )


def recipe_of(recipe: str, method: object) -> Mapping[str, Any]:
    """Return the options that a method's recipe sets.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipes = PST_RECIPES if method == "pst" else RECIPES
    check_choice("recipe", recipe, tuple(recipes))
    return recipes[recipe]
