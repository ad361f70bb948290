"""The tuner layer: one frozen linear layer with any number of SPP adapters, of which those that are active compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spp.integrations.peft.terms import TermsLayer
from spp.kernels import PackedSource, WeightSource, offloaded_weight
from spp.layers.adapted import AdaptedLinear
from spp.layers.host import release_parameter, share_hooks
from spp.layers.packed import PackedLinear
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_tensor
from spp.models.projection import features, input_axis_of
from spp.rules import get_rule
from spp.weights import HeldWeight, quantized_kind, read_quantized
from spp.weights.hooks import move_hook
from spp.weights.offload import execution_device, home, offloader, values

_SPP = get_rule("spp")
Place = tuple[nn.Module, str]  # the parent of a module, and its name there


class SPPPeftLinear(TermsLayer, AdaptedLinear):
    """A frozen linear layer and its adapters, as PEFT's machinery handles them.

    Args:
        base_layer: nn.Linear or a subclass, quantized or not, transformers' Conv1D, or a PackedLinear.
        where: the layer's path in the model, for messages and seeds.
        packed: pack the weight, unless it is packed already.
        dtype: of an 8-bit weight where it is multiplied, as in SPPLinear.

    Attributes:
        base_layer: what was given; of a quantized weight the PackedLinear that holds it, until this layer is unloaded.
        also_at: the places of a linear that is registered in several.
    """

    also_at: tuple[Place, ...] = ()

    def __init__(
        self, base_layer: nn.Module, where: str, *, packed: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        AdaptedLinear.__init__(self)
        quantized = read_quantized(base_layer, f"{where}.weight", dtype) if quantized_kind(base_layer) else None
        self._packed_here = (packed or quantized is not None) and not isinstance(base_layer, PackedLinear)
        self._packed_before_merge: tuple[PackedLinear, ...] = ()  # in a tuple: not a submodule
        if self._packed_here:
            assert isinstance(base_layer, nn.Linear)
            base_layer = PackedLinear(base_layer, quantized, where=where)
        self.base_layer = base_layer
        self._init_terms(_SPP, where)
        self.out_features, self.in_features = features(base_layer)
        self.input_axis = input_axis_of(base_layer)
        self.cache_effective = not isinstance(base_layer, PackedLinear)
        share_hooks(base_layer, self)  # the base layer itself is never called
        self.training = base_layer.training

    def drop_cache(self) -> None:
        """Forget W_eff."""
        self._cached = None

    def frozen(self) -> Tensor | WeightSource:
        """Return the base weight."""
        base = self.base_layer
        if isinstance(base, PackedLinear):
            return PackedSource(base.packed_matrix())
        if (offloaded := offloaded_weight(base, self.input_axis)) is not None:
            return offloaded
        weight = base.weight
        assert isinstance(weight, Tensor)
        return weight if self.input_axis == -1 else weight.T

    def frozen_bias(self) -> Tensor | None:
        """Return the base's bias."""
        return None if self.base_layer.bias is None else values(self.base_layer, "bias")

    def kept_weight(self) -> Tensor:
        """Return the tensor that holds the base's numbers."""
        base = self.base_layer
        kept = base.stored_weight if isinstance(base, PackedLinear) else base.weight
        assert isinstance(kept, Tensor)
        return kept

    def base_weight(self) -> Tensor:
        """Return W as it was before any merge, in the layout of the base layer."""
        if self._packed_before_merge:
            return self._packed_before_merge[0].weight
        if self._before_merge is not None:
            return self._before_merge
        base = self.base_layer
        return base.weight if isinstance(base, PackedLinear) else values(base)

    def held(self) -> HeldWeight:
        """Return W as it was before any merge, as it is held."""
        for packed in self._packed_before_merge:
            return packed.held()
        if self._before_merge is not None:
            return HeldWeight.of_tensor(self._before_merge)
        base = self.base_layer
        return base.held() if isinstance(base, PackedLinear) else HeldWeight.of_parameter(base)

    def home(self) -> torch.device:
        """Return the device that adapters belong on."""
        return home(self.base_layer, self.kept_weight())

    def is_offloaded(self) -> bool:
        """Whether accelerate has the weight offloaded."""
        return offloader(self.base_layer) is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        hook = self.base_layer.__dict__.get("_hf_hook")  # never called itself, the base layer does not align its input
        return super().forward(x if hook is None else x.to(execution_device(hook) or x.device))

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
        merged, done = merge_tensor(weight, active, where=self.spp_name)
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
            self.base_layer = base.restore(dense=True)
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if self._before_merge is None and not self._packed_before_merge:
            self._before_merge = weight.data
        weight.data = merged
        self.merged_adapters = [*self.merged_adapters, *names]
        self._cached = None

    def unmerge(self) -> None:
        """Put back the weight that was there before the merge: the same tensor, not a computed one."""
        if not self.merged:
            return
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if self._packed_before_merge:
            (packed,), self._packed_before_merge = self._packed_before_merge, ()
            release_parameter(self.base_layer, "weight")
            move_hook(self.base_layer, packed)
            self.base_layer = packed
        elif self._before_merge is not None:
            weight.data = self._before_merge.to(weight.device)
        self._before_merge, self.merged_adapters = None, []

    def put(self, module: nn.Module, parent: nn.Module, name: str) -> None:
        """Put a module where this layer's linear was, or this layer is: at a place, and at the others that it has."""
        for owner, attribute in ((parent, name), *self.also_at):
            setattr(owner, attribute, module)

    def unpack_base(self) -> None:
        """Have the base layer be what it was, if it was this layer that packed it, or holds it for being quantized."""
        if self._packed_here and isinstance(self.base_layer, PackedLinear):
            self.base_layer = self.base_layer.restore()

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Make adapters the active ones, trainable unless in inference mode."""
        self._cached = None
        super().set_adapter(adapter_names, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftLinear:
        """Convert or move; what was set aside by a merge follows."""
        super()._apply(fn, recurse)
        if self._before_merge is not None:
            self._before_merge = fn(self._before_merge)
        for packed in self._packed_before_merge:
            packed._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        ranks = {name: [term.rank for term in terms] for name, terms in self.spp_terms.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, r={ranks}"
