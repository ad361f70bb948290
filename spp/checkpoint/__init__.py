"""Checkpoints on disk: save with a certificate, verify, measure, merge an adapter shard by shard, pack."""

from spp.checkpoint.converting import convert_checkpoint
from spp.checkpoint.export_report import ExportReport
from spp.checkpoint.exporting import export_dense, export_packed
from spp.checkpoint.merging import merge_checkpoint
from spp.checkpoint.packed import load_packed
from spp.checkpoint.saving import certify, save_model
from spp.checkpoint.verifying import sparsity, verify

__all__ = [
    "ExportReport",
    "certify",
    "convert_checkpoint",
    "export_dense",
    "export_packed",
    "load_packed",
    "merge_checkpoint",
    "save_model",
    "sparsity",
    "verify",
]
