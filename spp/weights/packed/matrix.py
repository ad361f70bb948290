"""PackedWeight: the tensors of a packed matrix and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.masks.patterns import as_array
from spp.weights.base import FLOATS, Weight
from spp.weights.packed.decode import as_rows, decode_anywhere, decode_cpu
from spp.weights.packed.layout import Layout
from spp.weights.packed.packing import choose_layout, pack_tensor, stretch_counts

DTYPES = tuple(FLOATS.values())


class PackedTensors(Weight):
    """The tensors of a packed matrix, or of a stack of them."""

    values: Tensor
    codes: Tensor
    starts: Tensor | None

    def _hold(self, shape: tuple[int, ...], values: Tensor, codes: Tensor, starts: Tensor | None) -> None:
        self.shape, self.dtype, self.device = shape, values.dtype, values.device
        self.values, self.codes, self.starts = values, codes, starts

    def tensors(self) -> tuple[Tensor, ...]:
        """Return (values, codes), for any pattern (values, codes, starts)."""
        return (self.values, self.codes) if self.starts is None else (self.values, self.codes, self.starts)

    def bounds(self) -> Tensor:
        """Return the values, zeros among them."""
        return self.values

    def entries(self) -> Tensor:
        """Return the values, zeros among them."""
        return self.values


# A decoder fills `out` faster than torch does, on some device, and returns True, or leaves it and returns False.
Decoder = Callable[["PackedWeight", slice, slice, Tensor], bool]
_decoders: list[Decoder] = []


def add_decoder(decoder: Decoder) -> None:
    """Let a backend decode blocks of packed matrices that are not on a CPU."""
    _decoders.append(decoder)


class PackedWeight(PackedTensors):
    """A pruned matrix W (m, n) as kept values and codes; what they are, `spp.weights.packed.layout` says.

    Args:
        layout: how to read the tensors.
        values: kept weights, (k,), for N:M (m, N·n / M).
        codes: uint8 (m, B).
        starts: int32 or int64 (m, S); None for N:M.

    Example:
        >>> weight = torch.tensor([[0.0, 1.5, 0.0, 2.0]])
        >>> packed = PackedWeight.pack(weight)
        >>> packed.values.tolist(), bool(torch.equal(packed.dense(), weight))
        ([[1.5, 2.0]], True)
    """

    def __init__(self, layout: Layout, values: Tensor, codes: Tensor, starts: Tensor | None = None) -> None:
        self.layout = layout
        self._hold((layout.rows, layout.cols), values, codes, starts)

    @classmethod
    def pack(cls, weight: Tensor, where: str = "the weight") -> PackedWeight:
        """Pack a matrix of any pattern; the result is on its device and shares no memory with it.

        Args:
            weight: (m, n), float64, float32, bfloat16 or float16; NaN and infinity are kept like any number.
            where: its name in messages.

        Raises:
            ConfigError: it is no such matrix, or on the meta device and has no values.
        """
        check_matrix(weight, where)
        with torch.inference_mode(False):
            layout, kept = choose_layout(weight)
            return cls(layout, *pack_tensor(weight, layout, kept))

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return it on a device."""
        return PackedWeight(self.layout, *(t.to(device) for t in self.tensors()))

    def decode(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """Write W[rows, cols] into `out`, bit for bit what was packed but for −0.0, which comes back as 0.0."""
        rows, cols = as_rows(rows, self.layout.rows), as_rows(cols, self.layout.cols)
        decoder = decode_cpu if self.device.type == "cpu" else decode_anywhere
        decoder(self.layout, self.values, self.codes, self.starts, rows, cols, out)
        return out

    def block(self, rows: slice, cols: slice) -> Tensor:
        """Decode W[rows, cols] into the shared workspace, by the fastest decoder that there is for the device."""
        if self.device.type != "cpu":
            out = self._scratch(rows, cols)
            if any(decode(self, rows, cols, out) for decode in _decoders):
                return out
        return super().block(rows, cols)

    def maker(self) -> Callable[..., Weight]:
        """Return a function that knows the layout."""
        return partial(PackedWeight, self.layout)

    def check(self, where: str = "the packed weight") -> None:
        """Raise a ConfigError unless the tensors belong together: their shapes, and places that lie inside.

        Args:
            where: its name in messages.
        """
        problem = self._problem()
        if problem:
            raise ConfigError(f"{where}: {problem}; values, codes and starts must come from the same packed matrix")

    def _problem(self) -> str | None:
        layout = self.layout
        shapes = {"codes": (self.codes, (layout.rows, layout.row_bytes))}
        if layout.is_nm:
            shapes["values"] = (self.values, (layout.rows, layout.row_values))
        if self.starts is not None:
            shapes["starts"] = (self.starts, (layout.rows, layout.stretches))
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                return f"{name} is {tuple(tensor.shape)}, expected {shape}"
        if self.codes.is_meta or not self.codes.numel():
            return None
        codes = as_array(self.codes.cpu())
        if layout.is_nm:
            groups = np.unpackbits(codes, axis=1)[:, : layout.cols].reshape(-1, layout.group)
            wrong = int((groups.sum(1, dtype=np.int16) != layout.kept).sum())
            return f"{wrong} groups of {layout.group} do not have {layout.kept} values" if wrong else None
        counts = stretch_counts(codes).reshape(-1)
        total = int(counts.sum())
        if total != self.values.numel():
            return f"the mask keeps {total} weights, but there are {self.values.numel()} values"
        assert self.starts is not None
        begins = (np.cumsum(counts) - counts).reshape(layout.rows, layout.stretches)
        return None if np.array_equal(begins, as_array(self.starts.cpu())) else "starts are not where the mask says"


def check_matrix(weight: Tensor, where: str) -> Tensor:
    """Return W (m, n), if it can be packed.

    Raises:
        ConfigError: it is no matrix of a known dtype, or on the meta device.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        raise ConfigError(
            f"{where} has shape {tuple(weight.shape)} and dtype {weight.dtype}; what is packed is a matrix of "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
        )
    if weight.is_meta:
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
    return weight
