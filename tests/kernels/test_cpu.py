"""Both vendors' products are the product."""

from __future__ import annotations

import pytest
import torch

from spp.kernels import cpu
from tests.helpers.tolerances import assert_matches


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize(("rows", "m", "n"), [(5, 7, 3), (1, 64, 48), (0, 4, 2), (33, 1, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_match_float64(
    rows: int, m: int, n: int, dtype: torch.dtype, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if faster and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: faster)
    generator = torch.Generator().manual_seed(0)
    x, dy, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, n), (rows, m), (m, n), (m,))
    )
    for given in (weight, weight.t().contiguous().t()):
        for b in (bias, None):
            found = cpu.linear_product(*(t if t is None else t.to(dtype) for t in (x, given, b)))
            assert_matches(found, torch.nn.functional.linear(x, weight, b), dtype)
        assert_matches(cpu.input_product(dy.to(dtype), given.to(dtype)), dy @ weight, dtype)
