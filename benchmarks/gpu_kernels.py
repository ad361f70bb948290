"""The kernels of a GPU by themselves: time, and bytes read and written a second, beside a copy of the same device.

Bytes are those that must move once: W or its packed form, W_eff, G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.adapted import SCALING
from spp.comparing import measure as harness
from spp.kernels.gpu import Work, gradient_step, work_for
from spp.report import Table
from spp.rules import get_rule
from spp.weights import PackedWeight
from spp.weights.base import DenseWeight, Weight

RULE = get_rule("spp")
CALLS = 20  # of a kernel between two looks at the clock: what starting one costs is hidden, as in a training step


def measure(weight: torch.Tensor, packed: PackedWeight, rank: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kernel.

    Args:
        weight: W (m, n) on a GPU; packed: the same.
    """
    (m, n), device, size = weight.shape, weight.device, weight.element_size()
    alpha, beta = torch.randn(rank, n, device=device), torch.randn(m, 1, device=device)
    factors = RULE.prepare((alpha, beta), SCALING, m, torch.float32)
    step = gradient_step(m, n, size, device)
    gradient = torch.randn(m, step, device=device, dtype=weight.dtype)
    grads = RULE.empty_grads(factors, (True, True))
    copy = torch.empty_like(weight)

    def works(source: Weight) -> Work:
        return work_for(RULE, source, factors)

    dense, small = works(DenseWeight(weight)), works(packed)
    part = slice(0, step)
    whole = slice(None)
    kernels: dict[str, tuple[Callable[[], object], int]] = {
        "copy of W": (lambda: copy.copy_(weight), 2 * weight.nbytes),
        "W_eff": (lambda: dense.effective(weight.dtype), 2 * weight.nbytes),
        "W_eff, packed": (lambda: small.effective(weight.dtype), packed.nbytes + weight.nbytes),
        "W, packed": (lambda: small.weight.block(whole, whole), packed.nbytes + weight.nbytes),
        f"dα, dβ of {step} columns": (
            lambda: dense.reduce(part, gradient, grads, accumulate=True),
            2 * gradient.nbytes,
        ),
        f"dα, dβ of {step} columns, packed": (
            lambda: small.reduce(part, gradient, grads, accumulate=True),
            packed.nbytes * step // n + gradient.nbytes,
        ),
    }
    samples = harness.interleave(
        {name: _repeat(call) for name, (call, _) in kernels.items()}, rounds=rounds, device=str(device)
    )
    rows = []
    for name, (_, size_in_bytes) in kernels.items():
        seconds = harness.spread([sample.wall / CALLS for sample in samples[name]])
        rows.append(
            {
                "bench": "gpu kernel",
                "kernel": name,
                "out_features": m,
                "in_features": n,
                "seconds": seconds.median,
                "bytes": size_in_bytes,
                "bytes_per_second": size_in_bytes / seconds.median,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    lines = [
        (
            f"{row['out_features']} × {row['in_features']}",
            row["kernel"],
            f"{row['seconds'] * 1e6:.1f} µs",
            f"{row['bytes_per_second'] / 1e9:.0f} GB/s",
        )
        for row in rows
    ]
    return Table("the kernels by themselves, medians", ("layer", "kernel", "time", "moved"), tuple(lines))


def _repeat(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run
