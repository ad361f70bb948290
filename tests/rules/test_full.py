"""The rule of all kept weights: values, gradients and zeros against float64, and the same road as the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spp
from spp.configs.tuning import TuneConfig
from spp.errors import ConfigError
from spp.kernels.linear import linear
from spp.rules import Adapter, effective_weight, get_rule
from tests.helpers.layers import SHAPES, Case, make_case
from tests.helpers.models import moe_model, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_matches, assert_same_zeros

RULE = get_rule("full")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def update(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """D with numbers everywhere, as a file may hold it, where W is zero too."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(m, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(small)


def formula(case: Case, d: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of the formula, computed in `dtype`."""
    low, e = case.to(dtype), d.detach().to(dtype).requires_grad_()
    assert low.bias is not None
    out = torch.nn.functional.linear(low.x, low.weight + e * (low.weight != 0), low.bias)
    return [out, *torch.autograd.grad(out, [low.x, low.bias, e], low.dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    for m, n, _, leading in SHAPES:
        case, d = make_case(m, n, 1, leading, dtype), update(m, n, dtype).requires_grad_()
        out = linear(case.x, case.weight, case.bias, Adapter(RULE, [d], 1.0))
        found = [out, *torch.autograd.grad(out, [case.x, case.bias, d], case.dy)]
        wanted, plain = (formula(case, d, precision) for precision in (torch.float64, dtype))
        for one, other, same in zip(found, wanted, plain, strict=True):
            assert_matches(one, other, dtype, plain=same)
        assert not found[-1][case.weight == 0].any(), "a zero of W has no gradient"
        assert_same_zeros(effective_weight(case.weight, Adapter(RULE, [d], 1.0)), case.weight)


def test_a_weight_that_cancels_is_rescued() -> None:
    weight = torch.tensor([[0.5, 0.0, -0.25]])
    merged = effective_weight(weight, Adapter(RULE, [torch.tensor([[-0.5, 3.0, 0.125]])], 1.0))
    smallest = torch.finfo(torch.float32).smallest_normal
    assert merged.tolist() == [[smallest, 0.0, -0.125]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_goes_the_whole_road(packed: bool, tmp_path: Path) -> None:
    base = prune_nm_(tiny_llama())
    model = spp.wrap(prune_nm_(tiny_llama()), rule="full", packed=packed)
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-2, weight_decay=0.1)
    ids = torch.arange(40).view(2, 20) % 200
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, d in spp.adapter_state_dict(model).items():
        weight = base.get_parameter(key.removesuffix("full_D") + "weight")
        assert bool((d != 0)[weight != 0].any()) and not d[weight == 0].any(), key
    with torch.no_grad():
        before, tuned = base(ids).logits, model.eval()(ids).logits
    assert float((before - tuned).abs().max()) > 1e-3
    spp.save_adapter(model, tmp_path / "adapter")
    loaded = spp.load_adapter(prune_nm_(tiny_llama()), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, tuned)
    base.save_pretrained(tmp_path / "base")
    spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert spp.merge(model).sparsity_report.pattern == "2:4"
    spp.verify(base, model)
    on_disk = type(model).from_pretrained(tmp_path / "merged")
    for (key, one), (_, other) in zip(model.state_dict().items(), on_disk.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


def test_fused_experts() -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    spp.wrap(model, rule="full")
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter -= 0.1 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-12)
        tuned = model(ids).logits
        spp.merge(model)
        assert_matches(model(ids).logits, tuned, torch.float32)


def test_it_has_no_rank_no_scaling_and_a_rate_of_its_own() -> None:
    config = spp.SPPConfig(rule="full")
    assert (config.r, config.scaling) == (1, 1.0)
    for options in ({"r": 8}, {"scaling": 0.5}, {"rank_pattern": {"q_proj": 1}}):
        with pytest.raises(ConfigError, match="full"):
            spp.SPPConfig(rule="full", **options)  # type: ignore[arg-type]
    tuned = TuneConfig(model="m", data="d.txt", output_dir="run", rule="full")
    assert tuned.lr == 4e-4 and tuned.adapter_config().r == 1


def test_negative_zeros_and_vanishing_weights_are_told_apart() -> None:
    """Where the counts could agree by chance: a zero with a sign, beside a weight that cancels."""
    weight = torch.tensor([[0.5, -0.0, 0.0, -0.25]])
    d = torch.tensor([[-0.5, 1.0, 1.0, 0.0]])
    merged = effective_weight(weight, Adapter(RULE, [d], 1.0))
    assert merged[0, 0] != 0 and not merged[0, 1] and not merged[0, 2] and merged[0, 3] == -0.25
    low = torch.tensor([[-1e-7, 0.0]]).to(torch.float16)  # rounds to zero with a sign in the dtype of the base
    assert low[0, 0] != 0
    lost = effective_weight(low, Adapter(RULE, [torch.tensor([[1.19e-7 - 1e-8, 0.0]])], 1.0))
    assert lost[0, 0] != 0 and not lost[0, 1]
