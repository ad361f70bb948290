"""Inputs kept in bfloat16: what they save, what they change, and what they do not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import spp
from spp.errors import ConfigError, WrapError
from spp.functional import spp_linear
from spp.kernels import autograd
from spp.wrapping.wrap import set_saved_activations
from tests.helpers.layers import SHAPES, Case, make_case
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.kernels.test_linear import Saved


def run(case: Case, choice: str) -> tuple[Tensor, list[Tensor]]:
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0, saved_activations=choice)
    return y, list(torch.autograd.grad(y, case.inputs(), case.dy))


@pytest.mark.parametrize(("m", "n", "r", "leading"), SHAPES)
def test_outputs_and_input_gradients_are_bit_for_bit_and_the_others_those_of_the_rounded_input(
    m: int, n: int, r: int, leading: tuple[int, ...]
) -> None:
    case = make_case(m, n, r, leading)
    y, (d_x, d_bias, d_alpha, d_beta) = run(case, "full")
    kept_y, (kept_x, kept_bias, kept_alpha, kept_beta) = run(case, "bfloat16")
    for actual, expected in ((kept_y, y), (kept_x, d_x), (kept_bias, d_bias)):
        assert_same_bits(actual, expected)
    rounded = case.to(torch.float64)
    rounded.x = case.x.detach().bfloat16().double().requires_grad_()
    *_, alpha64, beta64 = torch.autograd.grad(rounded.reference(), rounded.inputs(), rounded.dy)
    assert_matches(kept_alpha, alpha64, torch.float32, what="alpha")
    assert_matches(kept_beta, beta64, torch.float32, what="beta")
    # Against the exact input: every term of the sums is off by at most 2⁻⁸ of its size.
    bounds = case.to(torch.float64)
    bounds.x, bounds.dy, bounds.weight = (t.abs() for t in (bounds.x.detach(), bounds.dy, bounds.weight.detach()))
    bounds.alpha, bounds.beta = (t.detach().abs().requires_grad_() for t in (bounds.alpha, bounds.beta))
    most = torch.autograd.grad(bounds.reference(), (bounds.alpha, bounds.beta), bounds.dy)
    for actual, exact, bound in zip((kept_alpha, kept_beta), (d_alpha, d_beta), most, strict=True):
        assert bool(((actual.double() - exact.double()).abs() <= 2**-8 * bound + 2e-5 * bound).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    case = make_case(12, 8, 4, (5,), dtype)
    _, full = run(case, "full")
    _, kept = run(case, "bfloat16")
    for actual, expected in zip(kept, full, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_half_of_the_input_is_kept_once_for_all_layers_that_share_it(dropout: float) -> None:
    case = make_case(64, 32, 8, (40,))
    x = case.x * 1.0
    with Saved() as saved:
        for _ in range(3):
            spp_linear(x, case.weight, None, case.alpha, case.beta, 2.0, dropout, saved_activations="bfloat16")
    for owned in (case.weight, case.alpha, case.beta):
        saved.storages.pop(owned.untyped_storage().data_ptr())
    assert x.untyped_storage().data_ptr() not in saved.storages
    bits = 3 * 40 * 32 // 8 if dropout else 0
    assert sum(saved.storages.values()) == 40 * 32 * 2 + bits


def test_a_view_is_kept_as_it_is() -> None:
    case = make_case(64, 32, 8, (40,))
    x = (case.x * 1.0).view(4, 10, 32)
    with Saved() as saved:
        spp_linear(x, case.weight, None, case.alpha, case.beta, 2.0, saved_activations="bfloat16")
    assert x.untyped_storage().data_ptr() in saved.storages


def test_an_input_that_was_written_to_is_rounded_again() -> None:
    x = torch.ones(2, 3)
    first = autograd.kept_for_backward(x, "bfloat16")
    assert autograd.kept_for_backward(x, "bfloat16") is first
    x.add_(1)
    assert autograd.kept_for_backward(x, "bfloat16").tolist() == [[2.0] * 3] * 2


def test_a_copy_lives_no_longer_than_its_input() -> None:
    before = len(autograd._copies)
    x = torch.ones(2, 3)
    autograd.kept_for_backward(x, "bfloat16")
    assert len(autograd._copies) == before + 1
    del x
    gc.collect()
    assert len(autograd._copies) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    case = make_case(12, 12, 4, (5,))

    def block(x: Tensor) -> Tensor:
        hidden = spp_linear(x, case.weight, None, case.alpha, case.beta, 2.0, saved_activations="bfloat16")
        return spp_linear(hidden.tanh(), case.weight, None, case.alpha, case.beta, 2.0, saved_activations="bfloat16")

    expected = torch.autograd.grad(block(case.x), (case.x, case.alpha, case.beta), case.dy)
    y: Any = torch.utils.checkpoint.checkpoint(block, case.x, use_reentrant=reentrant)
    y.backward(case.dy)
    for tensor, oracle in zip((case.x, case.alpha, case.beta), expected, strict=True):
        assert_same_bits(tensor.grad, oracle)  # type: ignore[arg-type]


def test_a_whole_model_keeps_less_and_its_gradients_hardly_change() -> None:
    model = spp.wrap(prune_nm_(tiny_llama()), r=4, seed=0)
    for layer in model.modules():
        if isinstance(layer, spp.SPPLinear):
            torch.nn.init.normal_(layer.spp_beta, 0, 0.1)
    ids = torch.randint(3, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    found, kept = {}, {}
    for choice in ("full", "bfloat16"):
        set_saved_activations(model, choice)
        model.zero_grad()
        with Saved() as saved:
            loss = model(input_ids=ids, labels=ids).loss
        kept[choice] = sum(saved.storages.values())
        loss.backward()
        found[choice] = [loss.detach(), *(p.grad.clone() for p in spp.adapter_parameters(model))]
    assert kept["bfloat16"] < kept["full"]
    assert torch.equal(found["bfloat16"][0], found["full"][0])
    pairs = list(zip(found["bfloat16"][1:], found["full"][1:], strict=True))
    assert sum(torch.equal(*pair) for pair in pairs) == 4  # α and β of the two o_proj, whose input is a view
    for actual, expected in pairs:
        assert float((actual - expected).norm()) <= 2**-8 * float(expected.norm())


def test_wrong_choices_are_refused() -> None:
    case = make_case(12, 8, 4, (5,))
    with pytest.raises(ConfigError, match="'half'; known: full, bfloat16"):
        run(case, "half")
    with pytest.raises(ConfigError, match="'float16'"):
        set_saved_activations(spp.wrap(prune_nm_(tiny_llama()), r=4), "float16")
    with pytest.raises(WrapError):
        set_saved_activations(tiny_llama(), "bfloat16")
