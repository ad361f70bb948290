"""SPPPeftConfig: SPPConfig's options as a PEFT config, in the adapter_config.json that both sides read."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType
from torch import nn

from spp.configs.adapter import FORMAT_VERSION, INITS, SPPConfig
from spp.configs.checks import check_choice
from spp.errors import AdapterError, ConfigError
from spp.files import mask_sha256
from spp.wrapping.adapter_files import why_malformed
from spp.wrapping.adapters import base_values

COMBINATIONS = ("stack", "svd")
_SPP_FIELDS = tuple(field.name for field in fields(SPPConfig))


@dataclass
class SPPPeftConfig(PeftConfig):
    """The config of an SPP adapter in PEFT; see `spp.SPPConfig` for what the first fields mean.

    Target modules are chosen as `spp.wrap` chooses them (None: the projections of the decoder blocks). Once the adapter
    is in a model, `target_modules` names exactly what was chosen.

    Args:
        r, scaling, dropout, dropout_mode, target_modules, exclude_modules, rank_pattern, rule, packed, seed,
            format_version: as in spp.SPPConfig.
        init: "paper", the only start; adapter files say it.
        layers_to_transform, layers_pattern: as in PEFT: only targets of these layers.
        also_train: none: PEFT has `modules_to_save` for that, and other names are refused.
        modules_to_save: as in PEFT: modules that are trained and saved as a whole.
        base_masks: {module path: hash of its zeros} of the base that the adapter was trained on. Filled in when it is
            saved; where it is given, an adapter is refused on a base with other zeros (None skips this check and the
            next).
        base_values, base_forms: {module path: hash of its values} and {module path: what was hashed}, likewise
            (spp.weights.base_values); a base with the same zeros and other values is warned of.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> SPPPeftConfig(r=8, dropout=0.05, task_type="CAUSAL_LM").peft_type.value
        'SPP'
    """

    r: int = 16
    scaling: float = 2.0
    dropout: float = 0.0
    dropout_mode: str = "input"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    init: str = "paper"
    rule: str = "spp"
    packed: bool = False
    seed: int | None = None
    format_version: int = FORMAT_VERSION
    also_train: list[str] | tuple[str, ...] = ()
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_masks: dict[str, str] | None = None
    base_values: dict[str, str] | None = None
    base_forms: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPP
        check_choice("init", self.init, INITS)
        if self.spp_config().also_train:
            raise ConfigError(
                f"also_train is {self.also_train!r}: what trains beside an adapter in PEFT is named in "
                f"modules_to_save; an adapter that spp trained so is loaded with spp.load_adapter"
            )
        if self.rule != "spp":
            raise ConfigError(f"rule is {self.rule!r}; the PEFT plug-in knows 'spp'")
        if self.layers_to_transform is None and self.layers_pattern:
            raise ConfigError("layers_pattern is given without layers_to_transform, which says which layers")
        masks = self.base_masks
        if masks is not None and not (isinstance(masks, Mapping) and all(isinstance(m, str) for m in masks.values())):
            raise ConfigError("base_masks must map module paths to hashes, or be None")
        if (problem := why_malformed(self.base_values, self.base_forms)) is not None:
            raise ConfigError(problem)

    def spp_config(self) -> SPPConfig:
        """Return the same as an SPPConfig.

        Raises:
            ConfigError: an option makes no sense.
        """
        values = {name: getattr(self, name) for name in _SPP_FIELDS}
        values["rank_pattern"] = values["rank_pattern"] or None  # PEFT's configs have an empty one
        for name in ("target_modules", "exclude_modules"):
            values[name] = values[name] or None
        return SPPConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; sets as sorted lists, so that files do not depend on their order."""
        values = super().to_dict()
        del values["also_train"]  # there is none
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def belongs_to(self, model: nn.Module, adapter: str) -> None:
        """Remember which model and adapter this is the config of, so that saving can tell the base's zeros."""
        self._owner = weakref.ref(model), adapter

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the zeros and the values of the base that the adapter was trained on.

        Those are of the base that it is in; of an adapter that was loaded and not trained since, what its files said.

        Raises:
            AdapterError: the adapter is a sum of others, which no adapter file can hold.
        """
        masks = self._masks_now()
        if masks and not self._is_as_loaded():
            known = base_values((path, layer.held()) for path, layer in self._layers().items())
            self.base_values, self.base_forms = known["base_values"], known["base_forms"]
        self.base_masks = masks or self.base_masks
        super().save_pretrained(save_directory, **kwargs)

    def require_savable(self) -> None:
        """Raise an AdapterError for a sum of adapters."""
        for layer in self._layers().values():
            if len(layer.spp_terms[self._owner[1]]) > 1:
                raise AdapterError(
                    f"adapter {self._owner[1]!r} is a sum of several, which no adapter file can hold: save these, "
                    f"merge the sum into the model (merge_and_unload), or make it with combination_type='svd'"
                )

    def _masks_now(self) -> dict[str, str]:
        self.require_savable()
        weights = ((path, layer.base_weight()) for path, layer in self._layers().items())  # one copy at a time
        return {path: mask_sha256(weight) for path, weight in weights if not weight.is_meta}

    def _is_as_loaded(self) -> bool:
        """Whether the config came from files that say the zeros, and the adapter has the values that were loaded."""
        layers = self._layers().values()
        return self.base_masks is not None and all(layer.is_as_loaded(self._owner[1]) for layer in layers)

    def _layers(self) -> dict[str, Any]:
        model = self._owner[0]() if hasattr(self, "_owner") else None
        if model is None:
            return {}
        modules = model.named_modules()
        return {path: m for path, m in modules if hasattr(m, "spp_terms") and self._owner[1] in m.spp_terms}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}


# ---- The config of a weighted sum of adapters.


def require_combination(
    configs: Mapping[str, SPPPeftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination: str,
    r: int | None,
) -> None:
    """Raise a ConfigError unless these adapters can be combined so."""
    unknown = sorted(set(adapters) - configs.keys())
    if not adapters or unknown:
        raise ConfigError(f"adapters: there is no {', '.join(unknown) or 'name given'}; known: {', '.join(configs)}")
    if len(set(adapters)) < len(adapters):
        raise ConfigError(f"adapters: a name comes twice in {list(adapters)}; add its weights up")
    if len(weights) != len(adapters) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights are {list(weights)}; they must be {len(adapters)} finite numbers, one an adapter")
    if name in configs or not name or "." in name:
        raise ConfigError(f"adapter_name is {name!r}; it must be a new name without dots")
    if combination not in COMBINATIONS:
        raise ConfigError(f"combination_type is {combination!r}; known: {', '.join(COMBINATIONS)}")
    if r is not None and combination != "svd":
        raise ConfigError("r is given for a stack, which keeps the rank of each adapter; it is for 'svd'")
    if r is not None:
        SPPConfig(r=r)
    saved = [adapter for adapter in adapters if configs[adapter].modules_to_save]
    if saved:
        raise ConfigError(f"{', '.join(saved)} also trained modules_to_save as a whole, for which there is no sum")


def combined_config(first: SPPPeftConfig, ranks: Mapping[str, int], targets: Sequence[str]) -> SPPPeftConfig:
    """Return the config of a sum: of the first adapter's kind, with the rank of each layer."""
    r = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    config = replace(
        first,
        r=r,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r} or None,
        target_modules=set(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_masks=None,
        base_values=None,
        base_forms=None,
        seed=None,
    )
    config.inference_mode = True
    return config
