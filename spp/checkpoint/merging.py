"""Merge adapters into a checkpoint shard by shard, by a few threads: pieces of tensors in memory, never the model.

    for each shard of the base: for each tensor: read → merge and check, or copy → write and hash; then the certificate

The tensors are bit for bit those of `spp.merge` in memory; what the adapter does not touch is copied byte for byte.
Experts that disk and memory keep apart or together are converted, merged and converted back, one weight at a time.
Whatever an adapter holds a layer for is merged and certified, the output head too, if it was adapted by name.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spp.base_values import NOT_COMPARABLE, OTHER, BaseVerdict, gravest
from spp.certificate import BaseRecord, Certificate, fingerprint
from spp.checkpoint.adapters import AdapterLike, read_parts
from spp.checkpoint.carrying import refuse_overlap
from spp.checkpoint.merge_state import Merging
from spp.checkpoint.places import Places
from spp.checkpoint.shards import output, write_shards
from spp.checkpoint.sources import checkpoint_directory
from spp.errors import AdapterError, MaskError, SPPWarning
from spp.files import CheckpointReader
from spp.merge_model import check_rounding, draw_seed
from spp.merge_report import MergeReport
from spp.rules.idle import idle_reason

logger = logging.getLogger(__name__)


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: AdapterLike,
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    strict_values: bool = False,
) -> MergeReport:
    """Merge an adapter into a pruned checkpoint; the output appears whole, checked and certified, or not at all.

    What lies beside the weights goes along (config, tokenizer, remote code, …), but not README.md, the base's card.
    Not promised: that the base is what its own certificate says, which `spp.verify` checks.

    Args:
        base_dir: the pruned checkpoint (safetensors), or a hub id.
        adapter_dir: the adapter, ours or the SPP authors', or a hub id; or several with a weight each,
            [("a", 0.7), ("b", 0.3)]: of their weighted sum, W · (1 + Σ_t w_t·(s_t·β_t) · A_t) is rounded once. Their
            layers and ranks need not be the same.
        out_dir: a directory outside all of these that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        rounding: "nearest" or "stochastic"; as for `spp.merge`.
        seed: of stochastic rounding; None draws one from torch's global generator.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.
        dry_run: do and check everything, and write nothing.
        strict_values: refuse a base whose values are known not to be those that an adapter was trained on, instead of
            warning. One that is quantized or of another dtype than in training, so that there is nothing to compare,
            and an adapter that does not say are never refused (spp.base_values).

    Returns:
        MergeReport, its layers by module path; `base` says whether the base has the values that were trained on.

    Raises:
        AdapterError: an adapter does not fit; all missing, unexpected and misshapen layers in one message. With
            `strict_values`, the base has other values.
        MaskError: the base's zeros are not those that an adapter was trained on, or a merge would change one.
        NonFiniteError: NaN or infinity in an adapter, a projection or a result.
        CheckpointError: files are bad, or projections of the base are stored so that their zeros cannot be read.
        ConfigError: `out_dir` is, contains or lies inside a source, or an option or an adapter's config is wrong.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.merge_checkpoint("pruned-2of4", "adapter", "tuned-2of4").survived  # doctest: +SKIP
        0.98
    """
    check_rounding(dtype, rounding)
    base, parts = checkpoint_directory(base_dir), read_parts(adapter_dir)
    refuse_overlap(Path(out_dir), base, "the base")
    for part in parts:
        refuse_overlap(Path(out_dir), part.files.source, "the adapter")
    with CheckpointReader(base) as reader:
        merging = Merging(reader, Places(reader, parts), parts, dtype, rounding, draw_seed(rounding, seed))
        with output(merging, out_dir, overwrite=overwrite, dry_run=dry_run) as directory:
            write_shards(merging, directory, "merging", card=False)  # another model: its card is not the base's
            _require_all_merged(merging)
            verdicts = merging.verdicts()
            _require_values(verdicts, strict=strict_values)
            certificate = _certificate(merging, base_dir)
            if directory is not None:
                certificate.write(directory)
    logger.info("merged %d layers%s", len(merging.merges), "" if dry_run else f" into {out_dir}")
    for verdict in verdicts:
        if verdict.state == OTHER:
            warnings.warn(verdict.message, SPPWarning, stacklevel=2)
        elif verdict.state == NOT_COMPARABLE:
            logger.info(verdict.message)
    idle = idle_reason((layer.rule, layer.params, layer.scaling) for layer in merging.layers.values())
    report = MergeReport.from_layers(dict(sorted(merging.merges.items())), certificate.report(), idle=idle)
    return replace(report, base=gravest(verdicts))


def _require_all_merged(merging: Merging) -> None:
    left = sorted(merging.layers.keys() - merging.merges.keys())
    if left:
        sources = ", ".join(str(part.files.source) for part in merging.parts)
        raise AdapterError(f"the adapter in {sources} was not merged into {', '.join(left)}")


def _require_values(verdicts: Sequence[BaseVerdict], *, strict: bool) -> None:
    others = [verdict.message for verdict in verdicts if verdict.state == OTHER]
    if strict and others:
        raise AdapterError(f"{'; '.join(others)}; merge it there. Nothing was written")


def _certificate(merging: Merging, base: str | os.PathLike[str]) -> Certificate:
    record = BaseRecord(os.fspath(base), fingerprint(merging.base_masks))
    certificate = merging.certificate(record)
    if certificate.fingerprint() != record.fingerprint:
        raise MaskError(
            "the masks of the merged checkpoint do not reproduce the base's fingerprint; nothing was written"
        )
    return certificate
