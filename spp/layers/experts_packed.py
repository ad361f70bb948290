"""PackedExperts: fused experts whose weight is packed, without an adapter."""

from __future__ import annotations

import torch.nn.utils.parametrize as parametrize

from spp.errors import ConfigError, TargetError
from spp.layers.experts_forward import ExpertsAdapter, adapters_of
from spp.models.projection import Projection
from spp.weights import DTYPES, PackedStack
from spp.weights.holder import PACKED


class PackedExperts(ExpertsAdapter):
    """The packed weight of fused experts; `adapt_experts` puts it in place, and the module's own forward runs.

    Each product of an expert's tokens decodes that expert's matrix, a block at a time.

    Args:
        projection: the fused weight, which is freed in the module.
        packed: the weight, packed already (then the module's may be on the meta device); None packs it.

    Raises:
        TargetError: it is no weight of float64, float32, bfloat16 or float16.
        ConfigError: it is on the meta device.
    """

    save_refusal = PACKED

    def __init__(self, projection: Projection, packed: PackedStack | None = None) -> None:
        super().__init__(projection)
        if packed is None:
            check_packable_experts(projection)
        self.disabled = False
        self.weight_requires_grad = projection.operand.requires_grad
        if packed is None:
            self.hold_what_is_there()
        else:
            self.hold_packed(packed)
        projection.release()
        self.refresh()
        self.train(projection.module.training)

    def active(self) -> None:
        """Return nothing: there is no adapter."""

    def restore(self) -> None:
        """Give the dense weight back to the module."""
        self.hold_dense(self.weight)
        super().restore()


class OverPackedExperts(ExpertsAdapter):
    """An adapter of fused experts, which may take the place of PackedExperts, and hand their weight back.

    Args:
        projection: the fused weight.
    """

    def __init__(self, projection: Projection) -> None:
        super().__init__(projection)
        before = projection.packed
        self._before = (before,) if isinstance(before, PackedExperts) else ()  # in a tuple: no submodule

    def release_packed(self) -> PackedExperts | None:
        """Give a packed weight back: to the PackedExperts that had it, which come back, or dense to the module."""
        for before in self._before:
            before.hold_packed(self.held())
            self.drop_weight()
            return before
        self.hold_dense(self.weight)
        self.projection.operand.requires_grad_(self.weight_requires_grad)
        return None


def require_alone(projection: Projection) -> None:
    """Raise a TargetError where an adapter, such as PEFT's, sits beside a fused weight already."""
    beside = adapters_of(projection.module).get(projection.name)
    if beside is not None and not isinstance(beside, PackedExperts):
        raise TargetError(f"{projection.path} has a {type(beside).__name__} beside it already; take that out first")


def check_packable_experts(projection: Projection) -> None:
    """Raise unless a fused weight can be packed: plain, floating-point and in memory."""
    where = projection.parameter_path
    require_alone(projection)
    if parametrize.is_parametrized(projection.module):
        raise TargetError(
            f"{where} has a parametrization; make it permanent first with "
            f"torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = projection.weight
    if weight.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TargetError(f"{where} is {weight.dtype}: {known} weights are packed, quantized ones are not")
    if weight.is_meta:
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
