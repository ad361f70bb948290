"""Checkpoints on disk: save with a certificate, verify, measure, and merge an adapter shard by shard."""

from spp.checkpoint.converting import convert_checkpoint
from spp.checkpoint.merging import merge_checkpoint
from spp.checkpoint.packed import load_packed
from spp.checkpoint.saving import certify, save_model
from spp.checkpoint.verifying import sparsity, verify

__all__ = ["certify", "convert_checkpoint", "load_packed", "merge_checkpoint", "save_model", "sparsity", "verify"]
