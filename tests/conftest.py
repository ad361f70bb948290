"""What every test finds: no hub, no tokenizer threads; where a test asks, the real model and a place for kernels."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

# Before anything imports huggingface_hub: an id that is no directory fails at once instead of being looked for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: one thread each, and for what they start. The variable alone comes too late
    # for torch here: pytest has imported it, with spp, for the warnings that pyproject.toml filters.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

# Before anything imports triton: without a GPU the kernels run in Triton's interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What tests write is made durable with fsync, which takes a disk longer than all else: memory, where it has room.
MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GOLDEN = 0.6180339887  # its multiples, modulo 1, spread over [0, 1) without hitting one column of a table only

# How many inputs a property is tried on: few and always the same in the quick part, many and new ones in the whole.
settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("whole", max_examples=200, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Choose hypothesis' profile by -m, unless --hypothesis-profile names one."""
    if config.getoption("hypothesis_profile", None) is None:
        settings.load_profile("quick" if "not slow" in config.option.markexpr else "whole")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow: what is stress, and of a test marked sampled(n) all cases but n that are spread among them."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("stress"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("sampled"):
            cases.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for some in cases.values():
        marker = some[0].get_closest_marker("sampled")
        assert marker is not None
        quick = {int(i * GOLDEN % 1 * len(some)) for i in range(marker.args[0])}
        for number, item in enumerate(some):
            if number not in quick:
                item.add_marker(pytest.mark.slow)


gc.set_threshold(50_000, 20, 50)  # garbage of small models is no reason to look at all objects
_modules = 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Take what was imported out of garbage collection: a Trainer collects at every start, some tests do, too."""
    global _modules
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


def model_of(example: str) -> Path:
    """The directory of the model that an example downloads, once; the test is skipped where that cannot be."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return Path(getattr(module, example)())
    except RuntimeError as error:
        pytest.skip(f"{example} is not here: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    return model_of("smollm2")


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
