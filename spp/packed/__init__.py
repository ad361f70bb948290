"""PackedWeight: a pruned matrix stored at the size of what was kept, PackedStack: those of several experts.

How they lie in memory: `spp.packed.layout`.
"""

from __future__ import annotations

from spp.packed.held import FLOATS, HeldWeight
from spp.packed.holder import NAMES, HoldsWeight, converting
from spp.packed.layout import Layout
from spp.packed.quantized import QuantizedLayout, QuantizedWeight
from spp.packed.quantizers import (
    quantize_like,
    quantized_kind,
    read_quantized,
    release_quantized,
    write_quantized,
)
from spp.packed.stack import PackedStack, StackLayout
from spp.packed.weight import DTYPES, PackedWeight

__all__ = [
    "DTYPES",
    "FLOATS",
    "NAMES",
    "HeldWeight",
    "HoldsWeight",
    "Layout",
    "PackedStack",
    "PackedWeight",
    "QuantizedLayout",
    "QuantizedWeight",
    "StackLayout",
    "converting",
    "quantize_like",
    "quantized_kind",
    "read_quantized",
    "release_quantized",
    "write_quantized",
]
