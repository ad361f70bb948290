"""The models that benchmarks run on: a directory or hub id, or random weights of a known shape."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {
    "smollm2": (576, 1536, 30, 9, 3, 49152, True),
    "tiny": (64, 160, 2, 4, 2, 256, False),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, False),
}


def add_model_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add --model and --shape, which exclude each other."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--model", help=model_help)
    group.add_argument("--shape", default="smollm2", choices=sorted(SHAPES), help="random weights of this shape")


def model_arguments(options: argparse.Namespace) -> list[str]:
    """Return the options of `add_model_options` as a command line, for a child."""
    return ["--model", options.model] if options.model else ["--shape", options.shape]


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> Any:
    """Return transformers' config of a Llama, in the order of SHAPES."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def load_dense(options: argparse.Namespace) -> nn.Module:
    """Return the model of --model or --shape in --dtype on --device, without a key-value cache.

    Raises:
        CheckpointError: the model cannot be found, reached or read.
    """
    from transformers import LlamaForCausalLM

    from spp.training.loading import load_model  # which imports the trainer: seconds that --help need not take

    dtype = getattr(torch, options.dtype)
    model: Any
    if options.model:
        model = load_model(options.model, options.dtype)
        for parameter in model.parameters():  # else a view of the mapped file, which stays while any of them does
            parameter.data = parameter.data.clone()
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(*SHAPES[options.shape])).to(dtype)
    model.config.use_cache = False
    return model.to(options.device)
