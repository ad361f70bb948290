"""Where the Triton kernels run in a test: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device for the kernels' tensors; a test is skipped only where Triton does not exist for the system."""
    if sys.platform != "linux":
        pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from spp.kernels.triton.build_kernel import _build_kernel

    if torch.cuda.is_available():
        return torch.device("cuda")
    assert isinstance(_build_kernel, InterpretedFunction), "triton was imported before TRITON_INTERPRET was set"
    return torch.device("cpu")
