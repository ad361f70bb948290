"""Prove that zeros stayed zeros: a checkpoint against its certificate, or one model against another."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from spp.certificate import (
    Certificate,
    SparsityReport,
    TensorRecord,
    certify_tensor,
    report_from_tensors,
)
from spp.checkpoint.sources import ModelOrPath, Source, checkpoint_directory, open_source
from spp.errors import CheckpointError, ConfigError, MaskError, NonFiniteError
from spp.files import CheckpointReader, content_sha256
from spp.packed.disk import DenseReader
from spp.patterns import all_finite, count_kept, pack_bits

PRUNED_FROM = 0.1  # the fraction of zeros from which a matrix that is no projection by its name counts as pruned


def sparsity(model_or_dir: ModelOrPath) -> SparsityReport:
    """Count the zeros of every projection weight.

    Args:
        model_or_dir: a model (of a wrapped one, its frozen weights count), a checkpoint directory or a hub id.

    Returns:
        SparsityReport; a tensor with NaN or infinity has valid=False.

    Raises:
        CheckpointError: the files are bad.

    Example:
        >>> spp.sparsity("pruned-2of4").pattern  # doctest: +SKIP
        '2:4'
    """
    with open_source(model_or_dir) as source:
        return report_from_tensors((name, source.get(name), axis) for name, axis in source.axes.items())


def verify(before: ModelOrPath, after: ModelOrPath | None = None, *, deep: bool = False) -> SparsityReport:
    """Check a checkpoint against its certificate, or that two models have the same zeros in every projection.

    Two models are compared in all projections, and in every other matrix of `before` (such as an output head; not an
    embedding) of which a tenth or more is zero. A certificate names its tensors: the projections, and what was merged.

    Args:
        before: with `after` a model, a directory or a hub id (of a wrapped model, its frozen weights count); alone, a
            directory with a certificate.
        after: what must have the zeros of `before`. Values and dtypes may differ.
        deep: compare the sha256 of contents too (needs a certificate that was made with deep=True).

    Returns:
        The report on what was compared of `after`, or on what the certificate names.

    Raises:
        MaskError: zeros differ; every differing tensor is listed, sorted, with what became non-zero and zero.
        NonFiniteError: a weight holds NaN or infinity.
        CheckpointError: files are bad, or contents are not what the certificate says.

    Example:
        >>> spp.verify("pruned-2of4", "tuned-2of4").sparsity  # doctest: +SKIP
        0.5
    """
    if after is not None:
        if deep:
            raise ConfigError("deep=True compares a directory with its certificate; it needs one argument, not two")
        with open_source(before) as one, open_source(after) as other:
            pruned = pruned_matrices(one)
            require_same_masks(compare(one, other, {*one.axes, *other.axes, *pruned}), one.name, other.name)
            axes = other.axes | {key: other.matrices[key] for key in pruned}
            return report_from_tensors((name, other.get(name), axis) for name, axis in axes.items())
    if isinstance(before, nn.Module):
        raise ConfigError(
            "a model in memory has no certificate; pass what to compare it with: spp.verify(before, after)"
        )
    return _verify_directory(checkpoint_directory(before), deep)


@dataclass(frozen=True)
class Difference:
    """What two tensors of one name differ in."""

    key: str
    what: str
    finite: bool = True


def pruned_matrices(source: Source) -> list[str]:
    """Return the matrices besides the projections of which a tenth or more is zero, such as a pruned output head."""

    def is_pruned(t: Tensor) -> bool:
        return t.numel() > 0 and t.numel() - count_kept(pack_bits(t)) >= PRUNED_FROM * t.numel()

    return [key for key in source.matrices if is_pruned(source.get(key))]


def compare(before: Source, after: Source, keys: Iterable[str]) -> list[Difference]:
    """Return where the zeros of these weights differ, sorted; also what is missing, misshapen or not finite."""
    differences = []
    for key in sorted(keys):
        if before.axis(key) is None or after.axis(key) is None:
            differences.append(Difference(key, f"only in {(before if after.axis(key) is None else after).name}"))
            continue
        one, other = before.get(key), after.get(key)
        if one.shape != other.shape:
            differences.append(Difference(key, f"shape {tuple(one.shape)} became {tuple(other.shape)}"))
            continue
        bad = [source.name for source, t in ((before, one), (after, other)) if not all_finite(t)]
        if bad:
            differences.append(Difference(key, f"NaN or infinity in {' and in '.join(bad)}", finite=False))
        bits, new = pack_bits(one), pack_bits(other)
        if not np.array_equal(bits, new):
            differences.append(
                Difference(key, f"{count_kept(new & ~bits)} became non-zero, {count_kept(bits & ~new)} became zero")
            )
    return differences


def require_same_masks(differences: list[Difference], before: str, after: str) -> None:
    """Raise MaskError, or NonFiniteError where only finiteness is amiss, with every difference."""
    if not differences:
        return
    listing = "\n  ".join(f"{d.key}: {d.what}" for d in differences)
    if all(not d.finite for d in differences):
        raise NonFiniteError(f"weights are not finite:\n  {listing}")
    raise MaskError(f"the zeros of {after} are not those of {before}, in {len(differences)} tensors:\n  {listing}")


def _verify_directory(directory: os.PathLike[str], deep: bool) -> SparsityReport:
    certificate = Certificate.read(directory)
    if deep and certificate.content_sha256 is None:
        raise CheckpointError(
            f"the certificate of {directory} holds no sha256 of contents; spp.certify(dir, deep=True) writes them"
        )
    masks: list[str] = []
    infinite: list[str] = []
    contents: list[str] = []
    with DenseReader(directory) as reader:
        known = certificate.tensors.keys() | certificate.other.keys()
        present = set(reader.keys())
        contents += [f"{key}: missing; the certificate lists it" for key in known - present]
        contents += [f"{key}: not in the certificate" for key in present - known]
        for key in sorted(known & present):
            record = certificate.tensors.get(key)
            if record is None:
                if zlib.crc32(reader.raw(key)) != certificate.other[key]:
                    contents.append(f"{key}: its contents have changed")
            elif not all_finite(reader.tensor(key)):
                infinite.append(f"{key}: NaN or infinity")
            else:
                _check_record(key, record, reader.tensor(key), masks, contents)
            if deep and not _same_sha256(certificate, key, reader):
                contents.append(f"{key}: the sha256 of its contents has changed")
    if certificate.base and certificate.base.fingerprint != certificate.fingerprint():
        base = certificate.base.name_or_path or "the base"
        masks.append(f"the certificate's masks are not those of {base}, whose fingerprint it holds")
    problems = "\n  ".join([*sorted(masks), *sorted(infinite), *sorted(set(contents))])
    if masks:
        raise MaskError(f"{directory} fails its certificate:\n  {problems}")
    if infinite:
        raise NonFiniteError(f"{directory} holds weights that are not finite:\n  {problems}")
    if contents:
        raise CheckpointError(f"{directory} fails its certificate:\n  {problems}")
    return certificate.report()


def _check_record(key: str, record: TensorRecord, t: Tensor, masks: list[str], contents: list[str]) -> None:
    if tuple(t.shape) != record.shape:
        masks.append(f"{key}: shape {tuple(t.shape)}; the certificate says {record.shape}")
        return
    found = certify_tensor(t, record.input_axis)
    if found.mask_sha256 != record.mask_sha256:
        masks.append(
            f"{key}: its zeros have changed: {found.zeros} of {found.numel}, the certificate says {record.zeros}"
        )
    elif (found.zeros, found.pattern) != (record.zeros, record.pattern):
        masks.append(
            f"{key}: {found.zeros} zeros, {found.pattern}; the certificate says {record.zeros} zeros, {record.pattern}"
        )
    elif found.dtype != record.dtype:
        contents.append(f"{key}: {found.dtype}; the certificate says {record.dtype}")
    elif found.content_crc32 != record.content_crc32:
        contents.append(f"{key}: its contents have changed")


def _same_sha256(certificate: Certificate, key: str, reader: CheckpointReader) -> bool:
    assert certificate.content_sha256 is not None
    return certificate.content_sha256.get(key) == content_sha256(reader.tensor(key))
