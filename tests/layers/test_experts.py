"""SPPExperts: the products of fused experts with the effective weight, whatever code multiplies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.functional import spp_linear_reference
from spp.layers.experts import SPPExperts, adapt_experts, adapters_of, release_experts
from spp.models.expert_products import set_experts_implementation
from spp.models.projection import find_projections
from tests.helpers.models import NAMED_OTHERWISE, moe_model
from tests.helpers.tolerances import assert_matches

FUSED = [
    name
    for name in ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "deepseek_v3")
    if name not in NAMED_OTHERWISE
]


def _experts(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter))


def _adapted(model: nn.Module, r: int = 3, **options: Any) -> dict[str, SPPExperts]:
    module = _experts(model)
    found = [p for p in find_projections(model) if p.module is module]
    adapters = {p.name: SPPExperts(p, SPPConfig(r, **options)) for p in found}
    adapt_experts(adapters)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.spp_beta.normal_(std=0.5)
    return adapters


def _inputs(model: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """What the experts are called with, once."""
    seen: list[Any] = []
    hook = _experts(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(2)), use_cache=False)
    hook.remove()
    return seen[0]


def _merged_twin(module: nn.Module, adapters: dict[str, SPPExperts]) -> tuple[nn.Module, list[torch.Tensor]]:
    """The plain module whose weights are the paper's W ⊙ (1 + s A ⊙ β), differentiable in fresh copies of α and β."""
    twin = copy.deepcopy(module)
    release_experts(twin)
    set_experts_implementation(twin, "eager")  # the copy's own config; the grouped product does not know float64
    leaves = []
    for name, adapter in adapters.items():
        alpha, beta = (p.detach().double().requires_grad_() for p in adapter.adapter_parameters())
        leaves += [alpha, beta]
        identity = torch.eye(adapter.in_features, dtype=torch.float64)
        whole = torch.stack(
            [
                spp_linear_reference(identity, w.detach().double(), None, a, b, adapter.scaling).T
                for w, a, b in zip(adapter.projection.matrices(), alpha, beta, strict=True)
            ]
        )
        del twin._parameters[name]
        twin.__dict__[name] = whole if adapter.projection.input_axis == -1 else whole.transpose(1, 2)
    return twin.double(), leaves


@pytest.mark.sampled(6)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", FUSED)
def test_outputs_and_gradients_are_those_of_the_effective_weight(architecture: str, implementation: str) -> None:
    model = moe_model(architecture)
    args, kwargs = _inputs(model)
    module = _experts(model)
    if set_experts_implementation(module, implementation) is None and implementation != "eager":
        pytest.skip("this architecture has one form only")
    adapters = _adapted(model)
    twin, leaves = _merged_twin(module, adapters)
    x = args[0].clone().requires_grad_()
    x64 = args[0].double().requires_grad_()
    rest = [a.double() if a.is_floating_point() else a for a in args[1:]]
    y, expected = module(x, *args[1:], **kwargs), twin(x64, *rest, **kwargs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    found = [p for adapter in adapters.values() for p in adapter.adapter_parameters()]
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves)
    assert_matches(y, expected, torch.float32)
    assert_matches(x.grad, x64.grad, torch.float32)
    for parameter, leaf in zip(found, leaves, strict=True):
        assert_matches(parameter.grad, leaf.grad, torch.float32)
    assert all(adapter.projection.weight.grad is None for adapter in adapters.values())


def test_only_experts_with_tokens_get_gradients() -> None:
    model = moe_model("mixtral")
    (hidden, chosen, weights), _ = _inputs(model)
    adapters, module = _adapted(model), _experts(model)
    module(hidden, torch.where(chosen == 3, 2, chosen), weights).sum().backward()
    for adapter in adapters.values():
        for parameter in adapter.adapter_parameters():
            sizes = parameter.grad.flatten(1).abs().amax(dim=1)
            assert sizes[3] == 0
            assert (sizes[:3] > 0).all()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_keys_module_and_parameters_stay_and_come_back(architecture: str) -> None:
    model = moe_model(architecture)
    module = _experts(model)
    before, keys = dict(module.named_parameters()), list(model.state_dict())
    used = set_experts_implementation(module, "batched_mm")  # which cannot be followed: a call runs the plain form
    adapters = _adapted(model)
    assert _experts(model) is module
    assert set(model.state_dict()) - set(keys) == {
        f"model.layers.0.mlp.experts.{name}.spp_{kind}" for name in adapters for kind in ("alpha", "beta")
    }
    assert adapters["down_proj"].spp_alpha.shape == (4, 3, 24)
    assert adapters["down_proj"].spp_beta.shape == (4, 32, 1)
    assert module.gate_up_proj is before["gate_up_proj"]
    assert not module.gate_up_proj.requires_grad
    release_experts(module)
    assert module.config._experts_implementation == "batched_mm"
    assert list(model.state_dict()) == keys
    assert all(p is before[n] and p.requires_grad for n, p in module.named_parameters())
    assert "forward" not in module.__dict__
    set_experts_implementation(module, used)


def test_without_effect_the_own_products_run() -> None:
    model = moe_model("mixtral")
    args, kwargs = _inputs(model)
    module = _experts(model)
    with torch.no_grad():
        plain = module(*args, **kwargs)
        adapters = _adapted(model)
        assert not torch.equal(module(*args, **kwargs), plain)
        for adapter in adapters.values():
            adapter.disabled = True
        assert torch.equal(module(*args, **kwargs), plain)
        for adapter in adapters.values():
            adapter.disabled = False
            adapter.spp_beta.zero_()
        assert torch.equal(module(*args, **kwargs), plain)


@pytest.mark.parametrize("mode", ["input", "alpha"])
def test_dropout_is_drawn_in_training_only(mode: str) -> None:
    model = moe_model("mixtral")
    args, kwargs = _inputs(model)
    module = _experts(model)
    _adapted(model, dropout=0.5, dropout_mode=mode)
    with torch.no_grad():
        assert torch.equal(module(*args, **kwargs), module(*args, **kwargs))
        module.train()
        assert not torch.equal(module(*args, **kwargs), module(*args, **kwargs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = moe_model("qwen3_moe")
    args, _ = _inputs(model)
    adapters, module = _adapted(model), _experts(model)
    parameters = [p for adapter in adapters.values() for p in adapter.adapter_parameters()]
    x = args[0].clone().requires_grad_()
    module(x, *args[1:]).sum().backward()
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    torch.utils.checkpoint.checkpoint(module, x, *args[1:], use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))


def test_copies_pickles_and_dtypes() -> None:
    model = moe_model("mixtral")
    args, _ = _inputs(model)
    adapters, module = _adapted(model), _experts(model)
    with torch.no_grad():
        expected = module(*args)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(*args), expected)
            adapters_of(other)["down_proj"].spp_beta.zero_()  # its own, not the original's
            assert not torch.equal(other(*args), expected)
            assert torch.equal(module(*args), expected)
    alpha = adapters["down_proj"].spp_alpha.detach().clone()
    module.to(torch.bfloat16)
    assert module.gate_up_proj.dtype == torch.bfloat16
    assert torch.equal(adapters["down_proj"].spp_alpha, alpha)  # float32 still, digit for digit
    module.double()
    assert adapters["down_proj"].spp_alpha.dtype == torch.float64
    assert torch.equal(
        adapters["down_proj"].effective_weight(),
        torch.stack(
            [
                w * (1 + (2.0 * b) * a.repeat_interleave(torch.tensor([10, 11, 11]), 0))
                for w, a, b in zip(
                    module.down_proj, adapters["down_proj"].spp_alpha, adapters["down_proj"].spp_beta, strict=True
                )
            ]
        ),
    )


def test_bad_weights_are_refused() -> None:
    model = moe_model("mixtral")
    projection = next(p for p in find_projections(model) if p.fused)
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: r = 99"):
        SPPExperts(projection, SPPConfig(99))
    with torch.no_grad():
        projection.weight[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"experts\.gate_up_proj holds 1 NaN"):
        SPPExperts(projection, SPPConfig(4))
    projection.module.gate_up_proj = nn.Parameter(torch.zeros(4, 48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="int8"):
        SPPExperts(projection, SPPConfig(4))
