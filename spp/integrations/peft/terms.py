"""A tuner layer's adapters, each a sum of terms; which of them are active, and which are merged into the weight.

The active adapters' terms are summed, W_eff = W · (1 + Σ_t (s_t·β_t) · A_t) (spp.rules.terms; one term: spp.rules.spp).
An adapter made by `spp.save_adapter` or `get_peft_model` is one term; a weighted combination of adapters is several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError
from spp.files.hashes import content_sha256
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_weight
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
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here.

        Raises:
            NonFiniteError: an adapter or the result holds NaN or infinity.
            MaskError: a zero would not stay one, or a kept weight would become one.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        held = self.held()
        matrices = (one.matrix() for one in (held.experts() if hasattr(self, "num_experts") else [held]))
        return merge_weight(matrices, active, transposed=self.input_axis == -2, where=self.spp_name)

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
        params = [torch.empty(shape, dtype=arithmetic, device="cpu") for shape in shapes]
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


# ---- Weighted sums of adapters, layer by layer: U = Σ_t w_t·(s_t·β_t) · A_t        W_eff = W · (1 + U)
#
# A stack keeps the terms. One adapter of rank r has, in each of its r blocks of rows, a U of rank one: `approximate`
# takes there the leading singular vectors of the sum, whose other singular values are the error. With K terms in a
# block, U = B C with B (rows, K) and C (K, n), so that the decomposition is one of a K × K matrix.


def stack(layer: TermsLayer, adapters: Sequence[str], weights: Sequence[float], name: str) -> float:
    """Give a layer the sum as it is; the error is 0."""
    here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.spp_terms]
    alpha = torch.cat([layer.spp_alpha[adapter].detach() for adapter, _ in here], dim=-2)  # (…, Σ r_t, n)
    beta = torch.cat([layer.spp_beta[adapter].detach() for adapter, _ in here], dim=-1)  # (…, m, terms)
    _add(layer, name, _terms(layer, here), [alpha, beta], here[0][0])
    return 0.0


def approximate(
    layer: TermsLayer, adapters: Sequence[str], weights: Sequence[float], name: str, scaling: float, r: int | None
) -> float:
    """Give a layer one adapter of rank r near the sum; return the relative error."""
    here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.spp_terms]
    terms = _terms(layer, here)
    r = min(r or max(term.rank for term in terms), layer.out_features)
    params = [param.detach().double() for adapter, _ in here for param in layer.adapter_params(adapter)]
    fused = params[0].dim() == 3
    made = [_near(terms, one, r, scaling) for one in (zip(*params, strict=True) if fused else [params])]
    alphas, betas, kept, total = zip(*made, strict=True)
    dtype = layer.spp_alpha[here[0][0]].dtype
    stacked = [torch.stack(parts) if fused else parts[0] for parts in (alphas, betas)]
    _add(layer, name, (Term(r, scaling),), [param.to(dtype) for param in stacked], here[0][0])
    return math.sqrt(max(0.0, 1.0 - sum(kept) / sum(total))) if sum(total) else 0.0


def _near(
    terms: Sequence[Term], params: Sequence[Tensor], r: int, scaling: float
) -> tuple[Tensor, Tensor, float, float]:
    """Return α (r, n) and β (m, 1) near the sum of one matrix's terms, ‖U'‖² and ‖U‖²."""
    alphas, betas = params[::2], params[1::2]
    m, n = betas[0].shape[0], alphas[0].shape[1]
    alpha, beta = alphas[0].new_empty(r, n), alphas[0].new_empty(m, 1)
    kept, total = 0.0, 0.0
    for k in range(r):
        rows = slice(k * m // r, (k + 1) * m // r)
        u, sigma, v = _leading(*_factors(terms, alphas, betas, rows, m))
        size = math.sqrt(float(sigma[0]) / scaling) or 1.0
        alpha[k], beta[rows, 0] = v * size, u * float(sigma[0]) / (scaling * size)
        kept, total = kept + float(sigma[0] ** 2), total + float(sigma.square().sum())
    return alpha, beta, kept, total


def _terms(layer: TermsLayer, here: Sequence[tuple[str, float]]) -> tuple[Term, ...]:
    return tuple(Term(t.rank, w * t.scaling) for adapter, w in here for t in layer.spp_terms[adapter])


def _factors(
    terms: Sequence[Term], alphas: Sequence[Tensor], betas: Sequence[Tensor], rows: slice, m: int
) -> tuple[Tensor, Tensor]:
    """Return B (rows, K) and C (K, n) with U[rows] = B C."""
    left, right = [], []
    for term, alpha, beta in zip(terms, alphas, betas, strict=True):
        for k in range(((rows.start + 1) * term.rank - 1) // m, (rows.stop * term.rank - 1) // m + 1):
            shared = slice(max(rows.start, k * m // term.rank), min(rows.stop, (k + 1) * m // term.rank))
            column = torch.zeros(rows.stop - rows.start, dtype=beta.dtype, device=beta.device)
            column[shared.start - rows.start : shared.stop - rows.start] = term.scaling * beta[shared, 0]
            left.append(column)
            right.append(alpha[k])
    return torch.stack(left, dim=1), torch.stack(right)


def _leading(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading left singular vector, all singular values and the leading right one of B C."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, 0], sigma, q_right @ vh[0]


def _add(layer: TermsLayer, name: str, terms: Sequence[Term], params: Sequence[Tensor], like: str) -> None:
    layer.set_terms(name, terms, params, layer.spp_dropout[like])
    for container in layer.adapter_layer_names:
        getattr(layer, container)[name].requires_grad_(False)
