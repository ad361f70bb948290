"""The forms of a frozen weight W, and the modules that hold one."""

from __future__ import annotations

from spp.weights.base import FLOATS, DenseWeight, Weight, as_weight
from spp.weights.holder import NAMES, HoldsWeight, converting
from spp.weights.packed.layout import Layout
from spp.weights.packed.matrix import DTYPES, PackedStack, PackedWeight, StackLayout
from spp.weights.quantized import (
    quantize_like,
    quantized_kind,
    read_quantized,
    release_quantized,
    write_quantized,
)
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight

__all__ = [
    "DTYPES",
    "FLOATS",
    "NAMES",
    "DenseWeight",
    "HoldsWeight",
    "Layout",
    "PackedStack",
    "PackedWeight",
    "QuantizedLayout",
    "QuantizedWeight",
    "StackLayout",
    "Weight",
    "as_weight",
    "converting",
    "quantize_like",
    "quantized_kind",
    "read_quantized",
    "release_quantized",
    "write_quantized",
]
