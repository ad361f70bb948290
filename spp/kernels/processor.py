"""The abilities of this CPU by which the kernels are chosen; found out once, from its description, never by timing.

16-bit products in hardware that are faster than float32's: bfloat16 on AMX, and on AMD with AVX-512 BF16; float16 on
AMX FP16. Intel's AVX-512 BF16 without AMX needs 1.8 times the time of float32 (512 to 2048 rows, 576 to 4096
features, 2 threads of a Xeon whose AMX is hidden from its virtual machine), and a CPU without either far more.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

INTEL, AMD = "GenuineIntel", "AuthenticAMD"
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
