"""Loading a model and its tokenizer from a directory or the hub, with one clear error when that fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from spp.errors import CheckpointError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str | os.PathLike[str], dtype: str = "auto") -> Any:
    """Load a causal language model with transformers.

    Args:
        name: directory or hub id.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: it cannot be found, reached or read.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(os.fspath(name), dtype=_DTYPES.get(dtype, dtype))
    except Exception as error:  # OSError, ValueError, KeyError, those of safetensors and of the HTTP client
        raise _error("model", name, error) from error


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Load a tokenizer with transformers.

    Args:
        name: directory or hub id.

    Raises:
        CheckpointError: it cannot be found, reached or read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(name))
    except Exception as error:  # as above
        raise _error("tokenizer", name, error) from error


def _error(what: str, name: str | os.PathLike[str], error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    if Path(name).is_dir():
        place, remedy = (
            "from the directory",
            "is it a Hugging Face checkpoint (config.json, *.safetensors, tokenizer files)?",
        )
    else:
        place = "as a hub id, for there is no such directory here,"
        remedy = "check the spelling; a download needs the network, and a private or gated model a login"
    return CheckpointError(f"cannot load the {what} {os.fspath(name)} {place}: {reason}\n{remedy}")
