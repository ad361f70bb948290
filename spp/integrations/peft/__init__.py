"""SPP as a method of PEFT: importing this module registers it.

    import spp.integrations.peft
    model = get_peft_model(model, spp.integrations.peft.SPPPeftConfig(r=16, task_type="CAUSAL_LM"))

From then on PEFT's own functions know it: several adapters and switching between them, `disable_adapter`,
`merge_and_unload`, `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`, transformers' `model.load_adapter`, Trainer
and TRL. The directories are those of `spp.save_adapter`: either side reads what the other wrote. The layers compute
with spp's kernels, and a merge stores, bit for bit, what `spp.merge` stores.

PEFT names its methods by an enumeration and refuses others, so a member is added to it: by hand, as the machinery of
`enum` would have made it. Loading, saving and transformers' adapters look the method up there.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
from collections.abc import Iterator
from typing import Any, TypeVar

from spp.errors import DependencyError
from spp.supported import numbers

OLDEST, NEWEST = "0.20.0", "0.21.2"  # both tested
BEYOND = "0.22"  # the first that is refused: what the plug-in overrides may be built otherwise there
Member = TypeVar("Member", bound=enum.Enum)


def add_member(cls: type[Member], name: str) -> Member:
    """Add a member to an enumeration of strings; its value is its name. One that is there already is returned.

    Example:
        >>> class Fruit(str, enum.Enum):
        ...     PEAR = "PEAR"
        >>> add_member(Fruit, "FIG")
        <Fruit.FIG: 'FIG'>
        >>> Fruit("FIG") is Fruit["FIG"] is Fruit.FIG  # type: ignore[attr-defined]
        True
    """
    internals: Any = cls
    if name in internals._member_map_:
        found: Member = internals._member_map_[name]
        return found
    member: Any = str.__new__(internals, name)
    member._name_ = member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(internals._member_names_)
    internals._member_names_.append(name)
    internals._member_map_[name] = member
    internals._value2member_map_[name] = member
    if isinstance(hashable := cls.__dict__.get("_hashable_values_"), list):
        hashable.append(name)
    type.__setattr__(cls, name, member)  # enum's own __setattr__ is for outsiders; from Python 3.12 on it is looked up
    added: Member = member
    return added


def register() -> None:
    """Tell PEFT of the method; a second time does nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    if add_member(PeftType, "SPP") in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    from spp.integrations.peft.config import SPPPeftConfig
    from spp.integrations.peft.model import SPPPeftModel
    from spp.integrations.peft.terms import PREFIX

    register_peft_method(name="spp", config_cls=SPPPeftConfig, model_cls=SPPPeftModel, prefix=PREFIX)


def require_peft() -> str:
    """Return PEFT's version.

    Raises:
        DependencyError: it is missing, or outside the range that the plug-in works with.
    """
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise DependencyError("spp.integrations.peft needs PEFT: pip install 'spp[peft]'") from None
    if not numbers(OLDEST) <= numbers(version) < numbers(BEYOND):
        raise DependencyError(_refusal(version))
    return version


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say which versions work, where registering with the installed one fails because it is built otherwise."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DependencyError):
            raise
        found = f"{type(error).__name__}: {error}"
        raise DependencyError(f"{_refusal(importlib.metadata.version('peft'))} ({found})") from error


def _refusal(version: str) -> str:
    return (
        f"spp.integrations.peft does not work with peft {version}: it was tested with {OLDEST} to {NEWEST}. "
        f"Install one of these: pip install 'peft>={OLDEST},<{BEYOND}'"
    )


require_peft()
with explained():
    register()
    from spp.integrations.peft.config import SPPPeftConfig
    from spp.integrations.peft.layer import SPPPeftExperts, SPPPeftLinear
    from spp.integrations.peft.model import SPPPeftModel

__all__ = ["SPPPeftConfig", "SPPPeftExperts", "SPPPeftLinear", "SPPPeftModel"]
