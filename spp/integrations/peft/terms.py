"""A tuner layer's adapters, each a sum of terms; which of them are active, and which are merged into the weight.

The active adapters' terms are summed, W_eff = W · (1 + Σ_t (s_t·β_t) · A_t) (spp.rules.terms; one term: spp.rules.spp).
An adapter made by `spp.save_adapter` or `get_peft_model` is one term; a weighted combination of adapters is several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError
from spp.files.hashes import content_sha256
from spp.merging.report import LayerMerge
from spp.rules import Adapter, Rule
from spp.rules.adapter import arithmetic_dtype, idle_reason
from spp.rules.terms import TermsRule
from spp.weights import DenseWeight, Weight, converting
from spp.weights.offload import HookedAdapter
from spp.wrapping.state import layer_generator

PREFIX = "spp_"
Before = Any  # W as it was before a merge: a Tensor, a packed Weight, or the PackedLinear that held it


class Term(NamedTuple):
    """One SPP adapter's part of a sum.

    Attributes:
        rank: r, its rows of α.
        scaling: s, times its weight in the combination.
    """

    rank: int
    scaling: float


class AdapterDict(HookedAdapter, nn.ParameterDict):
    """Parameters by the name of their adapter, which no hook of accelerate takes away; they keep their dtype."""

    def resident_names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(self._parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterDict:
        """Convert or move; parameters follow the device, but keep the dtype of the arithmetic."""
        with converting(self, self.resident_names(), fn):
            super()._apply(fn, recurse)
        return self

    def is_as_loaded(self, adapter: str) -> bool:
        """Whether an adapter's parameter was loaded, and has not been written to since."""
        parameter, loaded = self._parameters.get(adapter), self.__dict__.get("_loaded", {})
        if parameter is None or parameter.is_meta or adapter not in loaded:
            return False
        return content_sha256(parameter) == str(loaded[adapter])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = self.__dict__.setdefault("_loaded", {})
        for adapter, parameter in self._parameters.items():
            if prefix + adapter in state_dict and parameter is not None and not parameter.is_meta:
                loaded[adapter] = content_sha256(parameter)


class TermsLayer(BaseTunerLayer):
    """A tuner layer's adapters; a matrix's, or with a leading dimension those of E experts.

    Attributes:
        spp_alpha: {adapter: α (…, Σ r_t, n)}; spp_beta: {adapter: β (…, m, terms)}; usually (…, r, n) and (…, m, 1).
        spp_terms: {adapter: its terms}.
        spp_merge: what the last merge did, or None.
    """

    adapter_layer_names = ("spp_alpha", "spp_beta")
    other_param_names = ("spp_terms", "spp_dropout")
    spp_rule: Rule
    spp_name: str
    in_features: int
    out_features: int
    input_axis: int
    training: bool
    num_experts: int

    def _init_terms(self, rule: Rule, where: str) -> None:
        self.spp_rule = rule
        self.spp_name = where
        self.spp_alpha = AdapterDict()
        self.spp_beta = AdapterDict()
        self.spp_terms: dict[str, tuple[Term, ...]] = {}
        self.spp_dropout: dict[str, tuple[float, str]] = {}
        self.spp_merge: LayerMerge | None = None
        self.merged_adapters: list[str] = []
        self._before_merge: tuple[Before, ...] = ()  # one, or none; in a tuple: no submodule

    def held_now(self) -> Weight:
        """Return W as it is now, after a merge the merged one."""
        raise NotImplementedError

    def write_merged(self, weight: Tensor) -> Before:
        """Hold a merged weight, as it is stored, and return the one before."""
        raise NotImplementedError

    def write_back(self, before: Before) -> None:
        """Hold again what `write_merged` has returned."""
        raise NotImplementedError

    def is_offloaded(self) -> bool:
        """Whether accelerate has the weight offloaded."""
        raise NotImplementedError

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here."""
        raise NotImplementedError

    def drop_cache(self) -> None:
        """Forget what was computed from the adapters."""

    def held(self) -> Weight:
        """Return W as it was before any merge."""
        for before in self._before_merge:
            if isinstance(before, Tensor):
                return DenseWeight(before, self.input_axis)
            held: Weight = before if isinstance(before, Weight) else before.held()
            return held
        return self.held_now()

    def base_weight(self) -> Tensor:
        """Return W as it was before any merge, as it is stored; an offloaded one is loaded, a packed one decoded."""
        return self.held().dense()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the active adapters, or those named, in place of the base weight.

        Adapters that are merged already are merged together with these, from the weight before: one rounding. The
        result is checked whether or not `safe_merge` asks for it.

        Args:
            safe_merge: PEFT's; without effect.
            adapter_names: of the adapters; None merges the active ones.

        Raises:
            NonFiniteError, MaskError: as for `merged_weight`; the weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_terms]
        result = self.merged_weight([*self.merged_adapters, *names]) if names else None
        if result is None:
            return
        merged, self.spp_merge = result
        before = self.write_merged(merged)
        self._before_merge = self._before_merge or (before,)
        self.merged_adapters = [*self.merged_adapters, *names]
        self.drop_cache()

    def unmerge(self) -> None:
        """Put back the weight that was there before the merge: the same tensor, not a computed one."""
        for before in self._before_merge:
            self.write_back(before)
        self._before_merge, self.merged_adapters = (), []
        self.drop_cache()

    def convert_before(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Convert or move what was set aside by a merge."""
        for before in self._before_merge:
            if isinstance(before, Tensor):
                self._before_merge = (fn(before),)
            elif isinstance(before, Weight):
                self._before_merge = (before.maker()(*map(fn, before.tensors())),)
            else:
                before._apply(fn)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Make adapters the active ones, trainable unless in inference mode."""
        self.drop_cache()
        super().set_adapter(adapter_names, *args, **kwargs)

    @property
    def ranks(self) -> dict[str, list[int]]:
        """The ranks of each adapter's terms."""
        return {name: [term.rank for term in terms] for name, terms in self.spp_terms.items()}

    def update_layer(self, adapter: str, config: SPPConfig, inference_mode: bool = False) -> None:
        """Add an adapter, or make one anew: drawn as `spp.wrap` draws it."""
        r, arithmetic = config.rank_for(self.spp_name), arithmetic_dtype(self.held().dtype)
        generator = None if config.seed is None else layer_generator(config.seed, self.spp_name)
        experts = (self.num_experts,) if hasattr(self, "num_experts") else ()
        shapes = [(*experts, *shape) for shape in self.spp_rule.shapes(self.out_features, self.in_features, r)]
        params = [torch.empty(shape, dtype=arithmetic) for shape in shapes]
        with torch.no_grad():
            for one in zip(*params, strict=True) if experts else [params]:  # expert after expert
                self.spp_rule.init_(one, generator)
        self.set_terms(adapter, (Term(r, config.scaling),), params, (config.dropout, config.dropout_mode))
        self.set_adapter(self.active_names(), inference_mode=inference_mode)

    def set_terms(
        self, adapter: str, terms: Sequence[Term], params: Sequence[Tensor], dropout: tuple[float, str]
    ) -> None:
        """Put an adapter's parameters in place: α (…, Σ r_t, n) and β (…, m, terms)."""
        self.drop_cache()
        device = self.held().device
        for name, param in zip(self.adapter_layer_names, params, strict=True):
            moved = param if device.type == "meta" else param.to(device)
            getattr(self, name)[adapter] = nn.Parameter(moved)
        self.spp_terms[adapter] = tuple(terms)
        self.spp_dropout[adapter] = dropout

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the values of another of the same shape, where this layer has them."""
        if source in self.spp_terms and target in self.spp_terms:
            self.drop_cache()
            for name in self.adapter_layer_names:
                getattr(self, name)[target].copy_(getattr(self, name)[source])

    def adapter_params(self, adapter: str) -> list[Tensor]:
        """Return α and β of each of an adapter's terms, in turn."""
        alpha, beta, terms = self.spp_alpha[adapter], self.spp_beta[adapter], self.spp_terms[adapter]
        if len(terms) == 1:
            return [alpha, beta]
        alphas, betas = alpha.split([term.rank for term in terms], dim=-2), beta.split(1, dim=-1)
        return [param for pair in zip(alphas, betas, strict=True) for param in pair]

    def is_as_loaded(self, adapter: str) -> bool:
        """Whether an adapter has the values that were loaded."""
        return self.spp_alpha.is_as_loaded(adapter) and self.spp_beta.is_as_loaded(adapter)

    def combined(self, adapters: Sequence[str]) -> Adapter | None:
        """Return the sum of some adapters; None where this layer has none of them."""
        here = [name for name in adapters if name in self.spp_terms]
        terms = [term for name in here for term in self.spp_terms[name]]
        if not terms:
            return None
        params = [param for name in here for param in self.adapter_params(name)]
        dropout, mode = self._common_dropout(here)
        if len(terms) == 1:
            return Adapter(self.spp_rule, tuple(params), terms[0].scaling, dropout, mode)
        rule = TermsRule(self.spp_rule, tuple(t.rank for t in terms), tuple(t.scaling for t in terms))
        return Adapter(rule, tuple(params), 1.0, dropout, mode)

    def _common_dropout(self, adapters: Sequence[str]) -> tuple[float, str]:
        found = {name: self.spp_dropout[name] for name in adapters}
        if len(set(found.values())) > 1 and self.training:
            raise ConfigError(
                f"{self.spp_name}: active adapters have different dropout {found}; activate one, call model.eval(), "
                "or give them the same"
            )
        return next(iter(found.values()))

    def active_names(self) -> list[str]:
        """Return the names of the active adapters; this layer need not have all of them."""
        names: Any = self.active_adapters
        return list(names)

    def active(self) -> Adapter | None:
        """Return the active adapters' sum, unless they are disabled or merged."""
        return None if self.disable_adapters or self.merged else self.combined(self.active_names())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its base; in its own dtype, not the base's."""
        dtype, home = arithmetic_dtype(self.held().dtype), self.held().device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].is_meta and home.type != "meta":
                parameter = container[adapter_name]
                moved = parameter.detach().to(device or home, dtype)
                if moved is not parameter.detach():
                    container[adapter_name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)


def merged_idle(layers: Iterable[TermsLayer]) -> str | None:
    """Return why the adapters that are merged into these layers have no update; None where they have one."""
    merged = [active for layer in layers if (active := layer.combined(layer.merged_adapters)) is not None]
    return idle_reason(merged)
