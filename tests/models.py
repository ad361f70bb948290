"""Small models and tokenizers that tests build in milliseconds, with transformers' own classes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options))  # type: ignore[arg-type]
    torch.set_rng_state(state)
    return model.eval()


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
