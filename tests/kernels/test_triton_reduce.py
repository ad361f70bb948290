"""The kernel that reduces W ⊙ G into dα and dβ, against the plain rule in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.rules import get_rule
from spp.rules.spp import Factors
from tests.helpers.layers import make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits

RULE = get_rule("spp")
WHOLE = slice(None)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
MATRICES = [  # (m, n, r): primes, one row, r = 1, r = m, several tiles of columns, several parts of a row block
    (12, 8, 4),
    (13, 7, 5),
    (5, 3, 2),
    (1, 3, 1),
    (7, 7, 7),
    (6, 5, 1),
    (131, 40, 1),
    (200, 129, 3),
    (9, 300, 2),
]


class Reduction:
    """W, G and the factors of one layer, and the gradients by the kernel and by the twin in float64."""

    def __init__(self, m: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
        case = make_case(m, n, r, (1,), dtype)
        self.weight, alpha, beta = (t.detach().to(device) for t in (case.weight, case.alpha, case.beta))
        generator = torch.Generator().manual_seed(1)
        self.gradient = torch.randn(m, n, generator=generator).to(device, dtype)
        self.factors: Factors = RULE.prepare((alpha, beta), 2.0, m, torch.float32)
        self.exact: Factors = RULE.prepare((alpha, beta), 2.0, m, torch.float64)

    def run(self, step: int | None = None, needed: tuple[bool, bool] = (True, True)) -> list[Tensor | None]:
        from spp.kernels.triton.reduce_kernel import reduce

        n = self.weight.shape[1]
        grads = RULE.empty_grads(self.factors, needed)
        for grad in grads:
            if grad is not None:
                grad.fill_(float("nan") if step is None else 0.0)
        for start in range(0, n, step or n):
            cols = slice(start, min(start + (step or n), n))
            part = self.gradient[:, cols].contiguous()
            reduce(self.weight, self.factors, cols, part, grads, accumulate=step is not None)
        return grads

    def oracle(self) -> list[Tensor]:
        grads = RULE.empty_grads(self.exact, (True, True))
        RULE.reduce(self.weight, self.exact, WHOLE, WHOLE, self.gradient.double(), grads, accumulate=False)
        return [grad for grad in grads if grad is not None]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), MATRICES)
def test_values(m: int, n: int, r: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    reduction = Reduction(m, n, r, dtype, triton_device)
    given = reduction.gradient.clone()
    for name, found, exact in zip(("alpha", "beta"), reduction.run(), reduction.oracle(), strict=True):
        assert found is not None
        assert_matches(found, exact, torch.float32, what=name)
    assert_same_bits(reduction.gradient, given)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("m", "n", "r"), [(13, 200, 5), (200, 300, 3)])
def test_columns_in_chunks_add_up(m: int, n: int, r: int, triton_device: torch.device) -> None:
    reduction = Reduction(m, n, r, torch.float32, triton_device)
    for found, exact in zip(reduction.run(step=128), reduction.oracle(), strict=True):
        assert found is not None
        assert_matches(found, exact, torch.float32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize(("m", "n", "r"), [(13, 7, 5), (131, 40, 1)])
def test_only_what_is_wanted(m: int, n: int, r: int, needed: tuple[bool, bool], triton_device: torch.device) -> None:
    reduction = Reduction(m, n, r, torch.float32, triton_device)
    both = reduction.run()
    for wanted, one, of_both in zip(needed, reduction.run(needed=needed), both, strict=True):
        assert (one is not None) == wanted
        if one is not None and of_both is not None:
            assert_same_bits(one, of_both)


@pytest.mark.slow
def test_a_run_repeats_bit_for_bit(triton_device: torch.device) -> None:
    reduction = Reduction(200, 129, 3, torch.float16, triton_device)
    for first, second in zip(reduction.run(), reduction.run(), strict=True):
        assert first is not None and second is not None
        assert_same_bits(first, second)


def test_a_transposed_weight(triton_device: torch.device) -> None:
    reduction = Reduction(13, 34, 5, torch.float32, triton_device)
    expected = reduction.run()
    reduction.weight = reduction.weight.t().contiguous().t()
    for found, same in zip(reduction.run(), expected, strict=True):
        assert found is not None and same is not None
        assert_same_bits(found, same)
