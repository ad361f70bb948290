"""PackedWeight and PackedStack: the tensors of a packed matrix, or of experts, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.masks.patterns import as_array, count_kept, pack_bits
from spp.weights.base import FLOATS, Weight
from spp.weights.packed.decode import as_rows, decode_anywhere, decode_cpu
from spp.weights.packed.layout import STRETCH, Layout, layout_of_bits, pack_tensor, stretch_counts

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
        return (self.values, self.codes) if self.starts is None else (self.values, self.codes, self.starts)

    def _misshapen(self, layout: Layout, *experts: int) -> str | None:
        """Return which tensor has not the shape that a layout gives it; None where all have."""
        shapes = {"codes": (self.codes, (*experts, layout.rows, layout.row_bytes))}
        if layout.is_nm:
            shapes["values"] = (self.values, (*experts, layout.rows, layout.row_values))
        if self.starts is not None:
            shapes["starts"] = (self.starts, (*experts, layout.rows, layout.stretches))
        wrong = ((name, t.shape, shape) for name, (t, shape) in shapes.items() if t.shape != shape)
        return next((f"{name} is {tuple(found)}, expected {shape}" for name, found, shape in wrong), None)

    def bounds(self) -> Tensor:
        return self.values

    def entries(self) -> Tensor:
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
            bits = pack_bits(weight)
            layout = layout_of_bits(bits, weight.shape[0], weight.shape[1], weight.element_size())
            return cls(layout, *pack_tensor(weight, layout, count_kept(bits)))

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
        return partial(PackedWeight, self.layout)

    def check(self, where: str = "the packed weight") -> None:
        """Raise a ConfigError unless the tensors belong together: their shapes, and places that lie inside."""
        problem = self._problem()
        if problem:
            raise ConfigError(f"{where}: {problem}; values, codes and starts must come from the same packed matrix")

    def _problem(self) -> str | None:
        layout = self.layout
        if problem := self._misshapen(layout):
            return problem
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


# ---- The pruned matrices of E experts, packed one by one in a common layout.
#
#     values    as of a matrix (spp.weights.packed.layout); N:M: (E, m, N·n / M); any pattern: (k,), one expert's after
#               another's
#     codes     uint8 (E, m, B)
#     starts    (E, m, S), each expert's counted from its own first value; any pattern only
#
# An expert's part of each is a view, and these views are a packed matrix: whatever decodes one decodes an expert.


@dataclass(frozen=True)
class StackLayout:
    """The facts that are needed to read the tensors of packed experts.

    Args:
        matrix: of one expert's W (m, n).
        experts: E.
        transposed: whether the dense weight is stored (E, n, m), not (E, m, n).
    """

    matrix: Layout
    experts: int
    transposed: bool = False

    def __str__(self) -> str:
        return str(self.matrix)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the dense weight as it is stored."""
        m, n = self.matrix.rows, self.matrix.cols
        return (self.experts, n, m) if self.transposed else (self.experts, m, n)


class PackedStack(PackedTensors):
    """The packed weight W (E, m, n) of E experts.

    Args:
        layout: how to read the tensors.
        values, codes, starts: as above.

    Example:
        >>> weight = torch.tensor([[[0.0, 1.5, 0.0, 2.0]], [[3.0, 0.0, 0.0, 4.0]]])
        >>> packed = PackedStack.pack(lambda expert: weight[expert], experts=2)
        >>> packed.experts()[1].values.tolist(), bool(torch.equal(packed.dense(), weight))
        ([[3.0, 4.0]], True)
    """

    def __init__(self, layout: StackLayout, values: Tensor, codes: Tensor, starts: Tensor | None = None) -> None:
        self.layout, self.input_axis = layout, -2 if layout.transposed else -1
        self._hold((layout.experts, layout.matrix.rows, layout.matrix.cols), values, codes, starts)

    @classmethod
    def pack(
        cls, get: Callable[[int], Tensor], experts: int, *, transposed: bool = False, where: str = "the weight"
    ) -> PackedStack:
        """Pack matrices of one shape, dtype and device; each is asked for twice, and no two of them need to be there.

        Args:
            get: returns an expert's W (m, n), as `PackedWeight.pack` takes it.
            experts: E, at least 1.
            transposed: how the dense weight is stored (`StackLayout`).
            where: its name in messages.

        Raises:
            ConfigError: as for `PackedWeight.pack`.
        """
        with torch.inference_mode(False):
            bits = [pack_bits(check_matrix(get(expert), f"{where}[{expert}]")) for expert in range(experts)]
            kept = [count_kept(part) for part in bits]
            first = get(0)
            rows, cols = first.shape
            layout = layout_of_bits(_joined(bits, rows * cols), experts * rows, cols, first.element_size())
            matrix = Layout(rows, cols, layout.kept, layout.group)
            shape = (experts, rows, matrix.row_values) if matrix.is_nm else (sum(kept),)
            values = torch.empty(shape, dtype=first.dtype, device=first.device)
            codes = torch.empty((experts, rows, matrix.row_bytes), dtype=torch.uint8, device=first.device)
            starts = None
            if not matrix.is_nm:
                wide = torch.int64 if max(kept) >= 2**31 else torch.int32
                starts = torch.empty((experts, rows, matrix.stretches), dtype=wide, device=first.device)
            stack, place = cls(StackLayout(matrix, experts, transposed), values, codes, starts), 0
            for expert in range(experts):
                part, codes[expert], begins = pack_tensor(get(expert), matrix, kept[expert])
                if starts is None or begins is None:
                    values[expert] = part
                else:
                    values[place : place + kept[expert]] = part
                    starts[expert] = begins
                place += kept[expert]
            return stack

    @classmethod
    def of_rows(cls, packed: PackedWeight, experts: int, *, transposed: bool = False) -> PackedStack:
        """Return the experts that are one below the other in a packed matrix (E · m, n); tensors are copied."""
        whole, rows = packed.layout, packed.layout.rows // experts
        matrix = Layout(rows, whole.cols, whole.kept, whole.group)
        codes = packed.codes.clone().view(experts, rows, whole.row_bytes)
        layout = StackLayout(matrix, experts, transposed)
        if packed.starts is None:
            return cls(layout, packed.values.clone().view(experts, rows, whole.row_values), codes)
        starts = packed.starts.clone().view(experts, rows, whole.stretches)
        return cls(layout, packed.values.clone(), codes, starts - starts[:, :1, :1])

    def experts(self) -> list[PackedWeight]:
        matrix, codes = self.layout.matrix, self.codes.unbind(0)
        if self.starts is None:
            return [PackedWeight(matrix, *pair) for pair in zip(self.values.unbind(0), codes, strict=True)]
        parts = self.values.split(self._counts())
        return [PackedWeight(matrix, *three) for three in zip(parts, codes, self.starts.unbind(0), strict=True)]

    def decode(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        for packed, into in zip(self.experts(), out.unbind(0), strict=True):
            packed.decode(rows, cols, into)
        return out

    def dense(self) -> Tensor:
        """Return the weight as it is stored, a new tensor; of a transposed one, one expert's copy exists beside it."""
        if not self.layout.transposed or self.is_meta:
            return super().dense()
        out = torch.empty(self.layout.shape, dtype=self.dtype, device=self.device)
        for packed, into in zip(self.experts(), out.unbind(0), strict=True):
            into.copy_(packed.matrix().T)
        return out

    def maker(self) -> Callable[..., Weight]:
        return partial(PackedStack, self.layout)

    def check(self, where: str = "the packed weight") -> None:
        """Raise a ConfigError unless the tensors belong together, as `PackedWeight.check` does of each expert's."""
        experts, is_meta = self.layout.experts, self.codes.is_meta
        problem = self._misshapen(self.layout.matrix, experts)
        if not (problem or self.starts is None or is_meta) and (kept := sum(self._counts())) != len(self.values):
            problem = f"the masks keep {kept} weights, but there are {len(self.values)} values"
        if problem:
            raise ConfigError(
                f"{where}: {problem}, for {experts} experts; values, codes and starts must come from the same packed "
                f"weight"
            )
        if not is_meta:
            for number, packed in enumerate(self.experts()):
                packed.check(f"{where}[{number}]")

    def _counts(self) -> list[int]:
        """Return how many weights each expert keeps, any pattern."""
        assert self.starts is not None
        experts, rows, stretches = self.starts.shape
        if not rows or not stretches:
            return [0] * experts
        last = as_array(self.codes[:, -1, (stretches - 1) * STRETCH // 8 :].cpu())
        begins = self.starts[:, -1, -1].tolist()
        return [begin + int(count) for begin, count in zip(begins, stretch_counts(last)[:, 0], strict=True)]


def _joined(parts: list[npt.NDArray[np.uint8]], count: int) -> npt.NDArray[np.uint8]:
    """Return the packed bits of matrices of `count` weights, one behind the other."""
    if count % 8 == 0:
        return np.concatenate(parts)
    return np.packbits(np.concatenate([np.unpackbits(part, count=count) for part in parts]))
