"""Products with fused expert weights, seen where they happen.

A fused weight (E, out, in) or (E, in, out) is a parameter among others of a module whose own code multiplies with it,
expert by expert; there is no submodule to put a hook on or something else in place of. So every product of torch that
runs inside such a module is looked at: where its second operand lies in a fused weight, its address tells the expert.
The module's own code stays what it is, in transformers' plain form of it, one product an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
_IMPLEMENTATION = "_experts_implementation_internal"  # of a transformers config: "eager" is one product an expert


class ExpertProducts(TorchFunctionMode):
    """Hands every product of inputs with a matrix of some fused weights to `multiply`, while it is entered.

    Args:
        projections: the fused weights.
        multiply: called with (index of the projection, expert, or None for all of them at once, x, bias or None), where
            x is (…, n), or (E, t, n) for all experts; returns the product (…, m) or (E, t, m), or None to have it
            computed as written.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        multiply: Callable[[int, int | None, Tensor, Tensor | None], Tensor | None],
    ) -> None:
        super().__init__()
        self._multiply = multiply
        self._projections = [(projection, projection.weight.data_ptr()) for projection in projections]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a product; what is none of the fused weights' runs as it is."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            operands = [*args, *kwargs.values()]
            if len(operands) >= 2 and all(isinstance(operand, Tensor) for operand in operands[:2]):
                bias = operands[2] if func is F.linear and len(operands) > 2 else None
                found = self._find(*operands[:2])
                if found is not None and (result := self._multiply(*found, operands[0], bias)) is not None:
                    return result
        return func(*args, **kwargs)

    def _find(self, x: Tensor, weight: Tensor) -> tuple[int, int | None] | None:
        """Return (index, expert or None for all) of the weight that a product is with."""
        address = weight.data_ptr()
        for index, (projection, start) in enumerate(self._projections):
            whole = projection.weight
            matrix = whole[0].numel() * whole.element_size()
            offset = address - start
            if not 0 <= offset < matrix * whole.shape[0] or x.shape[-1] != projection.in_features:
                continue
            if weight.dim() == 2 and weight.numel() == whole[0].numel() and offset % matrix == 0:
                return index, offset // matrix
            if weight.shape == whole.shape and x.dim() == 3 and x.shape[0] == whole.shape[0]:
                return index, None
            raise TargetError(
                f"{projection.path}: a product with {tuple(weight.shape)} of it cannot be told apart by expert"
            )
        return None


@contextlib.contextmanager
def plain_experts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules of fused experts run their plain code, one product an expert, for as long as it lasts."""
    configs = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), _IMPLEMENTATION)}.values()
    before = [(config, getattr(config, _IMPLEMENTATION)) for config in configs]
    try:
        for config, _ in before:
            setattr(config, _IMPLEMENTATION, "eager")
        yield
    finally:
        for config, value in before:
            setattr(config, _IMPLEMENTATION, value)
