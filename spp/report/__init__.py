"""Reports in words: tables of what was pruned, merged, exported or verified, and charts of them."""

from __future__ import annotations

from spp.report.tables import (
    Table,
    byte_text,
    count_text,
    export_table,
    kind_of,
    merge_table,
    pattern_text,
    prune_lines,
    prune_table,
    sparsity_table,
    survival_table,
    tasks_table,
    time_text,
    verdict_table,
)

__all__ = [
    "Table",
    "byte_text",
    "count_text",
    "export_table",
    "kind_of",
    "merge_table",
    "pattern_text",
    "prune_lines",
    "prune_table",
    "sparsity_table",
    "survival_table",
    "tasks_table",
    "time_text",
    "verdict_table",
]
