"""Tables of exports and verdicts; those of zeros, merges and pruning are beside their reports.

A model has hundreds of projections, so a table groups them by the last parts of their names (`self_attn.q_proj`, …)
unless every one is asked for. Sparsity is a fraction, never a percentage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spp.files.tables import Table, byte_text, grouped, joined, kind_of, spread

if TYPE_CHECKING:
    from spp.certifying.certificate import TensorSparsity
    from spp.certifying.verify import Survival, Verification
    from spp.packing.export import ExportReport


def verdict_table(verification: Verification, *, every: bool = False) -> Table:
    """Return the findings of a verification as a table.

    The column verdict has "ok", or what is wrong; zeros, patterns and dtypes are those that were found. Tensors of
    which only the bytes were compared have a verdict alone.

    Args:
        verification: of `spp.certifying.verify.examine`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(verdict_table(examine("pruned", "merged")).text())  # doctest: +SKIP
    """
    name, against = verification.name, verification.against or "its certificate"
    general = [("", "", "", "", problem.what) for problem in verification.of("")]
    if every:
        rows = [
            (key, *(_found(facts) if facts else ("", "", "")), _verdict(verification, [key], every=True))
            for key, facts in verification.tensors.items()
        ]
        columns: tuple[str, ...] = ("tensor", "dtype", "sparsity", "pattern", "verdict")
        return Table(f"{name} against {against}", columns, (*rows, *general))
    groups: dict[str, list[str]] = {}
    for key, facts in verification.tensors.items():
        groups.setdefault(kind_of(key) if facts else "other", []).append(key)
    rows = []
    for kind, keys in groups.items():
        found = [facts for key in keys if (facts := verification.tensors[key]) is not None]
        sparsity = spread([facts.sparsity for facts in found], "{:.4f}".format)
        pattern = joined(facts.pattern for facts in found)
        rows.append((kind, str(len(keys)), sparsity, pattern, _verdict(verification, keys)))
    columns = ("projection", "tensors", "sparsity", "pattern", "verdict")
    return Table(f"{name} against {against}", columns, (*rows, *general))


def survival_table(verification: Verification, *, every: bool = False) -> Table:
    """Return what became of the zeros of the weights that are quantized as a table.

    Its columns are zeros: before; survived: of these; came back: the others, which the quantization has filled; more:
    weights that it rounded to zero. The last row is of all.

    Args:
        verification: of `spp.certifying.verify.examine`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(survival_table(examine("pruned", "quantized")).text())  # doctest: +SKIP
    """
    groups: dict[str, list[Survival]] = {}
    for key, one in verification.survival.items():
        groups.setdefault(key if every else kind_of(key), []).append(one)
    groups["all"] = list(verification.survival.values())
    rows = []
    for name, members in groups.items():
        zeros, survived = sum(one.zeros for one in members), sum(one.survived for one in members)
        counts = map(str, (len(members), zeros, survived, zeros - survived, sum(one.more for one in members)))
        rows.append((name, joined(one.form for one in members), *counts))
    columns = ("quantized", "form", "tensors", "zeros", "survived", "came back", "more")
    return Table(f"zeros of {verification.against} in {verification.name}", columns, tuple(rows))


def _found(facts: TensorSparsity) -> tuple[str, str, str]:
    return facts.dtype, f"{facts.sparsity:.4f}", facts.pattern


def _verdict(verification: Verification, keys: Sequence[str], *, every: bool = False) -> str:
    bad = [key for key in keys if verification.of(key)]
    if not bad:
        return "ok"
    if every or len(keys) == 1:
        return "; ".join(problem.what for problem in verification.of(bad[0]))
    return f"{len(bad)} of {len(keys)} not as they should be"


def export_table(report: ExportReport, *, every: bool = False) -> Table:
    """Return the sizes of packed tensors, dense and packed, as a table.

    Args:
        report: of `spp.export_packed` or `spp.export_dense`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(export_table(spp.export_packed("pruned", "packed")).text())  # doctest: +SKIP
    """
    groups = {name: [t] for name, t in report.tensors.items()} if every else grouped(report.tensors)
    rows = []
    for name, tensors in [*groups.items(), ("all", list(report.tensors.values()))]:
        dense, packed = sum(t.dense_bytes for t in tensors), sum(t.packed_bytes for t in tensors)
        sizes = (byte_text(dense), byte_text(packed), f"{packed / dense:.4f}")
        rows.append((name, str(len(tensors)), joined(t.pattern for t in tensors), *sizes))
    return Table(
        "pruned weights, dense and packed",
        ("tensor", "tensors", "pattern", "dense", "packed", "packed / dense"),
        tuple(rows),
    )
