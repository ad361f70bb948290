"""wrap, unwrap, disabled, and what a wrapped model can still do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spp
from spp import SPPConfig
from spp.errors import ConfigError, NonFiniteError, SPPWarning, TargetError, WrapError
from spp.evaluation import perplexity
from spp.wrapping.wrap import adapter_config, adapter_layers
from tests.helpers.made import Made
from tests.helpers.models import projections, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

IDS = torch.arange(3, 35).view(2, 16)


def pruned() -> nn.Module:
    return prune_nm_(tiny_llama())


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move the adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = {n: id(m) for n, m in model.named_modules()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"flags": flags, "modules": modules, "values": values}


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after["flags"] == before["flags"] and after["modules"] == before["modules"]
    for name, value in after["values"].items():  # type: ignore[union-attr,attr-defined]
        assert_same_bits(value, before["values"][name], name)  # type: ignore[index]


def test_wrap_keeps_the_object_the_class_and_the_numbers() -> None:
    model = pruned()
    kind, before, weights = type(model), model(IDS).logits, {n: m.weight for n, m in projections(model).items()}
    assert spp.wrap(model, r=4, seed=0) is model
    assert type(model) is kind
    assert_same_bits(model(IDS).logits, before)
    assert all(m.weight is weights[n] for n, m in projections(model).items())  # no copy of a base weight
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 28 and all(n.endswith(("spp_alpha", "spp_beta")) for n in trained)


def test_unwrap_gives_the_pruned_model_back() -> None:
    model = pruned()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    spp.wrap(model, r=4)
    stir(model)
    assert spp.unwrap(model) is model
    assert_untouched(model, before)
    assert not any(module._forward_hooks for module in model.modules())
    spp.wrap(model, r=2)  # and it can be wrapped again
    spp.unwrap(model)
    assert "save_pretrained" not in vars(model)


def test_disabled_computes_as_the_pruned_model_and_nests() -> None:
    model = pruned()
    before = model(IDS).logits
    stir(spp.wrap(model, r=4))
    wrapped = model(IDS).logits
    assert not torch.equal(wrapped, before)
    with spp.disabled(model):
        assert_same_bits(model(IDS).logits, before)
        with spp.disabled(model):
            pass
        assert_same_bits(model(IDS).logits, before)
    assert_same_bits(model(IDS).logits, wrapped)
    with pytest.raises(ZeroDivisionError), spp.disabled(model):
        raise ZeroDivisionError
    assert_same_bits(model(IDS).logits, wrapped)


def test_seeded_initialisation_depends_on_the_path_only() -> None:
    first, second = spp.wrap(pruned(), r=4, seed=3), None
    torch.manual_seed(99)
    second = spp.wrap(pruned(), SPPConfig(r=4, seed=3, target_modules=["up_proj"]))
    for path, layer in adapter_layers(second).items():
        assert_same_bits(layer.spp_alpha, adapter_layers(first)[path].spp_alpha)
    alphas = [layer.spp_alpha for layer in adapter_layers(first).values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(alphas) for b in alphas[:i] if a.shape == b.shape)


def test_without_a_seed_torchs_generator_decides() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(spp.wrap(pruned(), r=4))
    for a, b in zip(*(spp.adapter_parameters(m) for m in models), strict=True):
        assert_same_bits(a, b)


def test_adapter_parameters_come_in_module_order_alpha_then_beta() -> None:
    model = spp.wrap(pruned(), r=4)
    expected = [p for n, p in model.named_parameters() if ".spp_" in n]
    assert all(a is b for a, b in zip(spp.adapter_parameters(model), expected, strict=True))
    assert spp.adapter_parameters(model)[0].shape == (4, 64)
    assert next(iter(spp.adapter_state_dict(model))) == "model.layers.0.self_attn.q_proj.spp_alpha"


def test_rank_pattern_and_resolved_config() -> None:
    model = spp.wrap(pruned(), r=4, rank_pattern={"up_proj": 8})
    ranks = {path.rsplit(".", 1)[1]: layer.r for path, layer in adapter_layers(model).items()}
    assert ranks["up_proj"] == 8 and ranks["q_proj"] == 4
    assert adapter_config(model).target_modules == tuple(sorted(ranks))
    part = spp.wrap(pruned(), r=4, target_modules=r".*layers\.1\.mlp\..*")
    assert adapter_config(part).target_modules == tuple(adapter_layers(part))


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = spp.wrap(pruned(), r=4)
    spp.print_trainable_parameters(model)
    count = sum(p.numel() for p in spp.adapter_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    assert (
        capsys.readouterr().out
        == f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    )


def test_training_moves_only_the_adapter_and_lowers_the_loss() -> None:
    model = spp.wrap(pruned(), r=4, seed=0).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if ".spp_" in name:
            assert not torch.equal(parameter, before[name])
        else:
            assert_same_bits(parameter, before[name], name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_every_layer(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = stir(spp.wrap(pruned(), r=4, seed=0)).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in spp.adapter_parameters(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert recomputed is not None
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpoints_of_a_models_own_making_get_gradients() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)
            self.layer = nn.Linear(8, 8)
            self.gradient_checkpointing = True

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.layer, self.embedding(ids), use_reentrant=True)

    model = Own()
    model.layer.weight.data[:, ::2] = 0
    spp.wrap(model, r=2, target_modules=["layer"]).train()
    model(torch.arange(8)).sum().backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    assert model.embedding.weight.grad is None
    with torch.no_grad():
        assert not model.eval()(torch.arange(8)).requires_grad


def test_copies_pickles_and_state_dicts() -> None:
    model = stir(spp.wrap(pruned(), r=4))
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(other(IDS).logits, expected)
        assert_same_bits(spp.unwrap(other)(IDS).logits, _pruned_logits(model))
        with pytest.raises(WrapError):
            spp.adapter_parameters(other)
    fresh = spp.wrap(pruned(), r=4)
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(fresh(IDS).logits, expected)
    assert_same_bits(model(IDS).logits, expected)


def _pruned_logits(model: nn.Module) -> torch.Tensor:
    with spp.disabled(model):
        return model(IDS).logits


def test_dtype_moves_and_generation() -> None:
    model = stir(spp.wrap(pruned(), r=4))
    text = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert text.shape == (1, 22)
    values = [p.detach().clone() for p in spp.adapter_parameters(model)]
    model.to(torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    for parameter, value in zip(spp.adapter_parameters(model), values, strict=True):
        assert_same_bits(parameter, value)
    spp.merge(model)
    assert model.generate(IDS[:1], max_new_tokens=6, do_sample=False).shape == (1, 22)


@pytest.mark.slow
def test_compiled_model_matches_eager() -> None:
    torch._dynamo.reset()
    model = stir(spp.wrap(prune_nm_(tiny_llama(num_hidden_layers=1)), r=4)).train()  # tracing is what takes time
    model(IDS, labels=IDS).loss.backward()
    expected = [p.grad for p in spp.adapter_parameters(model)]
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(IDS, labels=IDS).loss.backward()
    for parameter, grad in zip(spp.adapter_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_meta_models_stay_on_meta() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    spp.wrap(model, r=4)
    assert all(p.is_meta for p in model.parameters())


def test_wrapping_twice_is_an_error_that_says_so() -> None:
    model = spp.wrap(pruned(), r=4)
    before = snapshot(model)
    with pytest.raises(WrapError, match="wrapped already"):
        spp.wrap(model, r=4)
    assert_untouched(model, before)


def test_unwrapped_models_are_refused_by_name() -> None:
    for function in (spp.unwrap, spp.adapter_parameters, spp.adapter_state_dict, spp.merge):
        with pytest.raises(WrapError, match="not wrapped"):
            function(pruned())
    with pytest.raises(WrapError, match="not wrapped"), spp.disabled(pruned()):
        pass
    model = spp.wrap(pruned(), r=4)
    with pytest.raises(WrapError, match=r"the object that spp\.wrap was given"):
        spp.unwrap(model.model)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"r": 0}, ConfigError, "model.layers.0.self_attn.q_proj: r is 0"),
        ({"r": -3, "target_modules": ["up_proj"]}, ConfigError, "model.layers.0.mlp.up_proj: r is -3"),
        ({"r": 0, "scaling": -1.0}, ConfigError, "scaling"),
        ({"r": 33}, ConfigError, "model.layers.0.self_attn.k_proj: r = 33"),
        ({"scaling": -1.0}, ConfigError, "scaling"),
        ({"dropout": 1.5}, ConfigError, "dropout"),
        ({"target_modules": ["nothing"]}, TargetError, "q_proj"),
        ({"rule": "lora"}, ConfigError, "no rule"),
        ({"rank_pattern": {"q_prj": 4}}, ConfigError, "q_prj matches none"),
        ({"rank_pattern": {3: 4}}, ConfigError, "rank_pattern"),
        ({"rank_pattern": [1]}, ConfigError, "rank_pattern"),
        ({"exclude_modules": ["nope", "q_proj"]}, TargetError, "called nope"),
        ({"exclude_modules": ["*foo"]}, TargetError, "foo"),
        ({"r": SPPConfig(), "scaling": 3.0}, ConfigError, "scaling; put them into the config"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options: dict[str, object], error: type[Exception], named: str) -> None:
    model = pruned()
    before = snapshot(model)
    with pytest.raises(error, match=named) as caught:
        spp.wrap(model, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_base_weights_are_named(value: float) -> None:
    model = pruned()
    model.model.layers[1].mlp.down_proj.weight.data[5, 6] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        spp.wrap(model, r=4)
    assert_untouched(model, before)


def test_a_model_that_is_itself_a_linear() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(TargetError, match=r"spp\.SPPLinear"):
        spp.wrap(linear, r=2, target_modules="all-linear")
    assert linear.weight.requires_grad


def test_attention_modules_that_never_call_their_projection_are_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TargetError, match="no linear modules"):
        spp.wrap(attention, r=2)


def test_a_compiled_model_stands_for_its_own() -> None:
    model = pruned()
    compiled = torch.compile(model, backend="eager")
    assert spp.wrap(compiled, r=4, seed=0) is compiled
    expected = spp.adapter_state_dict(spp.wrap(pruned(), r=4, seed=0))
    assert spp.adapter_state_dict(compiled).keys() == expected.keys() == spp.adapter_state_dict(model).keys()
    for key, tensor in expected.items():
        assert_same_bits(spp.adapter_state_dict(compiled)[key], tensor)
    stir(compiled)
    spp.merge(compiled)
    assert "save_pretrained" not in vars(model) and not hasattr(model, "_spp_state")


def test_a_model_without_linears() -> None:
    with pytest.raises(TargetError, match="no linear modules"):
        spp.wrap(nn.Sequential(nn.Embedding(4, 4)), r=2)


def test_dense_layers_warn_once() -> None:
    with pytest.warns(SPPWarning, match="all 14 target layers are dense") as caught:
        spp.wrap(tiny_llama(), r=4)
    assert len(caught) == 1
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    with pytest.warns(SPPWarning, match="1 of 14 target layers are dense") as caught:
        spp.wrap(model, r=4)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spp.wrap(pruned(), r=4)


def test_save_pretrained_of_a_wrapped_model_names_the_ways_out(tmp_path: object) -> None:
    model = spp.wrap(pruned(), r=4)
    with pytest.raises(WrapError, match=r"save_adapter.*spp\.merge"):
        model.save_pretrained(tmp_path)
    spp.unwrap(model)
    model.save_pretrained(tmp_path)


def test_layers_of_different_dtypes_keep_theirs() -> None:
    model = pruned()
    model.model.layers[0].to(torch.bfloat16)  # type: ignore[union-attr, index, operator]
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    spp.wrap(model, 4, seed=0)
    assert all(p.dtype == torch.float32 for p in spp.adapter_parameters(model))
    stir(model)
    spp.merge(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert spp.sparsity(model).pattern == "2:4"


def test_wrapping_copies_no_base_weight() -> None:
    model = pruned()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    spp.wrap(model, 4)
    after = {
        name.replace(".base_layer", ""): p.data_ptr() for name, p in model.named_parameters() if "spp_" not in name
    }
    assert after == before
    spp.unwrap(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_a_linear_registered_twice_is_saved_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"first": nn.Linear(8, 8)})
    model["second"] = model["first"]
    with torch.no_grad():
        model["first"].weight[:, ::2] = 0.0
    spp.wrap(model, 2, target_modules=["first"], seed=0)
    assert model["second"] is model["first"]
    assert list(spp.adapter_state_dict(model)) == ["first.spp_alpha", "first.spp_beta"]
    directory = spp.save_adapter(model, tmp_path / "adapter")
    keys = load_file(directory / "adapter_model.safetensors")
    assert sorted(keys) == ["base_model.model.first.spp_alpha", "base_model.model.first.spp_beta"]


def test_a_parametrized_linear_is_refused_with_the_way_out() -> None:
    model = pruned()
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("model.layers.1.mlp.up_proj"))
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.up_proj has a parametrization on weight.*remove_param"):
        spp.wrap(model, 4)
    assert not adapter_layers(model)


def test_layers_of_different_dtypes_keep_them(tmp_path: Path) -> None:
    model = pruned()
    for path, module in projections(model).items():
        if "mlp" in path:
            module.to(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    before = copy.deepcopy(model)
    spp.wrap(model, 4, seed=0)
    assert {p.dtype for p in spp.adapter_parameters(model)} == {torch.float32}
    optimizer = torch.optim.SGD(spp.adapter_parameters(model), lr=1.0)
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    spp.save_adapter(model, tmp_path / "adapter")
    again = spp.load_adapter(copy.deepcopy(before), tmp_path / "adapter")
    for merged in (model, again):
        spp.merge(merged)
        assert {name: p.dtype for name, p in merged.named_parameters()} == dtypes
        assert spp.verify(before, merged).pattern == "2:4"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_wrapping_makes_nothing_of_the_size_of_a_weight() -> None:
    model = pruned()
    smallest = min(module.weight.numel() for module in projections(model).values())
    with Made() as made:
        spp.wrap(model, 4, seed=0)
    assert made.shapes and made.most < smallest


@pytest.mark.parametrize(
    "call",
    [
        spp.wrap,
        spp.unwrap,
        spp.merge,
        spp.adapter_parameters,
        spp.pack,
        lambda model: spp.prune(model, "magnitude", "2:4"),
        lambda model: spp.load_adapter(model, "adapter"),
        lambda model: perplexity(model, None, "text"),
        lambda model: spp.save_model(model, "out"),
    ],
)
def test_a_path_in_the_place_of_a_model(call: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spp.evaluation.windows.tokenize", lambda tokenizer, text: torch.arange(9))
    with pytest.raises(ConfigError, match=r"found a str; load it first: .*from_pretrained\('pruned'\)"):
        call("pruned")
    with pytest.raises(ConfigError, match=r"a torch\.nn\.Module, found a NoneType"):
        call(None)
