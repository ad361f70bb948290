"""The one table of tolerances, and the comparisons that use it.

Errors are absolute, relative to the largest magnitude of the float64 oracle: a sum of k terms of size 1 is not better
known where it happens to cancel. float64 and float32 have a bound of their own; 16-bit results follow another rule:
their error against the oracle is at most twice that of the plain low-precision computation of the same formula, plus
one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5}
LOGITS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 0.08,
    torch.float16: 0.02,
}  # of a whole small model
STEP_LOSS = 1e-3  # of a training step, relative, against the published formula in plain torch
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PLAIN_FACTOR = 2.0


def error(actual: Tensor, oracle: Tensor) -> float:
    """The largest element-wise error, relative to the oracle's largest magnitude; infinite for NaN or another shape."""
    if actual.shape != oracle.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - oracle.detach().double()).abs().max()
    value = float(difference / oracle.detach().double().abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def assert_matches(
    actual: Tensor, oracle: Tensor, dtype: torch.dtype, plain: Tensor | None = None, what: str = ""
) -> None:
    """Assert that `actual`, computed in `dtype`, is the float64 `oracle` within the table.

    Args:
        plain: for 16-bit dtypes, the plain low-precision computation of the same.
    """
    found = error(actual, oracle)
    if dtype in RELATIVE:
        bound = RELATIVE[dtype]
    else:
        assert plain is not None, "16-bit comparisons need the plain computation"
        bound = PLAIN_FACTOR * error(plain, oracle) + ROUNDING[dtype]
    assert found <= bound, f"{what}: error {found:.3g} above {bound:.3g}"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert equality of dtype, shape and every bit."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{what}: {actual.dtype} {actual.shape}"
    one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (actual, expected))
    same = one == other
    assert bool(same.all()), f"{what}: {int((~same).sum())} bytes differ"


def assert_same_zeros(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert that two tensors are zero in the same places."""
    differing = int(((actual != 0) ^ (expected != 0)).sum())
    assert actual.shape == expected.shape and differing == 0, f"{what}: {differing} zeros differ"
