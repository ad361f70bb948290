"""PackedWeight: a pruned matrix stored at the size of what was kept. How it lies in memory: `spp.packed.layout`."""

from __future__ import annotations

from spp.packed.layout import Layout
from spp.packed.mapped import give_back_pages
from spp.packed.quantized import QuantizedLayout, QuantizedWeight
from spp.packed.quantizers import (
    quantize_like,
    quantized_kind,
    read_quantized,
    release_quantized,
    write_quantized,
)
from spp.packed.weight import DTYPES, PackedWeight

__all__ = [
    "DTYPES",
    "Layout",
    "PackedWeight",
    "QuantizedLayout",
    "QuantizedWeight",
    "give_back_pages",
    "quantize_like",
    "quantized_kind",
    "read_quantized",
    "release_quantized",
    "write_quantized",
]
