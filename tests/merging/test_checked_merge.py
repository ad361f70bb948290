"""A checked merge computes each layer once, and an error leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import spp
from spp.errors import MaskError, NonFiniteError
from spp.kernels import use_kernels
from spp.layers.experts import SPPExperts
from spp.merging.weight import merge_cannot_fail, merge_tensor
from spp.rules import Adapter, Rule, get_rule
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import moe_model, projections
from tests.helpers.quantized import quantized_llama
from tests.helpers.tolerances import assert_same_bits
from tests.wrapping.test_wrap import assert_untouched, pruned, snapshot, stir

LAST = "model.layers.1.mlp.down_proj"
RULES = ("spp", "hira", "masked_lora")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, slice]]:
    """Count how often each block of each layer is built, by plain torch."""
    counted: Counter[tuple[int, Any]] = Counter()
    for name in RULES:
        kind = type(get_rule(name))

        def build(
            self: Rule, weight: Tensor, factors: Any, rows: slice, cols: slice, out: Tensor, inner: Any = kind.build
        ) -> None:
            first = next(value for value in vars(factors).values() if isinstance(value, Tensor))
            counted[first.data_ptr(), rows.start] += 1
            inner(self, weight, factors, rows, cols, out)

        monkeypatch.setattr(kind, "build", build)
    monkeypatch.setattr("spp.merging.weight.BLOCK_ELEMENTS", 256)
    return counted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"rounding": "stochastic", "seed": 1}], ids=str)
def test_each_block_is_built_once(rule: str, options: dict[str, Any], built: Counter[Any]) -> None:
    models = [stir(spp.wrap(pruned().to(torch.bfloat16), r=4, seed=0, rule=rule)) for _ in range(2)]
    with use_kernels("torch"):
        checked = spp.merge(models[0], **options)
        assert len(built) > 2 * len(checked.layers) and set(built.values()) == {1}
        unchecked = spp.merge(models[1], check=False, **options)
    assert checked == unchecked
    for name, module in projections(models[0]).items():
        assert_same_bits(module.weight, projections(models[1])[name].weight, name)


@pytest.mark.filterwarnings("ignore:quantizing the merged weights again:spp.errors.SPPWarning")
@pytest.mark.parametrize("wrapping", ["packed", "quantized", "requantized"])
def test_each_block_of_a_weight_in_another_form_is_built_once(wrapping: str, built: Counter[Any]) -> None:
    model = pruned() if wrapping == "packed" else quantized_llama("nf4")
    stir(spp.wrap(model, r=4, seed=0, packed=wrapping == "packed"))
    with use_kernels("torch"):
        spp.merge(model, requantize=wrapping == "requantized")
    assert built and set(built.values()) == {1}


def test_only_the_layer_that_the_bound_does_not_clear_is_built_twice(built: Counter[Any]) -> None:
    model = stir(spp.wrap(pruned().to(torch.float16), r=4, seed=0))
    layer = adapter_layers(model)[LAST]
    row, col = (int(i) for i in (layer.weight != 0).nonzero()[0])
    with torch.no_grad():
        layer.weight[row, col] = 6.5e4  # near the largest value, and not changed by the adapter
        layer.spp_alpha[:, col] = 0.0
    alpha = layer.spp_alpha.data_ptr()
    with use_kernels("torch"):
        spp.merge(model)
    assert {layer for (layer, _), count in built.items() if count != 1} == {alpha}
    assert {count for (layer, _), count in built.items() if layer == alpha} == {2}


def _alpha(layer: Any) -> None:
    layer.spp_alpha[2, 3] = float("nan")


def _beta(layer: Any) -> None:
    layer.spp_beta[0] = float("inf")


def _weight(layer: Any) -> None:
    layer.weight[0, 0] = float("nan")


def _overflow(layer: Any) -> None:
    row, col = (int(i) for i in (layer.weight != 0).nonzero()[0])
    layer.weight[row, col] = 6e4
    layer.spp_alpha[:, col] = 1.0
    layer.spp_beta[row] = 1.0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spoil", [_alpha, _beta, _weight, _overflow])
def test_what_cannot_be_merged_is_told_before_any_weight_changes(spoil: Callable[[Any], None], rounding: str) -> None:
    model = stir(spp.wrap(pruned().to(torch.float16), r=4, seed=0))
    with torch.no_grad():
        spoil(adapter_layers(model)[LAST])
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=LAST):
        spp.merge(model, rounding=rounding, seed=0)
    assert_untouched(model, before)


def test_a_quantizer_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stir(spp.wrap(quantized_llama("nf4"), r=4, seed=0))
    from spp.merging import model as merging

    inner, before = merging.quantize_like, snapshot(model)
    held = {name: tensor.clone() for name, tensor in model.named_buffers()}

    def quantize(layout: Any, weight: Tensor, where: str, **options: Any) -> Any:
        if where == LAST:
            raise MaskError(f"{where}: quantizing again would fill 1 zeros")
        return inner(layout, weight, where, **options)

    monkeypatch.setattr(merging, "quantize_like", quantize)
    with pytest.raises(MaskError, match=f"{LAST}: quantizing again"):
        spp.merge(model, requantize=True)
    assert_untouched(model, before)
    for name, tensor in model.named_buffers():
        assert_same_bits(tensor, held[name], name)


def test_a_mask_is_read_once_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from spp.merging import model as merging

    seen: list[tuple[int, ...]] = []
    inner = merging.scan_tensor
    monkeypatch.setattr(merging, "scan_tensor", lambda t, axis: seen.append(tuple(t.shape)) or inner(t, axis))
    model = stir(spp.wrap(pruned(), r=4, seed=0, target_modules=["q_proj"]))
    report = spp.merge(model, dtype=torch.bfloat16)
    assert len(seen) == len(projections(model)) == len(report.sparsity_report.tensors)
    assert report.sparsity_report == spp.sparsity(model)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_bound_clears_merges(rule: str, dtype: torch.dtype) -> None:
    """At every magnitude: whatever the bound clears merges, and some of it near the limit is cleared."""
    generator, chosen = torch.Generator().manual_seed(0), get_rule(rule)
    largest = torch.finfo(dtype).max
    cleared = []
    for share in (1e-3, 0.3, 0.5, 0.9, 0.98, 1.0, 1.02, 1.4):
        params = tuple(torch.ones(shape) for shape in chosen.shapes(6, 8, 1))
        weight = torch.rand(6, 8, generator=generator).mul_(0.5 * min(share, 1.0) * largest).to(dtype)
        if rule == "masked_lora":
            params[1].fill_((share - 0.5) * largest)
            weight[0, 0] = 0.5 * largest
        else:
            params[1].fill_(2 * share - 1)
            weight[0, 0] = 0.5 * largest
        clear = merge_cannot_fail([weight], [Adapter(chosen, params, 1.0)], 6, dtype)
        cleared.append(clear)
        if clear:
            merged, _ = merge_tensor(weight, Adapter(chosen, params, 1.0))
            assert bool(torch.isfinite(merged).all())
    assert cleared[2] and not any(cleared[5:])


def test_a_factor_that_overflows_on_the_way_is_not_cleared() -> None:
    rule, weight = get_rule("spp"), torch.full((4, 4), 1e-30)
    adapter = Adapter(rule, (torch.full((1, 4), 1e30), torch.full((4, 1), 1e30)), 1.0)
    assert not merge_cannot_fail([weight], [adapter], 4, None)
    with pytest.raises(NonFiniteError):
        merge_tensor(weight, adapter)
    assert merge_cannot_fail([torch.zeros(4, 0)], [Adapter(rule, (torch.ones(1, 0), torch.ones(4, 1)), 1.0)], 4, None)


@pytest.mark.parametrize("packed", [False, True])
def test_fused_experts_are_built_once_and_their_lies_are_told(packed: bool, built: Counter[Any]) -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    stir(spp.wrap(model, r=4, seed=0, packed=packed))
    layer: Any = next(one for one in adapter_layers(model).values() if isinstance(one, SPPExperts))
    last = layer.spp_beta.data[-1, 0].clone()
    with use_kernels("torch"):
        layer.spp_beta.data[-1, 0] = float("nan")
        before = snapshot(model)
        with pytest.raises(NonFiniteError, match=r"\[\d+\]\.spp_beta holds NaN"):
            spp.merge(model)
        after = snapshot(model)
        layer.spp_beta.data[-1, 0] = last
        built.clear()
        spp.merge(model)
    assert built and set(built.values()) == {1}
    for name, value in before["values"].items():  # type: ignore[attr-defined]
        assert_same_bits(after["values"][name].nan_to_num(), value.nan_to_num(), name)  # type: ignore[index]
