"""The rules: how a frozen weight and a few small trained matrices make the weight that the model computes with.

One file a rule, in plain torch. The autograd function, the merge, the reports and the files know rules, not SPP: adding
one means adding a file here and a line to `RULES`.
"""

from __future__ import annotations

from spp.errors import ConfigError
from spp.rules.adapter import Adapter, effective_block, effective_weight, rescue_
from spp.rules.base import Rule
from spp.rules.full import FullRule
from spp.rules.low_rank import HiRARule, MaskedLoRARule
from spp.rules.spp import SPPRule

RULES: dict[str, Rule] = {rule.name: rule for rule in (SPPRule(), HiRARule(), MaskedLoRARule(), FullRule())}


def get_rule(name: str) -> Rule:
    """Return the rule called `name`; a ConfigError lists those that there are."""
    try:
        return RULES[name]
    except KeyError:
        raise ConfigError(f"there is no rule {name!r}; known: {', '.join(sorted(RULES))}") from None


__all__ = ["RULES", "Adapter", "Rule", "effective_block", "effective_weight", "get_rule", "rescue_"]
