"""Named sets of tuning options, some for each method; what a recipe does not name keeps the default of its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spp.errors import ConfigError

Recipes = Mapping[str, Mapping[str, Any]]

RECIPES: Recipes = {
    # SPP, Lu et al. 2024, its instruction-tuning setting without dropout: three matrix products a layer, not five.
    "default": {},
    # The same with the paper's dropout.
    "paper": {"dropout": 0.05, "dropout_mode": "input"},
    # For some hundred steps: the paper's learning rate is meant for about 1,200 and is too low for so few.
    "short": {"lr": 2e-2},
}
PST_RECIPES: Recipes = {
    "default": {},
    # PST, Li et al. 2022: no weight decay, no warm-up of the learning rate; GPT-2's learning rate, 1e-4.
    "paper": {"lr": 1e-4, "weight_decay": 0.0, "warmup_ratio": 0.0},
    # For some hundred steps.
    "short": {"lr": 1e-3},
}


def recipe_of(recipe: str, method: object) -> Mapping[str, Any]:
    """Return the options that a method's recipe sets.

    Raises:
        ConfigError: there is no such recipe.
    """
    recipes = PST_RECIPES if method == "pst" else RECIPES
    if recipe not in recipes:
        raise ConfigError(f"recipe is {recipe!r}; known: {', '.join(recipes)}")
    return recipes[recipe]
