"""The rules with low-rank factors: bits, values, gradients and zeros against float64, and the same road as SPP's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spp
from spp.errors import AdapterError, ConfigError
from spp.kernels import backend
from spp.kernels.cpu import may_vanish
from spp.kernels.linear import linear
from spp.rules import Adapter, effective_weight, get_rule
from tests.helpers.layers import SHAPES as ALL_SHAPES
from tests.helpers.layers import Case, make_case
from tests.helpers.models import moe_model, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros

NAMES = ["hira", "masked_lora"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(m, n, min(m, n, r), leading) for m, n, r, leading in ALL_SHAPES]
SCALING = 1.5


def make_params(m: int, n: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (m, r)))
    return [a.to(small).requires_grad_(), b.to(small).requires_grad_()]


def formula(name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W_eff by the formula, written out once more."""
    return weight * (1 + SCALING * (b @ a)) if name == "hira" else weight + SCALING * (b @ a) * (weight != 0)


def plain(name: str, case: Case, params: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the formula, computed in `dtype`."""
    low, (a, b) = case.to(dtype), [p.detach().to(dtype).requires_grad_() for p in params]
    changed = formula(name, low.weight, a, b) - low.weight
    x = low.x if mask is None else low.x * mask.to(dtype)
    out = torch.nn.functional.linear(low.x, low.weight, low.bias) + torch.nn.functional.linear(x, changed)
    assert low.bias is not None
    return [out, *torch.autograd.grad(out, [low.x, low.bias, a, b], low.dy)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_added_in_order_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    rule = get_rule(name)
    for m, n, r, leading in SHAPES:
        weight = make_case(m, n, 1, leading, dtype).weight
        params = make_params(m, n, r, dtype)
        a, b = (p.detach() for p in params)
        update = torch.zeros(m, n, dtype=a.dtype)
        for k in range(r):
            update = update + (b[:, k : k + 1] * SCALING) * a[k]
        wide = weight.to(a.dtype)
        expected = wide * (1 + update) if name == "hira" else wide + update * (wide != 0)
        actual = effective_weight(weight, Adapter(rule, params, SCALING))
        assert_same_bits(actual + 0.0, expected.to(dtype) + 0.0)  # + 0: the sign of a zero is free
        assert_same_zeros(actual, weight)
        exact = formula(name, weight.double(), a.double(), b.double())
        assert_matches(actual, exact, dtype, plain=exact.to(dtype))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("elements", [2**22, 24])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    name: str, dtype: torch.dtype, dropout: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    for m, n, r, leading in SHAPES:
        case, params = make_case(m, n, 1, leading, dtype), make_params(m, n, r, dtype)
        assert case.bias is not None
        torch.manual_seed(3)
        mask = torch.nn.functional.dropout(torch.ones_like(case.x), dropout) if dropout else None
        torch.manual_seed(3)
        y = linear(case.x, case.weight, case.bias, Adapter(get_rule(name), params, SCALING, dropout))
        grads = torch.autograd.grad(y, [case.x, case.bias, *params], case.dy)
        for actual, exact, low in zip(
            [y, *grads],
            plain(name, case, params, mask, torch.float64),
            plain(name, case, params, mask, dtype),
            strict=True,
        ):
            assert_matches(actual, exact, dtype, low)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_the_formula(name: str) -> None:
    case, params = make_case(13, 7, 1, (3,), torch.float64), make_params(13, 7, 5, torch.float64)
    mask = torch.rand(3, 7, dtype=torch.float64)
    found = get_rule(name).oracle(case.x, case.weight, case.bias, params, SCALING, mask)
    assert_matches(found, plain(name, case, params, mask, torch.float64)[0], torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_no_block_changes_a_bit(name: str) -> None:
    rule, weight, params = get_rule(name), make_case(40, 33, 1, (2,)).weight, make_params(40, 33, 5, torch.float32)
    factors = rule.prepare(params, SCALING, 40, torch.float32)
    whole = effective_weight(weight, Adapter(rule, params, SCALING))
    for rows, cols in [(slice(3, 17), slice(None)), (slice(None), slice(5, 6)), (slice(39, 40), slice(1, 32))]:
        block = weight[rows, cols]
        out = torch.empty(block.shape)
        rule.build(block, factors, rows, cols, out)
        assert_same_bits(out, whole[rows, cols].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_that_cancels_is_rescued(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0, 4.0]], dtype=dtype)
    params = [torch.tensor([[-0.5, 1.0, 9.0, 1.0]]), torch.ones(1, 1)]
    merged = effective_weight(weight, Adapter(get_rule("masked_lora"), params, 2.0))[0]
    assert bool(merged[0] > 0) and bool(merged[1] < 0) and merged[2:].tolist() == [0.0, 6.0]
    assert float(merged[:2].abs().max()) < 1e-6


def test_the_bound_on_the_change_is_one() -> None:
    for name in NAMES:
        rule, params = get_rule(name), make_params(9, 6, 3, torch.float32)
        largest = rule.largest_factor(rule.prepare(params, SCALING, 9, torch.float32))
        change = SCALING * (params[1] @ params[0]).detach().abs().max()
        assert largest >= float(change)
        assert may_vanish(torch.ones(9, 6), largest)
        idle = rule.prepare([params[0], torch.zeros(9, 3)], SCALING, 9, torch.float32)
        assert rule.largest_factor(idle) == 0
        broken = rule.prepare([params[0], params[1] * math.nan], SCALING, 9, torch.float32)
        assert math.isnan(rule.largest_factor(broken))


def test_only_the_gradients_that_are_wanted() -> None:
    case, params = make_case(12, 8, 1, (5,)), make_params(12, 8, 4, torch.float32)
    params[0].requires_grad_(False)
    linear(case.x, case.weight, None, Adapter(get_rule("hira"), params, 1.0)).sum().backward()
    assert params[0].grad is None and params[1].grad is not None


def trained(name: str, **options: object) -> torch.nn.Module:
    """A small pruned Llama, wrapped, one step away from its start."""
    model = spp.wrap(prune_nm_(tiny_llama()), r=3, rule=name, seed=1, **options)  # type: ignore[arg-type]
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            assert parameter.grad is not None
            parameter -= 0.5 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-12)
    return model.eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_goes_the_whole_road(name: str, packed: bool, tmp_path: Path) -> None:
    base = prune_nm_(tiny_llama())
    ids = torch.arange(40).view(2, 20) % 200  # more tokens than evaluation keeps W_eff for
    model = trained(name, packed=packed)
    with torch.no_grad():
        before, tuned = base(ids).logits, model(ids).logits
    assert float((before - tuned).abs().max()) > 1e-3
    spp.save_adapter(model, tmp_path / "adapter")
    loaded = spp.load_adapter(prune_nm_(tiny_llama()), tmp_path / "adapter")
    names = {key.rsplit(".", 1)[-1] for key in spp.adapter_state_dict(loaded)}
    assert names == {f"{name}_A", f"{name}_B"}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, tuned)
    base.save_pretrained(tmp_path / "base")
    spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    report = spp.merge(model)
    assert report.survived == pytest.approx(1.0, abs=1e-3) and report.sparsity_report.pattern == "2:4"
    spp.verify(base, model)
    spp.verify(tmp_path / "base", tmp_path / "merged")
    on_disk = type(model).from_pretrained(tmp_path / "merged")
    for (key, one), (_, other) in zip(model.state_dict().items(), on_disk.state_dict().items(), strict=True):
        assert torch.equal(one, other), key
    if not packed:
        with torch.no_grad():
            assert_matches(model(ids).logits, tuned, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_fused_experts_have_factors_of_their_own(name: str) -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    spp.wrap(model, r=2, rule=name, seed=0)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain_logits = model(ids).logits  # B is zero
        for key, parameter in model.named_parameters():
            if key.endswith(f"{name}_B"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        tuned = model(ids).logits
        assert float((plain_logits - tuned).abs().max()) > 1e-4
        spp.merge(model)
        assert_matches(model(ids).logits, tuned, torch.float32)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"k_proj: r = 40 .* 1 and 32"):
        spp.wrap(prune_nm_(tiny_llama()), r=40, rule="hira")
    spp.save_adapter(trained("hira"), tmp_path / "adapter")
    other = spp.wrap(prune_nm_(tiny_llama()), r=3, rule="masked_lora")
    with pytest.raises(AdapterError, match="rule"):
        spp.load_adapter(other, tmp_path / "adapter")
