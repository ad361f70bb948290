"""Reports in words: tables of what was pruned, merged, exported or verified, charts of them, and one page of a run."""

from __future__ import annotations

from spp.certifying.certificate import sparsity_table
from spp.evaluation.scores import tasks_table
from spp.files.tables import Table, byte_text, count_text, kind_of, time_text
from spp.merging.report import merge_table
from spp.pruning.report import pattern_text, prune_lines, prune_table, reconstruction_table
from spp.report.contents import RunReport
from spp.report.page import html_report
from spp.report.tables import export_table, survival_table, verdict_table

__all__ = [
    "RunReport",
    "Table",
    "byte_text",
    "count_text",
    "export_table",
    "html_report",
    "kind_of",
    "merge_table",
    "pattern_text",
    "prune_lines",
    "prune_table",
    "reconstruction_table",
    "sparsity_table",
    "survival_table",
    "tasks_table",
    "time_text",
    "verdict_table",
]
