"""Products with fused expert weights, seen where they happen.

A fused weight (E, out, in) or (E, in, out) is a parameter among others of a module whose own code multiplies with it,
expert by expert; there is no submodule to put a hook on or something else in place of. So every product of torch that
runs inside such a module is looked at: where its second operand is a part of a fused weight, its place there tells the
expert. That works for a tensor without values too, the placeholder of a packed weight.
The module's own code stays what it is: transformers' plain form of it, one product an expert; its grouped one, with the
tokens in the order of their experts; or a batched product of every token with every expert (Llama 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spp.errors import TargetError
from spp.models.projection import Projection

_PRODUCTS = {
    F.linear,
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
}
_GROUPED = getattr(torch, "_grouped_mm", None)
_GROUPED_FALLBACK = "transformers.grouped_mm_fallback"
_IMPLEMENTATION = "_experts_implementation_internal"  # of a transformers config: "eager" is one product an expert


Multiply = Callable[[int, int, Tensor, bool], Tensor | None]


class ExpertProducts(TorchFunctionMode):
    """Hands every product of inputs with a matrix of some fused weights to `multiply`, while it is entered.

    Args:
        projections: the fused weights.
        multiply: called with (index of the projection, expert, x (t, n), whether rows of zeros in x only fill up what
            was not routed); returns x Wᵀ (t, m) for that expert's W, or None for all experts to have the product
            computed as written, which a packed weight does not allow. Experts without a token are passed over, unless
            that leaves nothing.
    """

    def __init__(self, projections: Sequence[Projection], multiply: Multiply) -> None:
        super().__init__()
        self._multiply = multiply
        self._projections = [(projection, projection.operand) for projection in projections]
        self._storages = [operand.untyped_storage()._cdata for _, operand in self._projections]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a product; what is none of the fused weights' runs as it is."""
        kwargs = kwargs or {}
        grouped = func is _GROUPED or str(func) == _GROUPED_FALLBACK
        if grouped or func in _PRODUCTS:
            operands = [*args, *kwargs.values()]
            if len(operands) >= 2 and all(isinstance(operand, Tensor) for operand in operands[:2]):
                bias = operands[2] if func is F.linear and len(operands) > 2 else None
                offsets = kwargs.get("offs", operands[2]) if grouped else None
                result = self._product(operands[0], operands[1], offsets)
                if result is not None:
                    return result if bias is None else result + bias
        return func(*args, **kwargs)

    def _product(self, x: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor | None:
        found = self._find(weight)
        if found is None:
            return None
        index, expert = found
        projection, operand = self._projections[index]
        experts, n = operand.shape[0], projection.in_features
        if expert is not None and x.shape[-1] == n:
            if not x.numel() and not operand.is_meta:
                return None
            made = self._multiply(index, expert, x.reshape(-1, n), False)
            return made if made is None or x.dim() == 2 else made.view(*x.shape[:-1], made.shape[-1])
        if expert is None and offsets is not None and x.dim() == 2:  # tokens in the order of their experts
            ends = [0, *offsets.tolist()]
            routed = [e for e in range(experts) if ends[e] < ends[e + 1]] or ([0] if operand.is_meta else [])
            return self._together(index, [(e, x[ends[e] : ends[e + 1]]) for e in routed], x.shape[0] - ends[-1])
        if expert is None and x.dim() == 3 and x.shape[::2] == (experts, n):  # every token for every expert
            parts = [self._multiply(index, e, rows, True) for e, rows in enumerate(x.unbind(0))]
            stacked = [part for part in parts if part is not None]
            return torch.stack(stacked) if stacked else None
        raise TargetError(f"{projection.path}: a product of {tuple(x.shape)} with it cannot be told apart by expert")

    def _together(self, index: int, routed: Sequence[tuple[int, Tensor]], unrouted: int) -> Tensor | None:
        """Return the products of experts' tokens, one behind the other, and as many rows of zeros as had no expert."""
        made = [part for e, rows in routed if (part := self._multiply(index, e, rows, False)) is not None]
        return torch.cat([*made, made[0].new_zeros(unrouted, made[0].shape[1])]) if made else None

    def _find(self, weight: Tensor) -> tuple[int, int | None] | None:
        """Return (index, expert or None for all) of the weight that an operand is a part of."""
        storage = weight.untyped_storage()._cdata
        for index, (projection, whole) in enumerate(self._projections):
            offset, matrix = weight.storage_offset() - whole.storage_offset(), whole[0].numel()
            if storage != self._storages[index] or not 0 <= offset < matrix * whole.shape[0]:
                continue
            if weight.dim() == 2 and weight.numel() == matrix and offset % matrix == 0:
                return index, offset // matrix
            if weight.dim() == 3 and weight.numel() == whole.numel() and offset == 0:
                return index, None
            raise TargetError(
                f"{projection.path}: a product with {tuple(weight.shape)} of it cannot be told apart by expert"
            )
        return None


def set_experts_implementation(
    module: nn.Module, name: str | None, *, unless: Container[str | None] = ()
) -> str | None:
    """Set the form in which transformers runs a module's experts, and return the one it had; None where it has none.

    Args:
        module: of fused experts.
        name: of the form: "eager" is one product an expert. None changes nothing.
        unless: forms that stay.
    """
    config = getattr(module, "config", None)
    before: str | None = getattr(config, _IMPLEMENTATION, None)
    if before is not None and name is not None and before not in unless:
        setattr(config, _IMPLEMENTATION, name)
    return before


@contextlib.contextmanager
def plain_experts(modules: Sequence[nn.Module], *, unless: Container[str | None] = ()) -> Iterator[None]:
    """Run the plain code of modules of fused experts, one product an expert: a context manager.

    Args:
        modules: which; several may share the config that says how they run.
        unless: forms that stay.
    """
    before = [(module, set_experts_implementation(module, "eager", unless=unless)) for module in modules]
    try:
        yield
    finally:
        for module, name in reversed(before):
            set_experts_implementation(module, name)
