"""A pruned checkpoint goes straight into packed weights, and the dense model never exists."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spp
from spp.errors import CheckpointError, ConfigError, SPPWarning, TargetError
from spp.files import CheckpointReader, read_json, write_json
from spp.layers.host import PackedLinear
from spp.models.disk_keys import DiskKeys
from spp.models.streamed import StreamedModel
from spp.weights import PackedStack
from tests.helpers.made import Made
from tests.helpers.models import assert_same_model, moe_model, projections, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_matches, assert_same_bits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "base"
    model = prune_nm_(tiny_llama())
    model.generation_config.max_new_tokens = 5
    spp.save_model(model, path)
    return path


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def ids() -> Tensor:
    return torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_it_is_what_loading_and_packing_gives(base: Path, dtype: torch.dtype | None) -> None:
    loaded = spp.load_packed(base, dtype=dtype)
    expected = spp.pack(load(base, dtype=dtype or torch.float32))
    assert not loaded.training
    assert_same_model(loaded, expected)
    assert loaded.config._name_or_path == str(base)
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    with torch.no_grad():
        assert_same_bits(loaded(ids()).logits, expected(ids()).logits)
    assert torch.equal(loaded.generate(ids(), do_sample=False), expected.generate(ids(), do_sample=False))


def test_train_merge_and_save_from_it(base: Path, tmp_path: Path) -> None:
    model = spp.wrap(spp.load_packed(base), r=4, packed=True)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.01)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    spp.save_adapter(model, tmp_path / "adapter")
    spp.merge(model)
    spp.save_model(model, tmp_path / "merged")
    spp.verify(base, tmp_path / "merged")
    spp.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "streamed")
    with CheckpointReader(tmp_path / "merged") as one, CheckpointReader(tmp_path / "streamed") as two:
        assert one.keys() == two.keys()
        for key in one:
            assert_same_bits(one.tensor(key) + 0.0, two.tensor(key) + 0.0, key)


def test_unpacked_it_is_the_dense_model(base: Path) -> None:
    model, expected = spp.unpack(spp.load_packed(base)), load(base)
    for key, tensor in expected.state_dict().items():
        assert_same_bits(model.state_dict()[key] + 0.0, tensor + 0.0, key)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    spp.save_model(prune_nm_(tiny_llama(tie_word_embeddings=True)), tmp_path / "tied")
    model = spp.load_packed(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert_same_bits(model(ids()).logits, load(tmp_path / "tied")(ids()).logits)


@pytest.mark.usefixtures("only_new_objects")
def test_at_most_one_dense_projection_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    spp.save_model(prune_nm_(tiny_llama(num_hidden_layers=1)), base)
    shapes = {tuple(module.weight.shape) for module in projections(tiny_llama()).values()}
    largest = max(m * n * 4 for m, n in shapes)
    gc.collect()

    def tensors() -> list[Tensor]:
        return [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]

    before = {id(t) for t in tensors()}
    peaks: list[int] = []

    def dense_bytes() -> int:  # without a collection before: memory that waits for one is held too
        found = [t for t in tensors() if id(t) not in before and not t.is_meta]
        return sum({t.data_ptr(): t.nbytes for t in found if tuple(t.shape) in shapes}.values())

    load_keys, make = StreamedModel.load, PackedLinear.__init__

    def watched_load(self: StreamedModel, *args: Any) -> None:
        load_keys(self, *args)
        peaks.append(dense_bytes())

    def watched_make(self: PackedLinear, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        peaks.append(dense_bytes())

    monkeypatch.setattr(StreamedModel, "load", watched_load)
    monkeypatch.setattr(PackedLinear, "__init__", watched_make)
    model = spp.load_packed(base)
    assert len(peaks) == 1 + 2 * 7
    assert peaks[0] == 0  # embeddings, norms and the head have other shapes
    assert 0 < max(peaks) <= largest
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "jetmoe", "deepseek_v3"])
def test_fused_experts_are_read_one_by_one(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe_model(architecture)
    spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, tmp_path / "base")
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 3}
    made, real = Made(), PackedStack.pack.__func__  # type: ignore[attr-defined]

    def watched(*args: Any, **options: Any) -> Any:
        with made:
            return real(*args, **options)

    monkeypatch.setattr(PackedStack, "pack", classmethod(watched))
    for dtype in (None, torch.bfloat16):
        made.shapes.clear()
        loaded = spp.load_packed(tmp_path / "base", dtype=dtype)
        assert made.shapes and not shapes & set(made.shapes)
        expected = spp.pack(load(tmp_path / "base", dtype=dtype or torch.float32))
        assert_same_model(loaded, expected)
        tokens = ids() % 96
        with torch.no_grad():
            assert_same_bits(loaded(tokens).logits, expected(tokens).logits)
        unpacked = spp.unpack(loaded).state_dict()
        for key, tensor in load(tmp_path / "base", dtype=dtype or torch.float32).state_dict().items():
            assert_same_bits(unpacked[key] + 0.0, tensor + 0.0, key)


def test_conv1d_is_packed_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=96, n_positions=64)).eval()
    spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, tmp_path / "base")
    loaded = spp.load_packed(tmp_path / "base")
    assert sum(isinstance(m, PackedLinear) for m in loaded.modules()) == 4
    assert spp.verify(tmp_path / "base", loaded).pattern == "2:4"
    with torch.no_grad():
        assert_matches(loaded(ids() % 96).logits, model(ids() % 96).logits.double(), torch.float32)
    for key, tensor in spp.unpack(loaded).state_dict().items():
        assert_same_bits(tensor + 0.0, model.state_dict()[key] + 0.0, key)


def test_experts_that_the_disk_holds_otherwise_are_loaded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, tmp_path / "base")
    expected = spp.load_packed(tmp_path / "base").state_dict()
    asked = []
    monkeypatch.setattr(DiskKeys, "experts", lambda self, group, name: asked.append(name))
    found = spp.load_packed(tmp_path / "base").state_dict()
    assert len(asked) == 4
    for key, tensor in found.items():
        assert_same_bits(tensor, expected[key], key)


def test_some_modules_only(base: Path) -> None:
    model = spp.load_packed(base, target_modules=["up_proj", "down_proj"], exclude_modules=["layers.0.mlp.up_proj"])
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 3
    with torch.no_grad():
        assert_same_bits(model(ids()).logits, load(base)(ids()).logits)


def test_what_it_refuses(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model directory"):
        spp.load_packed(tmp_path / "nothing")
    with pytest.raises(TargetError, match="nope"):
        spp.load_packed(base, target_modules=["nope"])
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        spp.load_packed(base, dtype=torch.int8)
    spp.save_model(prune_nm_(tiny_llama()), tmp_path / "quantized")
    config = read_json(tmp_path / "quantized" / "config.json", "config")
    write_json(tmp_path / "quantized" / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ConfigError, match="quantized"):
        spp.load_packed(tmp_path / "quantized")
    spp.save_model(tiny_llama(), tmp_path / "dense")
    with pytest.warns(SPPWarning, match=r"all 14 target layers are dense.*they take more memory"):
        spp.load_packed(tmp_path / "dense")
