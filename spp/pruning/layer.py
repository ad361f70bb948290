"""Which statistics each pruning method needs, and how it prunes one layer with them, in place.

relative error = ‖X (W − Ŵ)ᵀ‖_F / ‖X Wᵀ‖_F, over all experts of a fused weight together, where
‖X Dᵀ‖²_F = tr(D H Dᵀ) with H = XᵀX, or summed over sampled rows of X.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from spp.configs.pruning import Method
from spp.masks.dsnot import dsnot
from spp.masks.least_squares import fit_kept
from spp.masks.magnitude import magnitude_mask
from spp.masks.patterns import Pattern, nonzero_mask
from spp.masks.select import keep_by_rows, work_dtype
from spp.masks.sparsegpt import InverseFactor, inverse_factor, sparsegpt_factored
from spp.masks.stats import StatsCollector
from spp.masks.swaps import MAX_SWAPS, swap
from spp.masks.wanda import wanda_score
from spp.models.projection import Projection
from spp.pruning.report import LayerReport
from spp.weights.base import as_matrices

_NAMED = 8  # experts that a note names
_DAMPING = 0.01  # of least squares, as SparseGPT's
_FITTED = 0.1  # of the first residual: within 3 % of the lowest error (SmolLM2), for a third of the iterations
_DSNOT_THRESHOLD = 0.1  # of |ε| summed over the tokens of a window


class LayerInputs:
    """The statistics of the inputs of one or several layers that read the same tensor.

    Args:
        collector: their statistics.
        windows: calibration windows, by which the Hessian is scaled as its authors do.
    """

    def __init__(self, collector: StatsCollector, windows: int) -> None:
        self.collector = collector
        self._windows = windows
        self._hessian = collector.hessian()
        self._factor: InverseFactor | None = None

    @property
    def hessian(self) -> Tensor:
        """XᵀX (n, n), of a method that needs it."""
        assert self._hessian is not None
        return self._hessian

    def factor(self, where: str) -> InverseFactor:
        """Return the factor of the damped Hessian, computed once."""
        if self._factor is None:
            self._factor = inverse_factor(
                self.hessian * (2 / self._windows), where=f"the Hessian of the inputs of {where}"
            )
        return self._factor

    def dsnot_threshold(self) -> float:
        """Return DSnoT's threshold for ε = Σ W μ with the mean μ over tokens.

        The authors' code sums inputs over a window's tokens and compares that ε with 0.1.
        """
        return _DSNOT_THRESHOLD * self._windows / self.collector.count

    def square_norm(self, weight: Tensor) -> float:
        """Return ‖X Wᵀ‖²_F of a weight (m, n), on all inputs or on the sample."""
        w = weight.to(work_dtype(weight))
        if self._hessian is not None:
            w = w.to(self._hessian.dtype)
            return float(((w @ self._hessian) * w).sum().clamp_min(0))
        output = self.collector.sample().to(w.dtype) @ w.T  # (t, m)
        return float(output.square().sum())


@torch.no_grad()
def prune_layer(
    layer: Projection, inputs: Sequence[LayerInputs] | None, method: Method, pattern: Pattern, keep_zeros: bool = True
) -> LayerReport:
    """Prune a projection's weight in place, each expert as a matrix of its own; the Parameter stays the same object.

    Args:
        layer: what to prune.
        inputs: what is known of the inputs of each of its matrices; None, or none seen, prunes by magnitude.
        method: how.
        pattern: to what.
        keep_zeros: whether zeros that it has stay zeros, and are the first that count as pruned.
    """
    started = time.perf_counter()
    nonzero, matrices = nonzero_mask(layer.weight), layer.matrices()
    before = _share_of_zeros(nonzero)
    zeros: Sequence[Tensor | None] = [None] * len(matrices)
    if keep_zeros and before:
        zeros = as_matrices(nonzero.logical_not_(), transposed=layer.input_axis == -2)
    without: list[int] = []  # matrices that no token reached
    notes: dict[str, list[int]] = {}
    whole = lost = 0.0
    tokens = 0
    for number, weight in enumerate(matrices):
        known = inputs[number] if inputs is not None else None
        if known is None or known.collector.count == 0:
            without.append(number)
            weight.masked_fill_(~magnitude_mask(weight, pattern), 0)
            continue
        tokens += known.collector.count
        where = f"{layer.path}[{number}]" if layer.fused else layer.path
        pruned, note = _pruned(where, weight, known, method, pattern, zeros[number])
        if note:
            notes.setdefault(note, []).append(number)
        whole += known.square_norm(weight)
        lost += known.square_norm(weight - pruned)
        weight.copy_(pruned)
    if without and method.calibrated:
        notes["no calibration token reached it: pruned by magnitude"] = without
    measured = len(without) < len(matrices)
    return LayerReport(
        shape=(*layer.weight.shape[:-2], *matrices[0].shape),
        pattern=str(pattern),
        sparsity=_share_of_zeros(nonzero_mask(layer.weight)),
        sparsity_before=before,
        relative_error=((lost / whole) ** 0.5 if whole > 0 else 0.0) if measured else None,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        note="; ".join(_note(text, numbers, layer.fused) for text, numbers in notes.items()),
    )


def _note(text: str, numbers: Sequence[int], fused: bool) -> str:
    if not fused:
        return text
    shown = ", ".join(map(str, numbers[:_NAMED])) + (", …" if len(numbers) > _NAMED else "")
    return f"{len(numbers)} expert{'s' if len(numbers) > 1 else ''} ({shown}): {text}"


def _pruned(
    path: str, weight: Tensor, inputs: LayerInputs, method: Method, pattern: Pattern, zeros: Tensor | None
) -> tuple[Tensor, str]:
    """Return the pruned weight (m, n) and a note; `zeros`, bool (m, n), are those that must stay."""
    note, begun = "", None
    if method.mask == "sparsegpt":
        factor = inputs.factor(path)
        if factor.raised:
            note = f"damping raised to {factor.damping:g}"
        begun, mask = sparsegpt_factored(weight, factor, pattern, zeros=zeros)
    elif method.mask == "wanda":
        mask = keep_by_rows(wanda_score(weight, inputs.collector.stats().norm), pattern, zeros)
    else:  # by magnitude zeros go first
        mask = magnitude_mask(weight, pattern)
    if method.refined:
        mask = dsnot(weight, mask, inputs.collector.stats(), pattern, threshold=inputs.dsnot_threshold())
    if method.swapped:
        mask = swap(weight, inputs.hessian, mask, pattern, max_swaps=MAX_SWAPS)
    if begun is None or not method.updates or method.refined or method.swapped:  # another mask, the values of before
        begun = weight.masked_fill(~mask, 0)
    if method.fitted:
        kept = mask if zeros is None else mask & ~zeros
        return fit_kept(weight, inputs.hessian, kept, begun, damping=_DAMPING, tolerance=_FITTED), note
    return begun, note


def _share_of_zeros(nonzero: Tensor) -> float:
    return 1 - int(torch.count_nonzero(nonzero)) / max(1, nonzero.numel())
