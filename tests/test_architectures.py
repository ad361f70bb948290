"""Every architecture by one road: prune, wrap, train, save and load the adapter, merge, save, reload with transformers.

Tiny random models of transformers' own classes; no argument names a module anywhere. What the run finds is written
down in architectures.md: it is compared with that file, and written to it where SPP_WRITE_ARCHITECTURES is set.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import spp
from spp.files import CheckpointReader
from spp.masks.patterns import is_nm, nonzero_mask
from spp.models.projection import find_projections
from spp.models.targets import last_name
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import MOE_ARCHITECTURES, NAMED_OTHERWISE
from tests.helpers.tolerances import LOGITS, error

IMAGE = 95  # the token that stands for a piece of an image
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 8}
DENSE: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 16},
    "qwen2": GATED,
    "qwen3": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**HEADS, "sliding_window": 16},
    "phi3": GATED,
    "olmo2": GATED,
    "cohere": GATED,
    "starcoder2": GATED,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {**SMALL, "intermediate_size": 64},
    "falcon": {**SMALL, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "expansion_ratio": 2, "max_seq_len": 64},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "rotary_dim": 8, "n_positions": 64},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}
# Of these, the vision tower and the projector stay as they are.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **GATED},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "vision_feature_layer": -1,
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **HEADS, "sliding_window": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "qwen2_vl": {
        "text_config": {
            **GATED,
            "model_type": "qwen2_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 1,
        },
        "image_token_id": IMAGE,
    },
}
ARCHITECTURES = {
    **DENSE,
    **MULTIMODAL,
    **MOE_ARCHITECTURES,
}
OTHER_MODALITIES = ("vision_tower", "visual", "multi_modal_projector")
UNTOUCHED = ("router", "lm_head", "embed", "wte", "wpe", "mlp.gate.", "norm", "ln_", *OTHER_MODALITIES)
WRITES_TABLE = bool(os.environ.get("SPP_WRITE_ARCHITECTURES"))
TABLE = Path(__file__).with_name("architectures.md")
HEADING = """\
# Architectures that the tests take through the whole road

Pruned to 2:4, wrapped, trained, saved, loaded, merged and reloaded by `tests/test_architectures.py`, with the targets
that are chosen when none are named. That test made this table: `SPP_WRITE_ARCHITECTURES=1 make test`.

| `model_type` | adapted by default | stored as | left as it was |
| --- | --- | --- | --- |
"""


def _auto(architecture: str) -> Any:
    return AutoModelForImageTextToText if architecture in MULTIMODAL else AutoModelForCausalLM


def _row(architecture: str, model: nn.Module, adapted: dict[str, Any]) -> str:
    """What was adapted in a model, and what was not, as a row of the table."""
    names = dict.fromkeys(last_name(projection.path) for projection in adapted.values())
    layouts = [("in, out" if p.input_axis == -2 else "out, in", p.fused) for p in adapted.values()]
    stored = dict.fromkeys(f"({'E, ' if fused else ''}{layout})" for layout, fused in layouts)
    left = dict.fromkeys(
        _part(n) for n, p in model.named_parameters() if p.dim() > 1 and n not in adapted and "bias" not in n
    )
    return f"| {architecture} | {', '.join(names)} | {', '.join(stored)} | {', '.join(left)} |"


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to: the module's name, or the modality's."""
    modules = name.split(".")[:-1]
    named = [part for part in modules if part != "layer"]  # JetMoE's routers have a linear of that name
    return next((part for part in OTHER_MODALITIES if part in modules), named[-1])


def _other_modality(key: str) -> bool:
    return any(part in key.split(".") for part in OTHER_MODALITIES)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, str]]:
    """The rows of the table that this run makes; a whole run rewrites the file where it was asked to."""
    made: dict[str, str] = {}
    yield made
    if WRITES_TABLE and made.keys() == ARCHITECTURES.keys():
        TABLE.write_text(HEADING + "".join(f"{made[name]}\n" for name in ARCHITECTURES), encoding="utf-8")


def _model(architecture: str) -> nn.Module:
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = _auto(architecture).from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far enough from zero that three steps show
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.1)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def _inputs(architecture: str, ids: torch.Tensor) -> dict[str, Any]:
    more = {"token_type_ids": torch.zeros_like(ids)} if architecture == "gemma3" else {}  # transformers 5.1 wants them
    return {"input_ids": ids, "labels": ids, **more}


def _train(model: nn.Module, inputs: dict[str, Any]) -> list[float]:
    """Take three steps; return the loss before and after them, without the dropout that some of the models have."""
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=2e-2)
    losses = []
    for steps in (3, 0):
        with torch.no_grad():
            losses.append(model.eval()(**inputs, use_cache=False).loss.item())
        model.train()
        for _ in range(steps):
            model(**inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.sampled(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_road(architecture: str, rows: dict[str, str], tmp_path: Path) -> None:
    model, ids = _model(architecture), _ids()
    before = copy.deepcopy(model.state_dict())
    report = spp.prune(model, "wanda", "2:4", ids)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    pruned = copy.deepcopy(model)
    masks = {name: nonzero_mask(t) for name, t in model.state_dict().items()}

    spp.wrap(model, r=4, seed=0)
    assert list(adapter_layers(model)) == list(report.layers)
    with torch.no_grad():
        assert error(model(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits) <= LOGITS[torch.float32]
    before_training, after = _train(model, _inputs(architecture, ids))
    assert after < before_training
    spp.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(ids, use_cache=False).logits
    again = spp.load_adapter(copy.deepcopy(pruned), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, tuned)
        assert error(tuned, pruned(ids, use_cache=False).logits) > 1e-3

    in_memory = spp.merge(model)
    assert not adapter_layers(model)
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        merged = model(ids, use_cache=False).logits
    assert error(merged, tuned) <= LOGITS[torch.float32]
    adapted = {p.parameter_path: p for p in find_projections(model) if p.path in report.layers}
    assert not [name for name in adapted if any(part in name for part in UNTOUCHED)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(nonzero_mask(tensor), masks[name]), name
        if name in adapted:
            assert all(is_nm(nonzero_mask(matrix), 2, 4) for matrix in adapted[name].matrices()), name
            assert not torch.equal(tensor, pruned.state_dict()[name]), name
        else:  # routers, heads, embeddings, norms; of several modalities, all but the text side
            assert torch.equal(tensor, before[name]), name
    spp.save_model(model, tmp_path / "merged")
    reloaded = _auto(architecture).from_pretrained(tmp_path / "merged").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
        assert torch.equal(nonzero_mask(reloaded.state_dict()[name]), masks[name]), name
    with torch.no_grad():
        assert torch.equal(reloaded(ids, use_cache=False).logits, merged)
    disk = spp.verify(tmp_path / "merged")
    assert {t.pattern for key, t in disk.tensors.items() if not _other_modality(key)} == {"2:4"}
    assert {t.pattern for key, t in disk.tensors.items() if _other_modality(key)} <= {"dense"}
    spp.save_model(pruned, tmp_path / "pruned")
    spp.verify(tmp_path / "pruned", tmp_path / "merged")
    on_disk = spp.merge_checkpoint(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "streamed")
    assert on_disk.layers == in_memory.layers and on_disk.survived == pytest.approx(in_memory.survived)
    with CheckpointReader(tmp_path / "merged") as one, CheckpointReader(tmp_path / "streamed") as other:
        assert one.keys() == other.keys()
        for key in one:
            assert one.raw(key) == other.raw(key), key
    with CheckpointReader(tmp_path / "pruned") as one, CheckpointReader(tmp_path / "merged") as other:
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(nonzero_mask(one.tensor(key)), nonzero_mask(other.tensor(key))), key
    unwrapped = spp.unwrap(again)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(unwrapped.state_dict()[name], tensor), name
    rows[architecture] = _row(architecture, model, adapted)
    if architecture not in NAMED_OTHERWISE:
        assert WRITES_TABLE or rows[architecture] in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_these_architectures_and_no_others() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith(HEADING)
    listed = [line.split(" | ")[0].removeprefix("| ") for line in text.removeprefix(HEADING).splitlines()]
    assert listed == list(ARCHITECTURES)
