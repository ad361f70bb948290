"""Small models and tokenizers that tests build in milliseconds, with transformers' own classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.tolerances import assert_same_bits

VOCABULARY = 256
# Of which older versions of transformers name the head, or the experts, otherwise than the tests say.
NAMED_OTHERWISE = ("gpt_neox", "granitemoe") if Version(transformers.__version__) < Version("5.20") else ()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


_MOE_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MOE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_MOE_SMALL, "num_local_experts": 4},
    "qwen3_moe": {**_MOE_SMALL, **_MOE},
    "olmoe": {**_MOE_SMALL, "num_experts": 4},
    "granitemoe": {**_MOE_SMALL, "num_local_experts": 4},
    "gpt_oss": {**_MOE_SMALL, "num_local_experts": 4, "sliding_window": 8},
    "llama4_text": {**_MOE_SMALL, "num_local_experts": 4, "intermediate_size_mlp": 24, "attention_chunk_size": 64},
    "jetmoe": {**_MOE_SMALL, "num_local_experts": 4, "kv_channels": 8},
    "deepseek_v3": {
        **_MOE_SMALL,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def moe_model(architecture: str) -> torch.nn.Module:
    """A two-block mixture of experts with random weights (seed 0), float32, in eval mode."""
    config = AutoConfig.for_model(architecture, **MOE_ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some classes start their experts at zero
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


_MADE: dict[tuple[object, ...], LlamaForCausalLM] = {}  # a copy takes half of the time


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama with random weights (seed 0), float32, in eval mode."""
    options: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **overrides,
    }
    how = (repr(options), torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled())
    if how not in _MADE:
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a traceback for GPUs that are not in use
        _MADE[how] = LlamaForCausalLM(LlamaConfig(**options)).eval()  # type: ignore[arg-type]
        torch.set_rng_state(state)
    return copy.deepcopy(_MADE[how])


def projections(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linears of the decoder blocks by module path."""
    return {n: m for n, m in model.named_modules() if n.endswith("_proj") and hasattr(m, "weight")}


@torch.no_grad()
def prune_nm_(model: torch.nn.Module, kept: int = 2, group: int = 4) -> torch.nn.Module:
    """Keep the `kept` largest of every `group` inputs in each projection, in place; the tests' own plain code."""
    for module in projections(model).values():
        blocks = module.weight.view(module.weight.shape[0], -1, group)
        lowest = blocks.abs().argsort(dim=-1, stable=True)[..., : group - kept]
        blocks.scatter_(-1, lowest, 0.0)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (ASCII), four special ones and a small chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = [chr(c) for c in range(32, 127)] + ["\n", "\t"]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_steps(model: Any, optimizer: torch.optim.Optimizer, steps: int, **inputs: Any) -> list[float]:
    """Train on the same inputs again and again; return the losses."""
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    """Names in order, values bit for bit, flags and classes are the same."""
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert_same_bits(a[key], b[key], key)
    flags = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in found.named_parameters()} == flags
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
