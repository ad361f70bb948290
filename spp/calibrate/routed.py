"""The inputs of fused expert weights: what each expert's matrix is multiplied with, seen at the product itself.

A fused weight (E, out, in) or (E, in, out) is no module of its own, so no hook tells what an expert reads. While a
block runs, every product of torch whose second operand lies in such a weight is therefore looked at: which expert it
is follows from the address. Experts run in transformers' plain form for that time, one product an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spp.errors import TargetError
from spp.targets_layout import Projection

_PRODUCTS = {
    F.linear,
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
}


class RoutedInputs(TorchFunctionMode):
    """Calls `read(path, expert, x)` for every product of inputs x (…, n) with an expert's matrix.

    Args:
        projections: the fused weights by path.
        read: what is told.
    """

    def __init__(self, projections: Mapping[str, Projection], read: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self._read = read
        self._weights = [(path, p.weight.data_ptr(), p) for path, p in projections.items()]
        self._called: set[str] = set()
        self._seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a product, then run it."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            operands = [*args, *kwargs.values()][:2]
            if len(operands) == 2 and all(isinstance(operand, Tensor) for operand in operands):
                self._look(*operands)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch, with the experts in their plain form.

        Raises:
            TargetError: experts ran, and no product with their weights was seen.
        """
        modules = {id(p.module): p.module for _, _, p in self._weights}
        configs = {id(c): c for m in modules.values() if hasattr(c := getattr(m, "config", None), _IMPLEMENTATION)}
        before = [(config, getattr(config, _IMPLEMENTATION)) for config in configs.values()]
        handles = [p.module.register_forward_pre_hook(self._note_call(path)) for path, _, p in self._weights]
        try:
            for config, _ in before:
                setattr(config, _IMPLEMENTATION, "eager")
            with self if self._weights else contextlib.nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for config, value in before:
                setattr(config, _IMPLEMENTATION, value)
        unseen = sorted(self._called - self._seen)
        if unseen:
            raise TargetError(
                f"{unseen[0]}: its experts ran, but not through a product with their matrices that can be followed; "
                f'leave it out with exclude_modules, or use method="magnitude" for it'
            )

    def _note_call(self, path: str) -> Any:
        def hook(*_: Any) -> None:
            self._called.add(path)

        return hook

    def _look(self, x: Tensor, weight: Tensor) -> None:
        address = weight.data_ptr()
        for path, start, projection in self._weights:
            whole = projection.weight
            matrix = whole[0].numel() * whole.element_size()
            offset = address - start
            if not 0 <= offset < matrix * whole.shape[0] or x.shape[-1] != projection.in_features:
                continue
            self._seen.add(path)
            if weight.dim() == 2 and weight.numel() == whole[0].numel() and offset % matrix == 0:
                self._read(path, offset // matrix, x)
            elif weight.shape == whole.shape and x.dim() == 3:  # all experts at once: rows of zeros were not routed
                for expert, rows in enumerate(x.unbind(0)):
                    self._read(path, expert, rows[rows.any(dim=1)])
            else:
                raise TargetError(f"{path}: a product with {tuple(weight.shape)} of it cannot be told apart by expert")


_IMPLEMENTATION = "_experts_implementation_internal"  # of a transformers config: "eager" is one product an expert
