"""The functions of sparse.c on tensors: tiles of tokens, products with a block of W, the reduction of its gradient.

tiles     X (T, n) as [tile][n][width], `width` tokens a tile
update    U (m, n), what a rule changes W by, as the factors that it is a product of
block     rows [first, first + rows) of W, and as what it multiplies: W, W_eff or W_eff − W
"""

from __future__ import annotations

import ctypes
import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spp.kernels.native.compiler import DTYPES, SPARSE, Block, Refused, _declare, load
from spp.weights import PackedWeight
from spp.weights.base import workspace

KEYS = 64  # as in sparse.c: columns of W that one list of keys covers
MAX_VECTORS = 12
ALIGNMENT = 64  # bytes, of tiles and scratch
FROZEN, EFFECTIVE, DELTA = 0, 1, 2  # the forms of a block

SHARE_ELEMENTS = 2**20  # of W that a thread compresses at a time: non-zeros and keys stay in the last cache
MOST_ROWS, FEWEST_ROWS = 256, 32  # of them, so that a part of a tile is used often before the next one replaces it
TASKS = 4  # a thread, at least, where the layer is large enough: threads finish together
MOST_GROUPS = 8  # of KEYS columns that the reduction takes at a time
MOST_SUMS = 64  # of the left factor's gradient, each over a part of the columns


@dataclass
class Tiles:
    """X (T, n), repacked; `data` is in a workspace.

    Attributes:
        data: (tiles, n, width) float32. tokens: T. cols: n. width: tokens of a tile.
    """

    data: Tensor
    tokens: int
    cols: int
    width: int


@dataclass(frozen=True)
class Update:
    """U (m, n): row i of the g-th part of the rows (spp.rules.spp.row_groups) is Σ_k left[i, k] · right[g · terms + k].

    Attributes:
        left: (m, terms); right: (parts · terms, n); contiguous float32.
        adds: W_eff is W + U ⊙ [W ≠ 0]; else W ⊙ (1 + U).
    """

    left: Tensor
    right: Tensor
    adds: bool = False

    def facts(self) -> dict[str, Any]:
        """Return the fields of a block that say what U is."""
        terms = self.left.shape[1]
        return {
            "left": self.left.data_ptr(),
            "right": self.right.data_ptr(),
            "parts": len(self.right) // terms,
            "terms": terms,
            "adds": self.adds,
        }


class Products:
    """The compiled functions with torch's number of threads.

    Args:
        compiled: the C functions, as spp.kernels.native.compiler loads them.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.lanes: int = compiled.spp_lanes()
        self.threads = torch.get_num_threads()

    def tiles(self, tag: str, x: Tensor) -> Tiles:
        """Return x (T, n) float32 as tiles in the workspace of that tag."""
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        tokens, n = x.shape
        vectors = math.ceil(tokens / self.lanes)
        width = self.lanes * math.ceil(vectors / math.ceil(vectors / MAX_VECTORS))
        shape = (math.ceil(tokens / width), n, width)
        data = _aligned(f"{tag} tiles", math.prod(shape), torch.float32).view(shape)
        self.compiled.spp_pack(x.data_ptr(), tokens, n, x.stride(0), width, data.data_ptr(), self.threads)
        return Tiles(data, tokens, n, width)

    def product(self, tiles: Tiles, block: Block, out: Tensor, *, transposed: bool, add: bool) -> None:
        """Write X Wᵀ for the block's rows of W into `out` (T, rows), or X[:, rows] W into `out` (T, n).

        Args:
            tiles: of X (T, n), or `transposed` of X (T, m).
            out: float32 with unit stride along its last axis.
            add: to what is there, in the order in which one block would have added.
        """
        outs, inner = (block.cols, block.rows) if transposed else (block.rows, block.cols)
        share = min(MOST_ROWS, max(FEWEST_ROWS, _eights(SHARE_ELEMENTS // max(inner, 1))))
        share = max(FEWEST_ROWS, min(share, _eights(math.ceil(outs / (TASKS * self.threads)) + 7)))
        scratch = _scratch(self.threads * self.compiled.spp_product_scratch(share, inner, tiles.width))
        self.compiled.spp_product(
            tiles.data.data_ptr(), ctypes.byref(block), transposed, tiles.tokens, tiles.width, tiles.cols,
            out.data_ptr(), out.stride(0), add, share, scratch, self.threads,
        )  # fmt: skip

    def reduce(self, x: Tiles, dy: Tiles, block: Block, d_right: Tensor, d_left: Tensor) -> None:
        """Add the block's part to `d_right`, leftᵀ H in each part of the rows, and to `d_left`, which sums to H rightᵀ.

        Args:
            x, dy: of X (T, n) and dY (T, m).
            block: of form FROZEN, with the update.
            d_left: from `empty_sums`.
        """
        groups, span = math.ceil(block.cols / KEYS), _span(block.cols)
        across = max(1, min(MOST_GROUPS, groups // (2 * self.threads)))
        scratch = _scratch(self.threads * self.compiled.spp_reduce_scratch(MOST_ROWS))
        self.compiled.spp_reduce(
            x.data.data_ptr(), dy.data.data_ptr(), ctypes.byref(block), x.tokens, x.width, d_right.data_ptr(),
            d_left.data_ptr(), span, MOST_ROWS, math.ceil(across / span) * span, scratch, self.threads,
        )  # fmt: skip


def empty_sums(update: Update) -> Tensor:
    """Return zeros (sums, m, terms) for `Products.reduce`: as many sums as the shape of U says, whoever adds them."""
    cols = update.right.shape[1]
    return torch.zeros(math.ceil(math.ceil(cols / KEYS) / _span(cols)), *update.left.shape)


def block_of(weight: Tensor, first: int, all_rows: int, update: Update, form: int, rounded_to: torch.dtype) -> Block:
    """Return rows of a weight as sparse.c takes them; the tensors must outlive it.

    Args:
        weight: W[first : first + rows] with unit stride along its rows.
        update: of the whole layer.
        rounded_to: what W_eff is rounded to, after W's own dtype.
    """
    rows, cols = weight.shape
    return Block(
        weight=weight.data_ptr(), stride=weight.stride(0), rows=rows, cols=cols, first=first, all_rows=all_rows,
        dtype=DTYPES[weight.dtype], rounded_to=DTYPES[rounded_to], form=form, **update.facts(),
    )  # fmt: skip


def packed_block(packed: PackedWeight, update: Update, form: int, rounded_to: torch.dtype) -> Block | None:
    """Return all rows of a packed weight, to be decoded while they are compressed; None for codes with gaps.

    Args:
        packed: W, on the CPU. The rest as in `block_of`.
    """
    layout, starts = packed.layout, packed.starts
    if not packed.codes.is_contiguous():
        return None
    return Block(
        weight=packed.values.data_ptr(), codes=packed.codes.data_ptr(),
        starts=None if starts is None else starts.data_ptr(), rows=layout.rows, cols=layout.cols,
        all_rows=layout.rows, code_bytes=layout.row_bytes, stretches=layout.stretches, values=packed.values.numel(),
        row_values=layout.row_values if layout.is_nm else 0, kept=layout.kept, group=layout.group,
        dtype=DTYPES[packed.dtype], rounded_to=DTYPES[rounded_to], form=form,
        wide_starts=starts is not None and starts.dtype == torch.int64, **update.facts(),
    )  # fmt: skip


def _span(cols: int) -> int:
    """Return how many groups of KEYS columns one sum of the left factor's gradient is over."""
    return math.ceil(math.ceil(cols / KEYS) / MOST_SUMS)


def _eights(count: int) -> int:
    return count // 8 * 8


def _scratch(size: int) -> int:
    return _aligned("native", size, torch.uint8).data_ptr()


def _aligned(tag: str, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` elements of the workspace whose address is a multiple of ALIGNMENT."""
    spare = ALIGNMENT // dtype.itemsize
    buffer = workspace(tag, (count + spare,), dtype, torch.device("cpu"))
    start = -buffer.data_ptr() % ALIGNMENT // dtype.itemsize
    return buffer[start : start + count]


# ---- A small run of each compiled function against torch: a library that fails it is not used.

_log = logging.getLogger(__name__)

SHAPE = (19, 37, 75)  # T, m, n: nothing a multiple of a vector or of KEYS


def probe(library: Any) -> None:
    """Raise Refused unless the products and the reduction are what torch computes."""
    tokens, m, n = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randint(-3, 4, size, generator=generator).float() for size in ((tokens, n), (tokens, m), (m, n))
    )
    y, d_x = torch.empty(tokens, m), torch.empty(tokens, n)
    products = Products(library)
    x_tiles, dy_tiles = products.tiles("x", x), products.tiles("dy", dy)
    update = Update(torch.ones(m, 2), torch.tensor([[1.0], [2.0]]).expand(2, n).contiguous())
    block = block_of(weight, 0, m, update, FROZEN, torch.float32)
    products.product(x_tiles, block, y, transposed=False, add=False)
    products.product(dy_tiles, block, d_x, transposed=True, add=False)
    d_right, d_left = torch.zeros_like(update.right), empty_sums(update)
    products.reduce(x_tiles, dy_tiles, block, d_right, d_left)
    h = weight * (dy.T @ x)
    expected = (x @ weight.T, dy @ weight, update.left.T @ h, h @ update.right.T)  # whole numbers, in any order
    for name, found, wanted in zip(
        ("X Wᵀ", "dY W", "dα", "dβ"), (y, d_x, d_right, d_left.sum(0)), expected, strict=True
    ):
        if not torch.equal(found, wanted):
            raise Refused(f"the compiled {name} is not torch's on a small layer")


def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None where there is none: `why_not` says why."""
    return _load()[0]


def why_not() -> str | None:
    """Return why the compiled products cannot be had on this machine; None where they can."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        loaded = load(SPARSE)
        _declare(loaded)

        probe(loaded)
    except Refused as refusal:
        _log.info("products that skip zeros are not used: %s", refusal)
        return None, str(refusal)
    return loaded, None
