"""A layer's tap sees, in every backward, the dY and X whose product is the gradient of the effective weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spp.layers.linear import SPPLinear
from tests.helpers.models import prune_nm_
from tests.helpers.tolerances import assert_matches, assert_same_bits


def layer(**options: Any) -> SPPLinear:
    torch.manual_seed(0)
    block = nn.Module()
    block.up_proj = nn.Linear(24, 13)
    prune_nm_(block)
    return SPPLinear(block.up_proj, r=3, **options).train()


def run(made: SPPLinear, x: Tensor, dy: Tensor, forward: Any = None) -> list[Tensor]:
    torch.manual_seed(1)  # dropout
    y = made(x) if forward is None else forward(made, x)
    return list(torch.autograd.grad(y, [x, *made.adapter_parameters()], dy))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"dropout": 0.5}, {"dropout": 0.5, "dropout_mode": "alpha"}])
def test_the_product_is_the_gradient(options: dict[str, Any], trained: bool) -> None:
    made = layer(**options)
    if trained:
        nn.init.normal_(made.spp_beta)
    x, dy = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 13)
    without = run(made, x, dy)
    seen: list[tuple[Tensor, Tensor]] = []
    made.tap = lambda *args: seen.append(args)
    for found, expected in zip(run(made, x, dy), without, strict=True):
        assert_same_bits(found, expected)
    ((gradient, tokens),) = seen
    assert gradient.shape == (10, 13) and tokens.shape == (10, 24)
    weight = made.effective_weight().double().requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.linear(x.detach().double(), weight), weight, dy.double())
    assert_matches(gradient.T @ tokens, expected, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_once_under_checkpointing(reentrant: bool) -> None:
    made, x, dy = layer(), torch.randn(5, 24, requires_grad=True), torch.randn(5, 13)
    seen: list[Any] = []
    made.tap = lambda *args: seen.append(args)
    checkpoint(made, x, use_reentrant=reentrant).backward(dy)
    assert len(seen) == 1 and torch.equal(seen[0][0], dy) and torch.equal(seen[0][1], x)


def test_not_where_nothing_is_learned() -> None:
    made = layer()
    made.tap = lambda *_: pytest.fail("no gradient was asked for")
    with torch.no_grad():
        made(torch.randn(5, 24))
    made.eval()
    made(torch.randn(5, 24))
