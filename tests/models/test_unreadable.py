"""Projections that are stored otherwise are told by the names of their tensors, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spp
from spp.errors import SPPWarning, TargetError
from spp.models.unreadable import describe_unreadable, unreadable_projections
from tests.helpers.models import MOE_ARCHITECTURES, moe_model, tiny_llama

Q = "model.layers.0.self_attn.q_proj"
F, I, U = (2, torch.bfloat16), (2, torch.int32), (2, torch.uint8)
FORMATS = {
    "GPTQ": ({"qweight": I, "qzeros": I, "scales": F, "g_idx": (1, torch.int32)}, "g_idx, qweight, qzeros, scales"),
    "GPTQ or AWQ": ({"qweight": I, "qzeros": I, "scales": F}, "qweight, qzeros, scales"),
    "compressed-tensors": ({"weight_packed": I, "weight_scale": F, "bias": F}, "bias, weight_packed, weight_scale"),
    "compressed-tensors, sparse": ({"compressed": F, "bitmask": U, "shape": I}, "bitmask, compressed, shape"),
    "bitsandbytes, 4 bits": (
        {"weight": U, "weight.absmax": F, "weight.quant_map": F},
        "weight, weight.absmax, weight.q",
    ),
    "bitsandbytes, 8 bits": ({"weight": (2, torch.int8), "SCB": F}, "SCB, weight"),
    "torchao": ({"_weight_qdata": (2, torch.int8), "_weight_scale": F}, "_weight_qdata, _weight_scale"),
    "HQQ": ({"W_q": U, "zero": F}, "W_q, zero"),
    "AQLM": ({"codes": I, "codebooks": (4, torch.float16), "scales": F}, "codebooks, codes, scales"),
    "quanto": ({"weight._data": (2, torch.int8), "weight._scale": F}, "weight._data, weight._scale"),
}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("path", [Q, "model.layers.3.block_sparse_moe.experts.7.w2", "h.0.attn.unheard_of"])
def test_formats(name: str, path: str) -> None:
    parts, listed = FORMATS[name]
    found = unreadable_projections({f"{path}.{part}": of for part, of in parts.items()})
    assert found.keys() == {path}
    assert found[path].endswith(f"({name})") and (found[path].startswith(listed) or "unheard" in path)


def test_experts_and_forms_without_a_name() -> None:
    experts = {f"layers.0.mlp.experts.{n}_{p}": U for n in ("gate_up_proj", "down_proj") for p in ("blocks", "scales")}
    found = unreadable_projections({**experts, f"{Q}.strange": U, "a.b.fc1.weight": U})
    assert found == {
        "a.b.fc1": "weight (uint8)",
        "layers.0.mlp.experts.down_proj": "blocks, scales (MXFP4)",
        "layers.0.mlp.experts.gate_up_proj": "blocks, scales (MXFP4)",
        Q: "strange",
    }
    fused = {"layers.0.mlp.experts.gate_up_proj": (3, torch.int8), "layers.0.mlp.experts.gate_up_proj_bias": F}
    assert unreadable_projections(fused) == {"layers.0.mlp.experts.gate_up_proj": "weight (int8)"}
    assert unreadable_projections({f"{Q}.weight": I, f"{Q}.bias": F}) == {Q: "weight (int32)"}
    assert describe_unreadable(found).startswith("2 stored as blocks, scales (MXFP4): layers.0.mlp.experts.down_proj, ")


def test_what_is_none() -> None:
    nothing = {
        f"{Q}.weight": F,
        f"{Q}.weight_scale_inv": F,  # float8 and its scale: a zero is a zero
        f"{Q}.bias": (1, torch.bfloat16),
        "layers.0.mlp.experts.gate_up_proj": (3, torch.bfloat16),
        "layers.0.mlp.experts.gate_up_proj_bias": F,
        "lm_head.qweight": I,  # no projection
        "model.embed_tokens.weight": U,
        "vision.fc1.weight": (4, torch.bfloat16),  # a convolution
        "vision.fc1.bias": (1, torch.bfloat16),
        "layers.0.o_proj.bias": (1, torch.bfloat16),  # its weight is shared, and stored elsewhere
        "layers.0.q_proj.base_layer.weight": F,
        "layers.0.q_proj.lora_A.default.weight": F,
        "h.0.attn.bias": (4, torch.bool),
        "layers.0.self_attn.rotary_emb.inv_freq": (1, torch.float32),
        "layers.0.mlp.dense_h_to_4h.weight": F,
    }
    assert unreadable_projections(nothing) == {}


@pytest.mark.parametrize("architecture", ["llama", *MOE_ARCHITECTURES])
def test_plain_models_have_none(architecture: str) -> None:
    model = tiny_llama() if architecture == "llama" else moe_model(architecture)
    assert unreadable_projections({k: (t.ndim, t.dtype) for k, t in model.state_dict().items()}) == {}


class Quantized(nn.Module):
    """A linear that holds codes, as those of a library that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(8, 64, dtype=torch.int32))


def test_models_in_memory() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = Quantized()
    with pytest.warns(SPPWarning, match=rf"of 1 projections|zeros of 1 projections .* stored as qweight .*: {Q}"):
        assert len(spp.sparsity(model).tensors) == 13
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in [name for name, _ in parent.named_children() if name.endswith("_proj")]:
                setattr(parent, name, Quantized())
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no projection .* read: 14 stored as qweight"):
        spp.sparsity(model)
    with pytest.raises(
        TargetError, match=r"the Sequential has no projection .*: its parameters are 0\.bias, 0\.weight"
    ):
        spp.verify(nn.Sequential(nn.LayerNorm(4)), tiny_llama())
    with pytest.raises(TargetError, match="its parameters are none"):
        spp.sparsity(nn.Sequential())
