"""The inputs of fused expert weights: what each expert's matrix is multiplied with, seen at the product itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spp.errors import TargetError, arg
from spp.targets_layout import Projection
from spp.targets_products import ExpertProducts, plain_experts


@contextlib.contextmanager
def routed_inputs(projections: Mapping[str, Projection], read: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Call `read(path, expert, x)` for every product of inputs x (…, n) with an expert's matrix.

    Args:
        projections: the fused weights by path.
        read: what is told.

    Raises:
        TargetError: experts ran, and no product with their weights was seen.
    """
    paths = list(projections)
    called: set[str] = set()
    seen: set[str] = set()

    def multiply(index: int, expert: int, x: Tensor, padded: bool) -> None:
        seen.add(paths[index])
        read(paths[index], expert, x[x.any(dim=1)] if padded else x)

    def noting(path: str) -> Callable[..., None]:
        return lambda *_: called.add(path)

    if not projections:
        yield
        return
    hooks: list[Any] = [p.module.register_forward_pre_hook(noting(path)) for path, p in projections.items()]
    try:
        with (
            plain_experts([p.module for p in projections.values()]),
            ExpertProducts(list(projections.values()), multiply),
        ):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    unseen = sorted(called - seen)
    if unseen:
        raise TargetError(
            f"{unseen[0]}: its experts ran, but not through a product with their matrices that can be followed; "
            f"leave it out with {arg('exclude_modules')}, or use {arg('method', 'magnitude')} for it"
        )
