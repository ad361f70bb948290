"""What every test finds: no hub, no tokenizer threads; where a test asks, the real model and a place for kernels."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Before anything imports huggingface_hub: an id that is no directory fails at once instead of being looked for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: one thread each, and for what they start.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Before anything imports triton: without a GPU the kernels run in Triton's interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct; downloaded once, the test is skipped where that cannot be."""
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLES / "smollm2.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    try:
        return example.smollm2()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton's kernels run: on a GPU where there is one, else interpreted; skipped where there is no Triton."""
    if sys.platform != "linux":
        pytest.importorskip("triton")
    from spp.kernels.triton import is_interpreted

    if torch.cuda.is_available():
        return torch.device("cuda")
    assert is_interpreted(), "triton was imported before TRITON_INTERPRET was set"
    return torch.device("cpu")
