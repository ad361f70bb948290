"""Products with fused expert weights, seen where they happen.

A fused weight (E, out, in) or (E, in, out) is a parameter among others of a module whose own code multiplies with it,
expert by expert; there is no submodule to put a hook on or something else in place of. So every product of torch that
runs inside such a module is looked at: where its second operand lies in a fused weight, its address tells the expert.
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
from spp.targets_layout import Projection

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
            computed as written. Experts without a token are passed over.
    """

    def __init__(self, projections: Sequence[Projection], multiply: Multiply) -> None:
        super().__init__()
        self._multiply = multiply
        self._projections = [(projection, projection.weight.data_ptr()) for projection in projections]

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
        projection = self._projections[index][0]
        experts, n = projection.weight.shape[0], projection.in_features
        if expert is not None and x.shape[-1] == n:
            return self._multiply(index, expert, x.reshape(-1, n), False) if x.numel() else None
        if expert is None and offsets is not None and x.dim() == 2:  # tokens in the order of their experts
            ends = [0, *offsets.tolist()]
            parts = [
                self._multiply(index, e, x[ends[e] : ends[e + 1]], False)
                for e in range(experts)
                if ends[e] < ends[e + 1]
            ]
            made = [part for part in parts if part is not None]
            return torch.cat([*made, x.new_zeros(x.shape[0] - ends[-1], made[0].shape[1])]) if made else None
        if expert is None and x.dim() == 3 and x.shape[::2] == (experts, n):  # every token for every expert
            parts = [self._multiply(index, e, rows, True) for e, rows in enumerate(x.unbind(0))]
            made = [part for part in parts if part is not None]
            return torch.stack(made) if made else None
        raise TargetError(f"{projection.path}: a product of {tuple(x.shape)} with it cannot be told apart by expert")

    def _find(self, weight: Tensor) -> tuple[int, int | None] | None:
        """Return (index, expert or None for all) of the weight that an operand lies in."""
        address = weight.data_ptr()
        for index, (projection, start) in enumerate(self._projections):
            whole = projection.weight
            matrix = whole[0].numel() * whole.element_size()
            offset = address - start
            if not 0 <= offset < matrix * whole.shape[0]:
                continue
            if weight.dim() == 2 and weight.numel() == whole[0].numel() and offset % matrix == 0:
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
def plain_experts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules of fused experts run their plain code, one product an expert, for as long as it lasts."""
    before = [(module, set_experts_implementation(module, "eager")) for module in modules]
    try:
        yield
    finally:
        for module, name in reversed(before):
            set_experts_implementation(module, name)
