"""A whole model on packed weights: wrap, train, save, load, merge, pack and unpack, without the dense model."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spp
from spp.errors import ConfigError, SPPWarning, TargetError, WrapError
from spp.layers.host import PackedLinear
from spp.layers.linear import SPPLinear
from spp.weights import PackedWeight
from tests.helpers.models import assert_same_model, projections, prune_nm_, tiny_llama, train_steps
from tests.helpers.tolerances import assert_same_bits


def pruned(**overrides: object) -> Any:
    """A tiny Llama at 2:4, without −0.0."""
    model = prune_nm_(tiny_llama(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)
    return model


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def train(model: Any, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-2)
    torch.manual_seed(7)
    losses = train_steps(model, optimizer, steps, input_ids=ids(), labels=ids())
    model.eval()
    return losses


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.2}, {"dropout": 0.2, "dropout_mode": "alpha"}],
    ids=["no dropout", "input dropout", "alpha dropout"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_is_bit_for_bit_that_of_the_dense_model(options: dict[str, Any], checkpointing: bool) -> None:
    results = []
    for packed in (False, True):
        model = spp.wrap(pruned(), r=4, seed=1, packed=packed, **options)
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = train(model)
        assert losses[-1] < losses[0]
        results.append((losses, spp.adapter_state_dict(model)))
    assert results[0][0] == results[1][0]
    for key, tensor in results[0][1].items():
        assert_same_bits(results[1][1][key], tensor, key)


def test_unwrap_gives_the_pruned_model_back() -> None:
    model, before = pruned(), pruned()
    spp.wrap(model, r=4, packed=True)
    assert all(layer.packed_layout is not None for layer in model.modules() if isinstance(layer, SPPLinear))
    names = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    assert names == []
    train(model)
    with spp.disabled(model), torch.no_grad():
        assert_same_bits(model(ids()).logits, before(ids()).logits)
    spp.unwrap(model)
    assert_same_model(model, before)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}, {"check": False}],
    ids=str,
)
def test_merge_is_bit_for_bit_that_of_the_dense_model(options: dict[str, Any]) -> None:
    merged, reports = [], []
    for packed in (False, True):
        model = spp.wrap(pruned(), r=4, seed=1, packed=packed)
        train(model)
        reports.append(spp.merge(model, **options))
        merged.append(model)
    assert_same_model(merged[1], merged[0])
    assert reports[1].to_dict() == reports[0].to_dict()
    assert merged[1]._spp_base == merged[0]._spp_base


def test_verify_and_sparsity() -> None:
    model = spp.wrap(pruned(), r=4, packed=True)
    assert spp.sparsity(model).to_dict() == spp.sparsity(pruned()).to_dict()
    assert spp.verify(pruned(), model).pattern == "2:4"
    packed = spp.pack(pruned())
    assert spp.verify(packed, model).pattern == "2:4"
    other = pruned()
    other.model.layers[0].mlp.up_proj.weight.data[0] = 1
    with pytest.raises(spp.SPPError, match=r"up_proj.weight: 32 became non-zero"):
        spp.verify(packed, other)


def test_a_packed_head_outside_the_projections_is_compared_too() -> None:
    model, other = pruned(), pruned()
    for m in (model, other):
        m.lm_head.weight.data[:, ::2] = 0
    packed = spp.pack(model, target_modules=["lm_head"])
    assert spp.verify(packed, other).pattern == "mixed" or spp.verify(packed, other).sparsity == 0.5
    other.lm_head.weight.data[:, 0] = 1
    with pytest.raises(spp.SPPError, match=r"lm_head.weight"):
        spp.verify(packed, other)


def test_save_and_load_adapters(tmp_path: Path) -> None:
    model = spp.wrap(pruned(), r=4, packed=True)
    train(model)
    spp.save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        expected = model(ids()).logits
    assert spp.SPPConfig(packed=True).packed
    for base in (pruned(), spp.pack(pruned()), spp.wrap(pruned(), r=4), spp.wrap(pruned(), r=4, packed=True)):
        loaded = spp.load_adapter(base, tmp_path / "a")
        with torch.no_grad():
            assert_same_bits(loaded(ids()).logits, expected)
    fresh = spp.load_adapter(pruned(), tmp_path / "a")
    assert fresh._spp_state.config.packed
    assert fresh.model.layers[0].mlp.up_proj.packed_layout is not None


def test_an_adapter_of_a_dense_model_on_a_packed_one(tmp_path: Path) -> None:
    model = spp.wrap(pruned(), r=4)
    train(model)
    spp.save_adapter(model, tmp_path / "a")
    loaded = spp.load_adapter(spp.pack(pruned()), tmp_path / "a")
    assert loaded.model.layers[0].mlp.up_proj.packed_layout is not None
    wrong = pruned()
    wrong.model.layers[0].mlp.up_proj.weight.data[0] = 1
    with pytest.raises(spp.SPPError, match="up_proj"):
        spp.load_adapter(spp.pack(wrong), tmp_path / "a")


def test_save_model_after_a_merge(tmp_path: Path) -> None:
    base = pruned()
    spp.save_model(base, tmp_path / "base")
    model = spp.wrap(base, r=4, packed=True)
    train(model)
    spp.merge(model)
    spp.save_model(model, tmp_path / "merged")
    spp.verify(tmp_path / "merged")
    spp.verify(tmp_path / "base", tmp_path / "merged")


def test_generate() -> None:
    dense, packed = (spp.wrap(pruned(), r=4, seed=1, packed=p) for p in (False, True))
    for model in (dense, packed):
        train(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = dense.generate(ids(), **options)
    assert torch.equal(packed.generate(ids(), **options), expected)
    assert all(m._cached is None for m in packed.modules() if isinstance(m, SPPLinear))
    spp.merge(packed)
    assert torch.equal(packed.generate(ids(), **options), expected)
    alone = spp.pack(pruned())
    assert torch.equal(alone.generate(ids(), **options), pruned().generate(ids(), **options))


def test_state_dict_deepcopy_and_conversion() -> None:
    model = spp.wrap(pruned(), r=4, packed=True)
    train(model)
    state = model.state_dict()
    prefix = "model.layers.0.mlp.up_proj"
    assert {k for k in state if k.startswith(prefix)} == {
        f"{prefix}.{n}" for n in ("weight_values", "weight_codes", "spp_alpha", "spp_beta")
    }
    other = spp.wrap(pruned(), r=4, packed=True)
    other.load_state_dict(state)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids()).logits
        assert_same_bits(other(ids()).logits, expected)
        assert_same_bits(twin(ids()).logits, expected)
    half = twin.to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.spp_alpha.dtype == torch.float32
    assert torch.isfinite(half(ids()).logits).all()
    spp.unwrap(twin)
    assert twin.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_pack_and_unpack() -> None:
    model, before = pruned(), pruned()
    assert spp.pack(model) is model
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14
    with torch.no_grad():
        assert_same_bits(model(ids()).logits, before(ids()).logits)
    assert model.get_memory_footprint() < 0.7 * before.get_memory_footprint()
    spp.pack(model)  # nothing left to pack
    assert [m for m in model.modules() if isinstance(m, PackedLinear)] == layers
    assert spp.unpack(model) is model
    assert_same_model(model, before)
    with pytest.raises(ConfigError, match="nothing in the model is packed"):
        spp.unpack(model)


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_wrap_a_packed_model_and_back() -> None:
    model = spp.pack(pruned())
    with pytest.raises(ConfigError, match=r"q_proj is packed: pass packed=True, or call spp.unpack"):
        spp.wrap(model, r=4)
    spp.wrap(model, r=4, packed=True)
    train(model)
    with pytest.raises(WrapError, match="wrapped"):
        spp.pack(model)
    with pytest.raises(WrapError, match="wrapped"):
        spp.unpack(model)
    spp.unwrap(model)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14
    assert_same_model(spp.unpack(model), pruned())
    spp.merge(spp.wrap(spp.pack(model), r=4, packed=True))
    assert_same_model(model, pruned())


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_saving_is_refused_until_nothing_is_packed(tmp_path: Path) -> None:
    model = spp.pack(pruned(), target_modules=["up_proj", "down_proj"])
    with pytest.raises(WrapError, match=r"is packed.*spp.unpack"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(WrapError, match=r"is packed.*spp.unpack"):
        spp.save_model(model, tmp_path / "x")
    spp.wrap(model, r=4, target_modules=["up_proj"], packed=True)
    with pytest.raises(WrapError, match="still wrapped"):
        model.save_pretrained(tmp_path / "x")
    spp.merge(model, dtype=torch.bfloat16)  # down_proj stays packed
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    with pytest.raises(WrapError, match=r"is packed.*spp.unpack"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    spp.save_model(spp.unpack(model), tmp_path / "x")
    assert spp.verify(pruned(), tmp_path / "x").pattern == "2:4"


def test_pruning_a_packed_model_is_refused() -> None:
    with pytest.raises(WrapError, match=r"is packed: spp.unpack"):
        spp.prune(spp.pack(pruned()), "magnitude", "2:8")


def test_dense_layers_are_packed_with_a_warning() -> None:
    model = pruned()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    with pytest.warns(SPPWarning, match=r"1 of 14 target layers are dense.*up_proj: packed, they take more memory"):
        spp.pack(model)
    with pytest.warns(SPPWarning, match=r"all 14 target layers are dense.*packed, they take more memory"):
        spp.wrap(tiny_llama(), r=4, packed=True)


def test_what_cannot_be_packed_leaves_the_model_as_it_was() -> None:
    model = pruned()
    quantized = nn.Parameter(torch.ones(64, 160, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].mlp.down_proj.weight = quantized
    with pytest.raises(TargetError, match=r"layers.1.mlp.down_proj.weight is torch.int8"):
        spp.pack(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    with torch.device("meta"):
        empty = tiny_llama()
    for convert in (spp.pack, lambda m: spp.wrap(m, r=4, packed=True)):
        with pytest.raises(ConfigError, match=r"q_proj.weight is on the meta device"):
            convert(empty)


def test_an_interrupted_wrap_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = pruned(), pruned()
    pack = PackedWeight.pack.__func__  # type: ignore[attr-defined]
    calls = []

    def interrupted(cls: type, weight: Tensor, where: str = "") -> PackedWeight:
        calls.append(where)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return pack(cls, weight, where)

    monkeypatch.setattr(PackedWeight, "pack", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        spp.wrap(model, r=4, packed=True)
    assert len(calls) == 5
    assert_same_model(model, before)


@pytest.mark.parametrize("convert", [spp.pack, lambda m: spp.wrap(m, r=4, packed=True)], ids=["pack", "wrap"])
def test_converting_holds_one_dense_layer_at_a_time(convert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    weights = [weakref.ref(module.weight) for module in projections(model).values()]
    pack = PackedWeight.pack.__func__  # type: ignore[attr-defined]
    alive = []

    def counting(cls: type, weight: Tensor, where: str = "") -> PackedWeight:
        alive.append(sum(w() is not None for w in weights))
        packed: PackedWeight = pack(cls, weight, where)
        return packed

    monkeypatch.setattr(PackedWeight, "pack", classmethod(counting))
    convert(model)
    assert alive == list(range(14, 0, -1))  # each is gone before the next is packed
    assert all(w() is None for w in weights)


def test_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for packed in (False, True):
        spp.print_trainable_parameters(spp.wrap(pruned(), r=4, packed=packed))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_an_array_mapped_from_a_file_keeps_what_was_written_to_it(tmp_path: Path) -> None:
    """Nobody but the array's owner may give its pages back: they hold changes that the file does not."""
    np.ones((64, 512), np.float32).tofile(tmp_path / "w")
    array = np.memmap(tmp_path / "w", np.float32, "c", shape=(64, 512))
    array *= np.float32([2, 0, 0, 3] * 128)
    expected = np.array(array)
    linear = nn.Linear(512, 64, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.from_numpy(array))
    model = spp.pack(nn.Sequential(linear), target_modules="all-linear")
    assert np.array_equal(array, expected)
    assert torch.equal(model[0].weight, torch.from_numpy(expected))
