"""The functions of sparse.c on tensors, and the backend that they make.

tiles     X (T, n) as [tile][n][width], `width` tokens a tile
update    U (m, n), what a rule changes W by, as the factors that it is a product of
block     rows [first, first + rows) of W, and as what it multiplies: W, W_eff or W_eff − W
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.kernels.backend import Backend, Gradients, Needs, Operation, density, product_dtype, row_step, slices
from spp.kernels.choice import VARIABLE, kernels
from spp.kernels.native.compiler import DTYPES, SPARSE, Block, Refused, _declare, prepared
from spp.rules.adapter import WHOLE
from spp.rules.low_rank import LowRankFactors
from spp.rules.spp import Factors
from spp.weights import PackedWeight
from spp.weights.base import Weight, workspace

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
    """X (T, n), repacked: `data` (tiles, n, width) float32 in a workspace, `width` tokens a tile."""

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
    """The compiled functions with torch's number of threads."""

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
    return torch.zeros(math.ceil(math.ceil(cols / KEYS) / _span(cols)), *update.left.shape, device="cpu")


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
    """Return all rows of a packed weight, to be decoded while they are compressed; None for codes with gaps."""
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

SHAPE = (19, 37, 75)  # T, m, n: nothing a multiple of a vector or of KEYS


def probe(library: Any) -> None:
    """Declare the functions; raise Refused unless the products and the reduction are what torch computes."""
    _declare(library)
    tokens, m, n = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randint(-3, 4, size, generator=generator, device="cpu").float()
        for size in ((tokens, n), (tokens, m), (m, n))
    )
    y, d_x = torch.empty(tokens, m, device="cpu"), torch.empty(tokens, n, device="cpu")
    products = Products(library)
    x_tiles, dy_tiles = products.tiles("x", x), products.tiles("dy", dy)
    update = Update(
        torch.ones(m, 2, device="cpu"), torch.tensor([[1.0], [2.0]], device="cpu").expand(2, n).contiguous()
    )
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
    return prepared(SPARSE, probe, "products that skip zeros are not used")


# ---- The adapted layer by these products: what kernels/cpu.py computes, without the zeros of W.

RULES = ("spp", "hira", "masked_lora")
FEWEST_TOKENS = 33  # below, passes over W cost more than the products; and evaluation keeps W_eff (layers/adapted.py)
MOST_KEPT = 0.6  # of the weights; measured: at 50 % the products take 0.7 of the dense ones' time, at 60 % about 0.85


class Native(Backend):
    """The compiled products, for the rules of RULES in float32; it tells backward nothing."""

    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether the layer is pruned and large enough; SPP_KERNELS=native means wherever it can be computed."""
        choice, weight = kernels(), operation.weight
        if choice not in ("auto", "native") or weight.device.type != "cpu":
            return False
        plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, *weight.tensors()))  # no stand-in, no shard
        possible = (
            operation.rule.name in RULES
            and plain
            and product_dtype(x.dtype, x.device) == torch.float32
            and weight.dtype in DTYPES
            and operation.dtype in DTYPES
            and min(weight.shape) > 0
        )
        if choice == "native":
            if possible and why_not():
                raise ConfigError(f"{VARIABLE}=native: {why_not()}; use auto or torch")
            return possible
        worth_it = possible and len(x) >= FEWEST_TOKENS and density(weight) <= MOST_KEPT
        return worth_it and library() is not None

    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, None]:
        """Return Y (T, m); with input dropout two products, of W and of W′ = W_eff − W."""
        y = torch.empty(len(x), operation.weight.shape[0], device="cpu")
        if not len(x):
            return y, None
        products, update = Products(library()), _update(operation)
        if dropped is None:
            terms = [(EFFECTIVE, x, operation.dtype)]
        else:
            terms = [(FROZEN, x, operation.weight.dtype), (DELTA, dropped, operation.weight.dtype)]
        for form, operand, rounded_to in terms:
            tiles = products.tiles("x", operand.float())
            for first, block in _blocks(operation.weight, update, form, rounded_to):
                products.product(tiles, block, y[:, first:], transposed=False, add=form == DELTA)
        return y if bias is None else y.add_(bias), None

    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        """Return dX (T, n) and dθ, of which H has X̃ for X."""
        dy, x, update = dy.float(), x.float(), _update(operation)
        products = Products(library())
        dy_tiles = products.tiles("dy", dy) if len(x) else None
        d_x = None
        if needs.x and kept is None:
            d_x = _times_weight(products, dy_tiles, x.shape, operation, update, EFFECTIVE)
        elif needs.x and kept is not None:
            d_x = _times_weight(products, dy_tiles, x.shape, operation, update, FROZEN)
            spread = _times_weight(products, dy_tiles, x.shape, operation, update, DELTA)
            d_x.addcmul_(spread, kept.float(), value=operation.keep_scale)
        if not any(needs.params):
            return d_x, [None] * len(needs.params)
        d_right, d_left = torch.zeros_like(update.right), empty_sums(update)
        if dy_tiles is not None:
            dropped = x if kept is None else (x * kept).mul_(operation.keep_scale)
            x_tiles = products.tiles("x", dropped)
            for _, block in _blocks(operation.weight, update, FROZEN, operation.weight.dtype):
                products.reduce(x_tiles, dy_tiles, block, d_right, d_left)
        grads = (d_right, d_left.sum(0).mul_(operation.factors.scaling))
        return d_x, [grad if needed else None for grad, needed in zip(grads, needs.params, strict=True)]


def _times_weight(
    products: Products, dy: Tiles | None, shape: torch.Size, operation: Operation, update: Update, form: int
) -> Tensor:
    """Return dY times a form of W (T, n)."""
    out = torch.zeros(shape, device="cpu")
    rounded_to = operation.dtype if form == EFFECTIVE else operation.weight.dtype
    if dy is not None:
        for first, block in _blocks(operation.weight, update, form, rounded_to):
            products.product(dy, block, out, transposed=True, add=first > 0)
    return out


def _update(operation: Operation) -> Update:
    """Return U of a rule of RULES, whose parameters are its right and its left factor, the latter without s."""
    factors: Factors | LowRankFactors = operation.factors
    if isinstance(factors, Factors):
        left, right = factors.scaled_beta, factors.alpha
    else:
        left, right = factors.scaled_b, factors.a
    return Update(left.contiguous(), right.contiguous(), adds=not operation.rule.multiplies)


def _blocks(weight: Weight, update: Update, form: int, rounded_to: torch.dtype) -> Iterator[tuple[int, Block]]:
    """Yield (first row, block): all of what is stored by rows, else rows decoded or copied, a block each."""
    m, n = weight.shape
    if isinstance(weight, PackedWeight):
        whole = packed_block(weight, update, form, rounded_to)
        if whole is not None:
            yield 0, whole
            return
    step = m
    if not weight.is_tensor or weight.block(WHOLE, WHOLE).stride(1) != 1:
        step = row_step(m, n, 1)
    for rows in slices(m, step):
        values = weight.block(rows, WHOLE)
        if values.stride(1) != 1:
            values = workspace("native weight", tuple(values.shape), values.dtype, values.device).copy_(values)
        yield rows.start, block_of(values, rows.start, m, update, form, rounded_to)
