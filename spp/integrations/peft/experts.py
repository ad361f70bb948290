"""The tuner layer of a fused expert weight: any number of SPP adapters beside it, expert by expert.

The weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

Known limit: transformers' own `model.load_adapter` looks up submodules where the parameters are and fails for these;
`PeftModel.from_pretrained` and `spp.load_adapter` read the same directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spp.experts import ExpertsAdapter
from spp.integrations.peft.terms import TermsLayer
from spp.kernels import linear
from spp.layer_adapted import convert_parameter
from spp.merge_weight import LayerMerge, merge_experts
from spp.offload import home, is_offloaded
from spp.rules import get_rule
from spp.targets_layout import Projection, as_matrices


class SPPPeftExperts(ExpertsAdapter, TermsLayer):
    """The adapters of one fused weight, as PEFT's machinery handles them; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight.

    Attributes:
        spp_alpha: {adapter: α (E, Σ r_t, n)}; spp_beta: {adapter: β (E, m, terms)}.
    """

    def __init__(self, projection: Projection) -> None:
        ExpertsAdapter.__init__(self, projection)
        self._init_terms(get_rule("spp"), projection.path)
        self.grad_precision = "auto"
        self.saved_activations = "full"
        self.training = projection.module.training

    @property
    def weight_requires_grad(self) -> bool:  # type: ignore[override]
        """Unloading leaves the flag as it is, as PEFT does."""
        return self.projection.weight.requires_grad

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        """Whether the module's own products run. A merge is taken back first where the adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active() is None

    def has_no_effect(self) -> bool:
        """Whether no active adapter has been trained, and this call trains none."""
        if torch.is_grad_enabled() or self.weight.device.type != "cpu":  # elsewhere, asking would stall the device
            return False
        return not any(bool(self.spp_beta[name].any()) for name in self.active_names() if name in self.spp_terms)

    def multiplier(self) -> Callable[[int, Tensor], Tensor]:
        """Return what multiplies an expert's tokens x (t, n) by the active adapters' effective weight."""
        active, weights = self.active(), self.sources()
        assert active is not None
        dropout = active.dropout if self.training else 0.0
        params = list(active.params)
        if dropout and active.dropout_mode == "alpha":
            params = [F.dropout(p, dropout) if i in active.dropped else p for i, p in enumerate(params)]
            dropout = 0.0
        of_experts = list(zip(*(param.unbind(0) for param in params), strict=True))

        def multiply(expert: int, x: Tensor) -> Tensor:
            given = x, weights[expert], None, active.rule, of_experts[expert], active.scaling, dropout
            return linear(*given, self.grad_precision, self.saved_activations)

        return multiply

    def kept_weight(self) -> Tensor:
        """Return the fused weight."""
        return self.weight

    def base_weight(self) -> Tensor:
        """Return W as it was before any merge."""
        return self.dense_weight() if self._before_merge is None else self._before_merge

    def home(self) -> torch.device:
        """Return the device that adapters belong on."""
        return home(self.projection.module, self.weight)

    def is_offloaded(self) -> bool:
        """Whether accelerate has the weight offloaded."""
        return is_offloaded(self.projection.module, self.projection.name)

    def resident_names(self) -> tuple[str, ...]:
        """Return nothing: the parameters are in containers of their own."""
        return ()

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here.

        Raises:
            NonFiniteError, MaskError: as for `spp.merge`.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        transposed = self.projection.input_axis == -2
        matrices = as_matrices(self.base_weight().detach(), transposed=transposed)
        params = list(zip(*(param.unbind(0) for param in active.params), strict=True))
        return merge_experts(active.rule, matrices, params, active.scaling, transposed=transposed, where=self.spp_name)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the active adapters, or those named; as SPPPeftLinear's, with one rounding.

        Raises:
            NonFiniteError, MaskError: as for `merged_weight`; the weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_terms]
        result = self.merged_weight([*self.merged_adapters, *names]) if names else None
        if result is None:
            return
        merged, self.spp_merge = result
        if self._before_merge is None:
            self._before_merge = self.weight.data
        self.weight.data = merged
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Put back the weight that was there before the merge: the same tensor, not a computed one."""
        if self._before_merge is None:
            return
        self.weight.data = self._before_merge.to(self.weight.device)
        self._before_merge, self.merged_adapters = None, []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftExperts:
        """Convert or move; α and β follow the device, but stay float32 (float64 where everything becomes that)."""
        if self._before_merge is not None:
            self._before_merge = fn(self._before_merge)
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            assert isinstance(container, nn.ParameterDict)
            for adapter, parameter in container.items():
                dtype = fn(parameter.detach()[:0]).dtype
                kept = torch.float64 if dtype == torch.float64 else torch.float32
                container[adapter] = convert_parameter(parameter, fn, kept)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        ranks = {name: [term.rank for term in terms] for name, terms in self.spp_terms.items()}
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"num_experts={self.num_experts}, {sizes}, r={ranks}"
