"""Who computes an adapted layer: Triton's kernels around the products on a GPU, compiled products on a CPU, or torch.

    SPP_KERNELS=auto      Triton on CUDA GPUs of capability 8.0 and later; on a CPU with a C compiler products that skip
                          the zeros, where a layer has enough of them; plain torch elsewhere (the default)
    SPP_KERNELS=torch     plain torch everywhere: the kernels' twin
    SPP_KERNELS=native    the compiled products for every layer on a CPU that they can compute, or an error
    SPP_KERNELS=triton    Triton everywhere, or an error that says why not; on CPU tensors with TRITON_INTERPRET=1

The values of W_eff are the same bits either way; outputs and gradients may differ in the order of their sums. Merges
and the checks of checkpoints, too, are compiled on a CPU with `auto` and `native` (native/elementwise.py).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spp.errors import ConfigError, DependencyError, SPPWarning
from spp.weights.packed.matrix import PackedWeight, add_decoder

VARIABLE = "SPP_KERNELS"
CHOICES = ("auto", "torch", "native", "triton")
CAPABILITY = (8, 0)  # bfloat16 in hardware; nothing older was ever compiled for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice = os.environ.get(VARIABLE, "auto")


def kernels() -> str:
    """Return the choice in force: "auto", "torch", "native" or "triton".

    Raises:
        ConfigError: the environment variable holds something else.
    """
    if _choice not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {_choice!r}; known: {', '.join(CHOICES)}")
    return _choice


@contextlib.contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Choose for the whole process inside a `with` block; it goes before the environment variable.

    Args:
        choice: "auto", "torch", "native" or "triton", as SPP_KERNELS.

    Raises:
        ConfigError: another choice.

    Example:
        >>> with use_kernels("torch"):
        ...     kernels()
        'torch'
    """
    global _choice
    if choice not in CHOICES:
        raise ConfigError(f"kernels={choice!r}; known: {', '.join(CHOICES)}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def by_triton(device: torch.device, dtype: torch.dtype, rule: str = "spp") -> bool:
    """Whether Triton's kernels do the work for a layer whose W is of `dtype` on `device`, or decode a packed weight.

    Raises:
        ConfigError, DependencyError: Triton was asked for, and cannot do it; the message says why.
    """
    choice = kernels()
    if choice in ("torch", "native") or (
        choice == "auto" and (device.type != "cuda" or dtype not in DTYPES or rule != "spp")
    ):
        return False
    if choice == "auto":
        return _works(device)
    reason = _refusal(device, dtype, rule)
    if reason:
        raise ConfigError(f"{VARIABLE}=triton: {reason}; use auto or torch")
    return True


def _refusal(device: torch.device, dtype: torch.dtype, rule: str) -> str | None:
    """Return why Triton's kernels cannot do the work, None where they can."""
    if rule != "spp":
        return f"there are no kernels for the rule {rule!r}"
    if dtype not in DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')} weights"
    try:
        from spp.kernels.triton import is_interpreted
    except ImportError as error:
        raise DependencyError(f"{VARIABLE}=triton needs triton: pip install 'spp[gpu]' ({error})") from error
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        return f"the weight is on {device}, and the kernels need a CUDA GPU (or TRITON_INTERPRET=1 and the CPU)"
    return None


@cache
def _works(device: torch.device) -> bool:
    """Whether this GPU is one for the kernels, and a small run of each gives what its twin does."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        from spp.kernels.triton import probe

        probe(device)
    except Exception as error:  # a missing compiler, driver or package: whatever it is, torch does the work
        warnings.warn(
            f"Triton's kernels do not work on {torch.cuda.get_device_name(device)}, so plain torch does their work, "
            f"slower: {type(error).__name__}: {error}. SPP_KERNELS=torch silences this",
            SPPWarning,
            stacklevel=2,
        )
        return False
    return True


def _decode(packed: PackedWeight, rows: slice, cols: slice, out: Tensor) -> bool:
    """Decode a block of a packed matrix by Triton's kernel where that does the work; return whether it did."""
    if not by_triton(packed.device, packed.dtype):
        return False
    from spp.kernels.triton import decode

    decode(packed, rows, cols, out)
    return True


add_decoder(_decode)


# ---- The abilities of this CPU by which the kernels are chosen: found out once, from its description, never by timing.
#
# 16-bit products in hardware that are faster than float32's: bfloat16 on AMX, and on AMD with AVX-512 BF16; float16 on
# AMX FP16. Intel's AVX-512 BF16 without AMX needs 1.8 times the time of float32 (512 to 2048 rows, 576 to 4096
# features, 2 threads of a Xeon whose AMX is hidden from its virtual machine), and a CPU without either far more.

AMD = "AuthenticAMD"
_CPUINFO = Path("/proc/cpuinfo")
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables that keep oneDNN from instructions


@cache
def vendor() -> str:
    """Return the CPU's vendor as Linux tells it, "" elsewhere."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are best computed in it; False means that float32 is faster."""
    if dtype == torch.bfloat16:
        by_amx = torch.cpu._is_amx_tile_supported() and _allowed("AMX")
        by_avx = torch.cpu._is_avx512_bf16_supported() and vendor() == AMD and _allowed("BF16", "FP16", "AMX", "AVX10")
        return bool(by_amx or by_avx)
    if dtype == torch.float16:
        return bool(torch.cpu._is_amx_fp16_supported() and _allowed("AMX_FP16", "AMX_2", "AVX10_2"))
    return True


def _allowed(*names: str) -> bool:
    """Whether oneDNN may use instructions: no limit is set, or one whose name says that it includes them."""
    limit = next((os.environ[name].upper() for name in _LIMITS if os.environ.get(name)), "DEFAULT")
    return limit in ("DEFAULT", "ALL") or any(name in limit for name in names)
