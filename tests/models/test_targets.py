"""Which modules are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

import spp
from spp.errors import TargetError
from spp.models.targets import (
    PROJECTIONS,
    is_projection_key,
    last_name,
    projection_weights,
    resolve_projections,
)
from tests.helpers.models import tiny_llama


def paths(model: nn.Module, *args: object, **kwargs: object) -> list[str]:
    return list(resolve_projections(model, *args, **kwargs))  # type: ignore[arg-type]


def test_default_is_the_seven_projections_in_module_order() -> None:
    found = paths(tiny_llama())
    assert len(found) == 14 and found[0] == "model.layers.0.self_attn.q_proj"
    assert {p.rsplit(".", 1)[1] for p in found} == set(PROJECTIONS)
    assert found == [n for n, m in tiny_llama().named_modules() if n in found]


def test_default_falls_back_to_the_architectures_own_names() -> None:
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    found = paths(GPTNeoXForCausalLM(config))
    assert [p.rsplit(".", 1)[1] for p in found] == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def test_default_takes_both_kinds_of_names_where_a_model_mixes_them() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    phi3 = Phi3ForCausalLM(Phi3Config(**small, intermediate_size=64, num_key_value_heads=2, pad_token_id=0))
    assert {p.rsplit(".", 1)[1] for p in paths(phi3)} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32))
    assert {p.rsplit(".", 1)[1] for p in paths(opt)} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_lists_regexes_exclusions_and_all_linear() -> None:
    model = tiny_llama()
    assert len(paths(model, ["q_proj", "mlp.up_proj"])) == 4
    assert paths(model, r"model\.layers\.1\.mlp\..*") == [
        f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert len(paths(model, "all-linear")) == 14
    assert len(paths(model, None, ["down_proj"])) == 12
    assert len(paths(model, None, r".*layers\.0\..*")) == 7
    assert "lm_head" in paths(model, ["lm_head"])


def test_nothing_matched_lists_what_there_is() -> None:
    with pytest.raises(TargetError, match=r"(?s)target_modules=\['query'\].*q_proj \(64, 64\): 2 ×.*target_modules="):
        resolve_projections(tiny_llama(), ["query"])
    with pytest.raises(TargetError, match="no linear modules"):
        resolve_projections(nn.Embedding(4, 4))


def test_a_tied_head_is_refused_by_name() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert len(paths(model, "all-linear")) == 14
    with pytest.raises(TargetError, match="tied"):
        resolve_projections(model, ["lm_head"])
    two = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    two["b"].weight = two["a"].weight
    with pytest.raises(TargetError, match="same tensor"):
        resolve_projections(two, "all-linear")


def test_a_module_registered_twice_comes_once() -> None:
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(4, 4))
    model.second = model.first[0]
    assert paths(model, "all-linear") == ["first.0"]
    torch.nn.init.zeros_(model.second.weight)
    model.second.weight.data[0, 0] = 1
    spp.wrap(model, r=2, target_modules="all-linear")
    assert model.second is model.first[0] and isinstance(model.second, spp.SPPLinear)
    assert len(spp.adapter_parameters(model)) == 2
    spp.unwrap(model)
    assert model.second is model.first[0] and type(model.second) is nn.Linear


def test_projection_keys() -> None:
    assert is_projection_key("model.layers.0.mlp.up_proj.weight", 2)
    assert is_projection_key("model.layers.0.mlp.experts.gate_up_proj", 3)
    for key, ndim in [
        ("lm_head.weight", 2),
        ("model.embed_tokens.weight", 2),
        ("transformer.wte.weight", 2),
        ("model.layers.0.input_layernorm.weight", 1),
        ("model.layers.0.mlp.gate.weight", 2),
        ("model.layers.0.mlp.up_proj.bias", 2),
        ("model.layers.0.mlp.up_proj.spp_alpha", 2),
    ]:
        assert not is_projection_key(key, ndim), key
    assert len(list(projection_weights(tiny_llama()))) == 14


def test_unrecognised_projections_name_the_argument_to_pass() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"mix": nn.Linear(8, 8), "expand": nn.Linear(8, 16), "norm": nn.LayerNorm(8)}) for _ in range(3)
    )
    model.head = nn.Linear(8, 32)
    message = (
        r"(?s)matches no linear module.*expand \(16, 8\): 3 ×, such as blocks\.0\.expand.*"
        r"target_modules=\['expand', 'mix'\]$"
    )
    with pytest.raises(TargetError, match=message):
        spp.wrap(model, r=2)


def test_the_text_side_is_meant_unless_more_is_named() -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tests.test_architectures import MULTIMODAL

    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **MULTIMODAL["llava"]))
    found = paths(model)
    assert len(found) == 14 and all(path.startswith("model.language_model.") for path in found)
    (image,) = [path for path in paths(model, "all-linear") if path.endswith(".mlp.fc1")]
    assert image.startswith("model.vision_tower.")
    assert paths(model, [image.removeprefix("model.")]) == [image]


@pytest.mark.parametrize(
    ("architecture", "sizes", "names"),
    [
        (
            "phi4_multimodal",  # whose text has no config of its own
            {"vision_config": {"num_hidden_layers": 2}, "audio_config": {"num_blocks": 1}, "num_hidden_layers": 1},
            {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        ),
        (
            "qwen3_next",  # linear attention, but for one layer
            {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_experts": 4},
            {*PROJECTIONS, "in_proj_qkvz", "out_proj", "gate_up_proj"},
        ),
    ],
)
def test_default_names_of_other_architectures(architecture: str, sizes: dict[str, Any], names: set[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    found = resolve_projections(model)
    assert {last_name(path) for path in found} == names
    assert all(path.startswith("model.layers.") for path in found)
