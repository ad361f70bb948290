"""Adapters on weights that accelerate offloads to memory or a disk, dispatched before or after wrapping."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spp
from benchmarks.harness import saved_bytes
from spp.errors import ConfigError, NonFiniteError, SPPWarning
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import moe_model, projections, tiny_llama
from tests.helpers.offloading import MAP, WAYS, by_map, on_meta, to_disk, to_memory
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.integrations.helpers import IDS, Q0, logits, pruned

U1 = "model.layers.1.mlp.up_proj"
both_orders = pytest.mark.parametrize("first", ["dispatched", "wrapped"])
every_way = pytest.mark.parametrize("way", WAYS)


def prepared(way: Any, first: str, folder: Path, model: Any = None, **options: Any) -> Any:
    """A model that is wrapped and offloaded, in either order."""
    model = pruned() if model is None else model
    if first == "dispatched":
        return spp.wrap(way(model, folder), 4, seed=0, **options)
    return way(spp.wrap(model, 4, seed=0, **options), folder)


def in_memory(model: Any = None, **options: Any) -> Any:
    """The same without offloading; it keeps no W_eff either, whose product may be rounded otherwise."""
    model = spp.wrap(pruned() if model is None else model, 4, seed=0, **options)
    for layer in adapter_layers(model).values():
        layer.cache_effective = False
    return model


def train(model: Any, parameters: list[nn.Parameter] | None = None, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    """Losses and the gradients of the last step."""
    parameters = parameters or spp.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=3.0)
    model.train()
    losses, grads = [], []
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
    model.eval()
    return losses, grads


def assert_trains_alike(model: Any, reference: Any) -> None:
    """The same losses, gradients and logits, bit for bit."""
    (losses, grads), (expected_losses, expected) = train(model), train(reference)
    assert losses == expected_losses and losses[-1] != losses[0]
    assert len(grads) == len(expected)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(logits(model), logits(reference))


@pytest.mark.sampled(2)
@both_orders
@every_way
def test_it_trains_as_the_model_in_memory_does(way: str, first: str, tmp_path: Path) -> None:
    model, reference = prepared(WAYS[way], first, tmp_path), in_memory()
    away = on_meta(model)
    assert (f"{U1}.weight" in away) and not any("spp_" in name for name in away)
    assert_trains_alike(model, reference)
    assert on_meta(model) == away
    with spp.disabled(model):
        assert_same_bits(logits(model), logits(pruned()))
    tokens = reference.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), tokens)
    assert all(layer._cached is None for layer in adapter_layers(model).values() if layer.weight.is_meta)
    assert "base_masks" in (spp.save_adapter(model, tmp_path / "adapter") / "adapter_config.json").read_text()
    again = spp.load_adapter(WAYS[way](pruned(), tmp_path), tmp_path / "adapter")
    assert_same_bits(logits(again), logits(reference))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        expected = spp.save_adapter(reference, tmp_path / "expected", overwrite=True)
        assert (tmp_path / "adapter" / name).read_bytes() == (expected / name).read_bytes()
    spp.unwrap(model)
    assert on_meta(model) == away and type(model.get_submodule(U1)) is nn.Linear
    assert_same_bits(logits(model), logits(pruned()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [{}, {"dropout": 0.2}, {"dropout": 0.2, "dropout_mode": "alpha"}], ids=str)
def test_dtypes_and_dropout(dtype: torch.dtype, dropout: dict[str, Any], tmp_path: Path) -> None:
    model = prepared(to_disk, "wrapped", tmp_path, pruned(dtype), **dropout)
    assert_trains_alike(model, in_memory(pruned(dtype), **dropout))
    assert adapter_layers(model)[Q0].spp_alpha.dtype == torch.float32


@every_way
def test_an_optimizer_made_before_dispatching_goes_on_training(way: str, tmp_path: Path) -> None:
    model = spp.wrap(pruned(), 4, seed=0)
    parameters = spp.adapter_parameters(model)
    WAYS[way](model, tmp_path)
    assert all(now is before for now, before in zip(spp.adapter_parameters(model), parameters, strict=True))
    assert list(adapter_layers(model)[U1]._parameters) == ["weight", "bias", "spp_alpha", "spp_beta"]
    losses, _ = train(model, parameters)
    assert losses == train(spp.wrap(pruned(), 4, seed=0))[0]


@both_orders
def test_backward_loads_the_weights_again_instead_of_keeping_them(first: str, tmp_path: Path) -> None:
    model, reference = prepared(to_disk, first, tmp_path), in_memory()

    def kept(model: Any) -> int:
        model.train()
        return saved_bytes(lambda: model(input_ids=IDS, labels=IDS).loss, model)

    others = [p for path, p in pruned().named_parameters() if "_proj" not in path]  # loaded, and kept as torch does
    assert kept(model) <= kept(reference) + sum(p.nbytes for p in others)


@pytest.mark.sampled(1)
@both_orders
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_leaves_nothing_loaded(first: str, reentrant: bool, tmp_path: Path) -> None:
    models = prepared(to_disk, first, tmp_path), in_memory()
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_trains_alike(*models)
    train(models[0], steps=1)
    held = {name for name in on_meta(models[0]) if "_proj" in name}
    assert held == {f"{path}.weight" for path in projections(models[0])}


@pytest.mark.sampled(1)
@both_orders
def test_a_merge_writes_to_what_lies_in_memory(first: str, tmp_path: Path) -> None:
    model, reference = prepared(to_memory, first, tmp_path), in_memory()
    train(model)
    train(reference)
    report, expected = spp.merge(model), spp.merge(reference)
    assert report == expected and report.sparsity_report.pattern == "2:4"
    assert f"{U1}.weight" in on_meta(model)
    assert_same_bits(logits(model), logits(reference))
    assert spp.sparsity(model) == spp.sparsity(reference)
    model.hf_device_map = {"model": "cpu", "lm_head": 0}  # what tells transformers to look behind the hooks
    spp.save_model(model, tmp_path / "merged")
    spp.save_model(reference, tmp_path / "expected")
    assert (tmp_path / "merged/sparsity.json").read_bytes() == (tmp_path / "expected/sparsity.json").read_bytes()
    spp.verify(pruned(), tmp_path / "merged")
    spp.verify(pruned(), model)


@pytest.mark.sampled(2)
@both_orders
@pytest.mark.parametrize("way", ["disk", "map"])
def test_a_merge_does_not_write_to_a_disk(way: str, first: str, tmp_path: Path) -> None:
    model = prepared(WAYS[way], first, tmp_path)
    train(model)
    before = logits(model)
    with pytest.raises(ConfigError, match=r"is offloaded to a disk .* spp\.merge_checkpoint\(base, path, out\)"):
        spp.merge(model)
    assert_same_bits(logits(model), before)
    model = prepared(to_memory, first, tmp_path)
    with pytest.raises(ConfigError, match=r"embed_tokens is offloaded by accelerate, .* in its own dtype"):
        spp.merge(model, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="none of the merged weights is quantized"):
        spp.merge(model, requantize=True)


@pytest.mark.slow
def test_a_model_that_transformers_dispatched(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.training.helpers import losses, trainer

    spp.save_model(pruned(), tmp_path / "base")
    options: dict[str, Any] = {"device_map": MAP, "offload_folder": str(tmp_path / "offloaded")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert f"{U1}.weight" in on_meta(model)
    made = [trainer(tmp_path / str(i), in_memory(m)) for i, m in enumerate((model, plain))]
    for one in made:
        one.train()
    assert losses(made[0]) == losses(made[1]) and losses(made[0])[-1] < losses(made[0])[0]
    assert made[0].state.log_history[0]["sparsity"] == 0.5
    assert_same_bits(logits(model), logits(plain))
    adapter = spp.save_adapter(model, tmp_path / "adapter")
    spp.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    spp.merge(plain)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_bits(logits(merged), logits(plain))


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize(("architecture", "first"), [("mixtral", "wrapped"), ("gpt_oss", "dispatched")])
def test_fused_experts(architecture: str, first: str, tmp_path: Path) -> None:
    def make() -> Any:
        return spp.prune(model := moe_model(architecture), "magnitude", "2:4") and model

    model, reference = prepared(to_disk, first, tmp_path, make()), in_memory(make())
    paths = [path for path in adapter_layers(model) if path.endswith("experts.gate_up_proj")]
    away = on_meta(model)
    assert paths and set(paths) <= away and not any("spp_" in name for name in away)
    assert_trains_alike(model, reference)
    assert on_meta(model) == away
    model.gradient_checkpointing_enable()
    reference.gradient_checkpointing_enable()
    assert_trains_alike(model, reference)
    assert on_meta(model) >= set(paths)
    spp.unwrap(model)
    assert_same_bits(logits(model), logits(make()))
    model = prepared(to_memory, first, tmp_path, make())
    train(model)
    reference = in_memory(make())
    train(reference)
    assert spp.merge(model) == spp.merge(reference)
    assert_same_bits(logits(model), logits(reference))


def test_experts_are_loaded_once_a_backward(tmp_path: Path) -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    prepared(to_disk, "dispatched", tmp_path, model)
    path = next(path for path in adapter_layers(model) if path.endswith("experts.down_proj"))
    hook = model.get_submodule(path.rpartition(".")[0])._hf_hook
    hook.weights_map = counted = Counting(hook.weights_map)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    assert counted.loads["down_proj"] == 1
    loss.backward()
    assert counted.loads["down_proj"] == 2


class Counting(dict):
    """A weights map that counts what is taken from it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.loads = inner, dict.fromkeys(("gate_up_proj", "down_proj"), 0)

    def __getitem__(self, name: str) -> Tensor:
        self.loads[name] += 1
        return self.inner[name]


@both_orders
def test_conv1d_and_biases(first: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> Any:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=96, n_positions=64)).eval()
        spp.prune(model, "magnitude", "2:4")
        return model

    assert_trains_alike(prepared(to_disk, first, tmp_path, make()), in_memory(make()))


@both_orders
def test_hooks_that_are_removed_while_the_model_is_wrapped(first: str, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model = prepared(to_memory, first, tmp_path)
    train(model)
    trained = logits(model)
    remove_hook_from_submodules(model)
    assert not on_meta(model) and adapter_layers(model)[U1].cache_effective
    assert_matches(logits(model), trained.double(), torch.float32)
    to_disk(model, tmp_path)  # and another way
    assert_same_bits(logits(model), trained)
    remove_hook_from_submodules(model)
    spp.merge(model)
    assert_matches(logits(model), trained.double(), torch.float32)
    assert not hasattr(model.get_submodule(U1), "_hf_hook")


@pytest.mark.slow
def test_packed_weights_stay_in_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj is offloaded by accelerate, and what is packed stays in memory"):
        spp.wrap(to_disk(pruned(), tmp_path), 4, packed=True)
    for way in (to_memory, to_disk):
        model = way(spp.wrap(pruned(), 4, seed=0, packed=True), tmp_path)
        assert_trains_alike(model, in_memory(packed=True))
        twin, trained = copy.deepcopy(model), logits(model)
        spp.merge(twin)
        assert not twin.get_submodule(U1).weight.is_meta
        assert_matches(logits(twin), trained.double(), torch.float32)
        spp.unwrap(model)
        assert_same_bits(logits(model), logits(pruned()))
    model = to_disk(spp.pack(pruned()), tmp_path)
    assert_same_bits(logits(model), logits(spp.pack(pruned())))
    assert_same_bits(logits(spp.unpack(model)), logits(pruned()))


@both_orders
def test_a_hook_for_all_of_a_block_is_refused(first: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    def offload(model: Any, folder: Path) -> Any:
        return cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaMLP"])

    with pytest.raises(ConfigError, match=r"layers\.0\.mlp is offloaded by accelerate as a whole"):
        spp.adapter_parameters(prepared(offload, first, tmp_path))


def test_what_is_wrong_with_an_offloaded_weight_is_found(tmp_path: Path) -> None:
    model = pruned()
    with torch.no_grad():
        model.get_submodule(U1).weight[3, 2] = float("nan")
    to_disk(model, tmp_path)
    with pytest.raises(NonFiniteError, match=rf"{U1}\.weight holds 1 NaN"):
        spp.wrap(model, 4)
    assert type(model.get_submodule(Q0)) is nn.Linear and hasattr(model.get_submodule(Q0), "_hf_hook")
    with pytest.warns(SPPWarning, match="all 14 target layers are dense"):
        spp.wrap(to_memory(tiny_llama(), tmp_path), 4)


def test_hooks_that_only_align_devices_go_with_the_layer(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Noting(AlignDevicesHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().pre_forward(module, *args, **kwargs)

    model, hook = pruned(), Noting("cpu")
    linear = add_hook_to_module(model.get_submodule(Q0), hook)
    spp.wrap(model, 4, seed=0)
    assert_trains_alike(model, in_memory())
    assert hook.calls == 4 and not hasattr(linear, "_hf_hook")
    spp.unwrap(model)
    logits(model)
    assert hook.calls == 5 and linear._hf_hook is hook


def test_a_hook_that_takes_the_place_of_another(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = prepared(to_memory, "wrapped", tmp_path)
    train(model)
    trained, layer = logits(model), adapter_layers(model)[U1]
    held = {"weight": layer.held().dense(), "spp_alpha": layer.spp_alpha.data, "spp_beta": layer.spp_beta.data}
    add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, weights_map=held))
    assert not layer.spp_alpha.is_meta and layer.spp_alpha.requires_grad
    assert_same_bits(logits(model), trained)
    assert len(train(model)[1]) == 28


@pytest.mark.slow
def test_a_model_that_was_wrapped_before_it_was_loaded(tmp_path: Path) -> None:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import LlamaForCausalLM

    spp.save_model(pruned(), tmp_path / "base")
    reference = in_memory()
    train(reference)
    adapter = spp.save_adapter(reference, tmp_path / "adapter")
    with init_empty_weights():
        model = spp.wrap(LlamaForCausalLM(pruned().config), 4).eval()
    spp.load_adapter(model, adapter)
    load_checkpoint_and_dispatch(model, tmp_path / "base", device_map=MAP, offload_folder=tmp_path / "offloaded")
    assert on_meta(model) and not any("spp_" in name for name in on_meta(model))
    assert_same_bits(logits(model), logits(reference))


def test_copies(tmp_path: Path) -> None:
    model = prepared(by_map, "wrapped", tmp_path)
    twin = copy.deepcopy(model)
    train(model)
    assert_trains_alike(twin, in_memory())
    assert_same_bits(logits(twin), logits(model))
