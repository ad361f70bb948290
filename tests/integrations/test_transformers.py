"""from_pretrained loads packed checkpoints once the integration is imported, and stops at them without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import spp
import spp.integrations.transformers as integration
from spp.errors import CheckpointError, ConfigError, WrapError
from spp.files import read_json, write_json
from spp.layers.host import PackedLinear
from tests.helpers.checkpoints import shard
from tests.helpers.models import moe_model, prune_nm_, tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_same_bits


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    model: Any = prune_nm_(tiny_llama()).bfloat16()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.uniform_(1, 2)  # not pruned: stays dense
        model.model.layers[1].mlp.up_proj.weight[::2] = 0  # another pattern, without one
    spp.save_model(model, folder / "base", tokenizer=tiny_tokenizer())
    spp.export_packed(folder / "base", folder / "packed")
    return folder / "packed"


def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float32}, {"device_map": "cpu"}, {"dtype": torch.float16}], ids=str
)
def test_it_is_what_load_packed_gives(packed: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, **options)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    expected = spp.load_packed(packed, dtype=options.get("dtype"))
    assert type(model) is LlamaForCausalLM and not model.training
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 13
    state, other = model.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    for key in other:
        assert_same_bits(state[key] + 0, other[key] + 0, key)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in expected.named_parameters()
    }
    with torch.no_grad():
        assert_same_bits(model(ids()).logits, expected(ids()).logits)
    if not options:
        assert model.generate(ids(), do_sample=False, max_new_tokens=2).shape == (2, 11)


def test_it_counts_as_an_ordinary_model(packed: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    with pytest.raises(WrapError, match=r"the model is packed.*spp\.unpack"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    spp.wrap(model, r=4, packed=True, exclude_modules=["layers.0.mlp.up_proj"])
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    spp.unwrap(model)
    spp.unpack(model).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in read_json(tmp_path / "dense" / "config.json", "config")
    spp.verify(packed, tmp_path / "dense")


def test_shards(packed: Path, tmp_path: Path) -> None:
    spread = shard(packed, tmp_path / "spread", 4)
    one, other = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (packed, spread))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_what_it_does_not_load(packed: Path, tmp_path: Path) -> None:
    model: Any = moe_model("mixtral")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name:
                p[..., ::2] = 0
    spp.save_model(model, tmp_path / "moe")
    spp.export_packed(tmp_path / "moe", tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"does not hold it as a torch\.nn\.Linear; spp\.load_packed\(dir\) loads it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="offloaded to the disk"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    copy = shard(packed, tmp_path / "copy", 1)
    config = read_json(copy / "config.json", "config")
    config["quantization_config"]["format_version"] = 2
    write_json(copy / "config.json", config)
    with pytest.raises(CheckpointError, match="install a newer spp"):
        AutoModelForCausalLM.from_pretrained(copy)
    assert integration.SPPPackedConfig().to_dict() == {"quant_method": "spp_packed", "format_version": 1}


def test_without_the_registration_transformers_stops(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not go on with weights that were never loaded."""
    from transformers.quantizers import auto

    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "spp_packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(packed)
