"""The share of parameters that SPP trains at r = 16, from configs alone: the numbers of the SPP paper."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import spp
from benchmarks.models import llama_config

# hidden, intermediate, layers, heads, key-value heads: per mille of all parameters, the adapter's among them
MODELS = {
    "LLaMA 7B": ((4096, 11008, 32, 32, 32), 2.90),
    "LLaMA 13B": ((5120, 13824, 40, 40, 40), 2.35),
    "LLaMA 30B": ((6656, 17920, 60, 52, 52), 1.83),
    "LLaMA 65B": ((8192, 22016, 80, 64, 64), 1.50),
    "LLaMA-2 70B": ((8192, 28672, 80, 64, 8), 1.54),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_the_papers_table(name: str) -> None:
    shape, expected = MODELS[name]
    hidden, intermediate, layers, heads, kv_heads = shape
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(*shape, 32000, False))
    spp.wrap(model, r=16)
    trained = sum(parameter.numel() for parameter in spp.adapter_parameters(model))
    inner = hidden // heads * kv_heads
    inputs, outputs = 6 * hidden + intermediate, 3 * hidden + 2 * inner + 2 * intermediate
    assert trained == layers * (16 * inputs + outputs)
    assert round(1000 * trained / sum(parameter.numel() for parameter in model.parameters()), 2) == expected
