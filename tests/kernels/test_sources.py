"""What the kernels ask of a weight that is no tensor: blocks, each until the next one only, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from spp.kernels import backend
from spp.kernels.frozen import frozen_linear
from spp.kernels.linear import linear
from spp.rules import Adapter, get_rule
from spp.weights.base import DenseWeight, Weight
from tests.helpers.layers import SHAPES, make_case
from tests.helpers.tolerances import assert_same_bits


class Forgetful(DenseWeight):
    """Gives copies of blocks, and destroys each when the next is asked for."""

    is_tensor = False

    def __init__(self, log: list[tuple[int, ...]], weight: Tensor) -> None:
        super().__init__(weight)
        self.log = log
        self.last: Tensor | None = None

    def block(self, rows: slice, cols: slice) -> Tensor:
        if self.last is not None:
            self.last.fill_(float("nan"))
        self.last = super().block(rows, cols).clone()
        self.log.append(tuple(self.last.shape))
        return self.last

    def maker(self) -> Callable[..., Weight]:
        return partial(Forgetful, self.log)


class Blocked(DenseWeight):
    """A tensor that is asked for the same blocks as what is none: without an adapter, a tensor is multiplied whole."""

    is_tensor = False

    def maker(self) -> Callable[..., Weight]:
        return Blocked


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("elements", [2**21, 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_source_gives_the_bits_of_the_tensor(
    dtype: torch.dtype, elements: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    for m, n, r, leading in SHAPES:
        case = make_case(m, n, r, leading, dtype)
        results = []
        log: list[tuple[int, ...]] = []
        for weight in (case.weight if dropout == 0 else Blocked(case.weight), Forgetful(log, case.weight)):
            torch.manual_seed(5)
            y = linear(case.x, weight, case.bias, Adapter(get_rule("spp"), (case.alpha, case.beta), 2.0, dropout))
            results.append([y, *torch.autograd.grad(y, case.inputs(), case.dy)])
        for dense, sourced in zip(*results, strict=True):
            assert_same_bits(sourced, dense, f"{m} × {n}")
        assert log
        assert max(rows * cols for rows, cols in log) <= max(2 * elements, m, n)


def test_a_source_without_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", 24)
    case = make_case(13, 7, 5, (2, 3))
    log: list[tuple[int, ...]] = []
    with torch.no_grad():
        expected = torch.nn.functional.linear(case.x, case.weight, case.bias)
        torch.testing.assert_close(frozen_linear(case.x, Forgetful(log, case.weight), case.bias), expected)
        assert len(log) == 5
        assert_same_bits(frozen_linear(case.x, DenseWeight(case.weight), case.bias), expected)
