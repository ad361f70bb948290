"""The tuner layer: one frozen linear layer with any number of SPP adapters, of which those that are active compute.

The active adapters' terms are summed, W_eff = W · (1 + Σ_t (s_t·β_t) · A_t) (spp.rules.terms; one term: spp.rules.spp).
An adapter made by `spp.save_adapter` or `get_peft_model` is one term; a weighted combination of adapters is several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from spp.config import SPPConfig
from spp.errors import ConfigError
from spp.inject import layer_generator
from spp.kernels import PackedSource
from spp.layer_adapted import Active, AdaptedLinear, convert_parameter
from spp.layer_checks import features, input_axis_of
from spp.layer_packed import HOOKS, PackedLinear, release_weight
from spp.merge_weight import LayerMerge, merge_tensor
from spp.rules import Rule, get_rule
from spp.rules.canonical import arithmetic_dtype
from spp.rules.terms import TermsRule

_SPP = get_rule("spp")


class Term(NamedTuple):
    """One SPP adapter's part of a sum.

    Attributes:
        rank: r, its rows of α.
        scaling: s, times its weight in the combination.
    """

    rank: int
    scaling: float


class SPPPeftLinear(AdaptedLinear, BaseTunerLayer):
    """A frozen linear layer and its adapters, as PEFT's machinery handles them.

    Args:
        base_layer: nn.Linear or a subclass, transformers' Conv1D, or a PackedLinear.
        where: the layer's path in the model, for messages and seeds.
        packed: pack the weight, unless it is packed already.

    Attributes:
        spp_alpha: {adapter: α (Σ r_t, n)}; spp_beta: {adapter: β (m, terms)}; of a usual adapter (r, n) and (m, 1).
        spp_terms: {adapter: its terms}.
        spp_merge: what the last merge did, or None.
    """

    adapter_layer_names = ("spp_alpha", "spp_beta")
    other_param_names = ("spp_terms", "spp_dropout")

    def __init__(self, base_layer: nn.Module, where: str, *, packed: bool = False) -> None:
        AdaptedLinear.__init__(self)
        self._packed_here = packed and not isinstance(base_layer, PackedLinear)
        self._packed_before_merge: tuple[PackedLinear, ...] = ()  # in a tuple: not a submodule
        if self._packed_here:
            assert isinstance(base_layer, nn.Linear)
            base_layer = PackedLinear(base_layer, where=where)
        self.base_layer = base_layer
        self.spp_rule: Rule = _SPP
        self.spp_name = where
        self.out_features, self.in_features = features(base_layer)
        self.input_axis = input_axis_of(base_layer)
        self.spp_alpha = nn.ParameterDict()
        self.spp_beta = nn.ParameterDict()
        self.spp_terms: dict[str, tuple[Term, ...]] = {}
        self.spp_dropout: dict[str, tuple[float, str]] = {}
        self.spp_merge: LayerMerge | None = None
        self.merged_adapters: list[str] = []
        self.cache_effective = not isinstance(base_layer, PackedLinear)
        self._before_merge: Tensor | None = None
        for hooks in HOOKS:  # the base layer itself is never called
            setattr(self, hooks, getattr(base_layer, hooks))
        self.training = base_layer.training

    def update_layer(self, adapter: str, config: SPPConfig, inference_mode: bool = False) -> None:
        """Add an adapter, or make one anew: drawn as `spp.wrap` draws it."""
        r, kept = config.rank_for(self.spp_name), self.kept_weight()
        generator = None if config.seed is None else layer_generator(config.seed, self.spp_name)
        shapes = self.spp_rule.shapes(self.out_features, self.in_features, r)
        params = [torch.empty(shape, dtype=arithmetic_dtype(kept.dtype)) for shape in shapes]
        with torch.no_grad():
            self.spp_rule.init_(params, config.init, generator)
        self.set_terms(adapter, (Term(r, config.scaling),), params, (config.dropout, config.dropout_mode))
        self.set_adapter(self.active_names(), inference_mode=inference_mode)

    def set_terms(
        self, adapter: str, terms: Sequence[Term], params: Sequence[Tensor], dropout: tuple[float, str]
    ) -> None:
        """Put an adapter's parameters in place: α (Σ r_t, n) and β (m, terms)."""
        self._cached = None
        device = self.kept_weight().device
        for name, param in zip(self.adapter_layer_names, params, strict=True):
            moved = param if device.type == "meta" else param.to(device)
            getattr(self, name)[adapter] = nn.Parameter(moved)
        self.spp_terms[adapter] = tuple(terms)
        self.spp_dropout[adapter] = dropout

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the values of another of the same shape, where this layer has them."""
        if source in self.spp_terms and target in self.spp_terms:
            self._cached = None
            for name in self.adapter_layer_names:
                getattr(self, name)[target].copy_(getattr(self, name)[source])

    def adapter_params(self, adapter: str) -> list[Tensor]:
        """Return α and β of each of an adapter's terms, in turn."""
        alpha, beta, terms = self.spp_alpha[adapter], self.spp_beta[adapter], self.spp_terms[adapter]
        if len(terms) == 1:
            return [alpha, beta]
        alphas, betas = alpha.split([term.rank for term in terms]), beta.split(1, dim=1)
        return [param for pair in zip(alphas, betas, strict=True) for param in pair]

    def combined(self, adapters: Sequence[str]) -> Active | None:
        """Return the sum of some adapters; None where this layer has none of them."""
        here = [name for name in adapters if name in self.spp_terms]
        terms = [term for name in here for term in self.spp_terms[name]]
        if not terms:
            return None
        params = [param for name in here for param in self.adapter_params(name)]
        dropout, mode = self._common_dropout(here)
        if len(terms) == 1:
            return Active(self.spp_rule, params, terms[0].scaling, dropout, mode)
        rule = TermsRule(self.spp_rule, tuple(t.rank for t in terms), tuple(t.scaling for t in terms))
        return Active(rule, params, 1.0, dropout, mode, tuple(range(0, len(params), 2)))

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

    def active(self) -> Active | None:
        """Return the active adapters' sum, unless they are disabled or merged."""
        return None if self.disable_adapters or self.merged else self.combined(self.active_names())

    def frozen(self) -> Tensor | PackedSource:
        """Return the base weight."""
        base = self.base_layer
        if isinstance(base, PackedLinear):
            return PackedSource(base.packed_weight())
        weight = base.weight
        assert isinstance(weight, Tensor)
        return weight if self.input_axis == -1 else weight.T

    def frozen_bias(self) -> Tensor | None:
        """Return the base's bias."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def kept_weight(self) -> Tensor:
        """Return the tensor that holds the base's numbers."""
        base = self.base_layer
        kept = base.stored_weight if isinstance(base, PackedLinear) else base.weight
        assert isinstance(kept, Tensor)
        return kept

    def base_weight(self) -> Tensor:
        """Return W as it was before any merge, in the layout of the base layer."""
        if self._before_merge is not None:
            return self._before_merge
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        with _onloaded(self):
            return super().forward(x)

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged, what that did) for some adapters together, in the layout of the base layer.

        None where this layer has none of the adapters.

        Raises:
            NonFiniteError: an adapter or the result holds NaN or infinity.
            MaskError: a zero would not stay one, or a kept weight would become one.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        weight = self.base_weight() if self.input_axis == -1 else self.base_weight().T
        merged, done = merge_tensor(active.rule, weight, active.params, active.scaling, where=self.spp_name)
        return (merged if self.input_axis == -1 else merged.T.contiguous()), done

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the active adapters, or those named, into the base layer.

        Adapters that are merged already are merged together with these, from the weight before: one rounding. The
        result is checked whether or not `safe_merge` asks for it.

        Raises:
            NonFiniteError, MaskError: as for `merged_weight`; the weight is left as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.spp_terms]
        result = self.merged_weight([*self.merged_adapters, *names]) if names else None
        if result is None:
            return
        merged, self.spp_merge = result
        base = self.base_layer
        if isinstance(base, PackedLinear):
            self._packed_before_merge = (base,)
            self.base_layer = base.restore()
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if self._before_merge is None:
            self._before_merge = weight.data
        weight.data = merged
        self.merged_adapters = [*self.merged_adapters, *names]
        self._cached = None

    def unmerge(self) -> None:
        """Put back the weight that was there before the merge: the same tensor, not a computed one."""
        if self._before_merge is None:
            return
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if self._packed_before_merge:
            release_weight(self.base_layer)
            (self.base_layer,), self._packed_before_merge = self._packed_before_merge, ()
        else:
            weight.data = self._before_merge.to(weight.device)
        self._before_merge, self.merged_adapters = None, []

    def unpack_base(self) -> None:
        """Have the base layer hold a dense weight again, if it was this layer that packed it."""
        if self._packed_here and isinstance(self.base_layer, PackedLinear):
            self.base_layer = self.base_layer.restore()

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Make adapters the active ones, trainable unless in inference mode."""
        self._cached = None
        super().set_adapter(adapter_names, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftLinear:
        """Convert or move; α and β follow the device, but stay float32 (float64 for a float64 base)."""
        self._cached = None
        containers = {name: self._modules.pop(name) for name in self.adapter_layer_names}
        try:
            super()._apply(fn, recurse)
            if self._before_merge is not None:
                self._before_merge = fn(self._before_merge)
        finally:
            self._modules.update(containers)
        dtype = arithmetic_dtype(self.kept_weight().dtype)
        for container in containers.values():
            assert isinstance(container, nn.ParameterDict)
            for adapter, parameter in container.items():
                container[adapter] = convert_parameter(parameter, fn, dtype)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its base; in its own dtype, not the base's."""
        kept = self.kept_weight()
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].is_meta and not kept.is_meta:
                parameter = container[adapter_name]
                moved = parameter.detach().to(device or kept.device, arithmetic_dtype(kept.dtype))
                if moved is not parameter.detach():
                    container[adapter_name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        ranks = {name: [term.rank for term in terms] for name, terms in self.spp_terms.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, r={ranks}"


@contextlib.contextmanager
def _onloaded(layer: SPPPeftLinear) -> Iterator[None]:
    """Have the weight of an offloaded base layer on its device for one call, as accelerate's hook on it would."""
    if not hasattr(layer.base_layer, "_hf_hook"):
        yield
        return
    with onload_layer(layer):
        yield
