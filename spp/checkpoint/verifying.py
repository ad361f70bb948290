"""Prove that zeros stayed zeros: a checkpoint against its certificate, or one model against another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

from torch import nn
from tqdm import tqdm

from spp.certificate import Certificate, SparsityReport, TensorRecord, TensorSparsity, make_report
from spp.checkpoint.naming import same_names
from spp.checkpoint.scanning import Scanned, scan_reader, scan_source
from spp.checkpoint.sources import ModelOrPath, Source, checkpoint_directory, open_source
from spp.checkpoint.verdicts import CONTENTS, FINITE, MASK, Problem, Verification, raise_differences
from spp.errors import CheckpointError, ConfigError, arg, call
from spp.packed.disk import DenseReader
from spp.patterns import count_kept, pack_bits

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
        found = scan_source(source, source.axes)
    return make_report({key: facts_of(found[key]) for key in source.axes})


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
    return examine(before, after, deep=deep).require()


def examine(before: ModelOrPath, after: ModelOrPath | None = None, *, deep: bool = False) -> Verification:
    """Do what `verify` does, and return what was found instead of raising it; arguments as there."""
    if after is not None:
        if deep:
            raise ConfigError(
                f"{arg('deep', True)} compares a directory with its certificate; it needs one argument, not two"
            )
        with open_source(before) as one, open_source(after) as other:
            return _examine_two(*same_names(one, other))
    if isinstance(before, nn.Module):
        raise ConfigError(
            f"a model in memory has no certificate; pass what to compare it with: {call('verify', 'before, after')}"
        )
    return _examine_directory(checkpoint_directory(before), deep)


def facts_of(scanned: Scanned) -> TensorSparsity:
    """Return the zeros of a tensor that was looked at as one of numbers."""
    assert scanned.facts is not None
    return scanned.facts


def require_same_masks(before: Source, after: Source, keys: Iterable[str]) -> None:
    """Raise unless these weights have the same zeros and are finite; arguments as for `compare`."""
    keys = set(keys)
    problems = compare(before, scan_source(before, keys), after, scan_source(after, keys), keys)
    raise_differences(tuple(problems), before.name, after.name)


def pruned_matrices(source: Source, scanned: Mapping[str, Scanned] | None = None) -> list[str]:
    """Return the matrices besides the projections of which a tenth or more is zero, such as a pruned output head."""
    found = scan_source(source, source.matrices) if scanned is None else scanned

    def is_pruned(key: str) -> bool:
        facts = facts_of(found[key])
        return 0 < facts.zeros >= PRUNED_FROM * math.prod(facts.shape)

    return [key for key in source.matrices if is_pruned(key)]


def compare(
    before: Source, old: Mapping[str, Scanned], after: Source, new: Mapping[str, Scanned], keys: Iterable[str]
) -> list[Problem]:
    """Return where the zeros of these weights differ, sorted; also what is missing, misshapen or not finite.

    Args:
        before, after: the models; old, new: what a scan found of those weights that each has.
        keys: the weights.
    """
    problems = []
    for key in sorted(keys):
        if key not in old or key not in new:
            problems.append(Problem(MASK, f"only in {(before if key in old else after).name}", key))
            continue
        one, other = facts_of(old[key]), facts_of(new[key])
        if one.shape != other.shape:
            problems.append(Problem(MASK, f"shape {one.shape} became {other.shape}", key))
            continue
        bad = [source.name for source, facts in ((before, one), (after, other)) if not facts.valid]
        if bad:
            problems.append(Problem(FINITE, f"NaN or infinity in {' and in '.join(bad)}", key))
        if old[key].mask != new[key].mask:
            bits, others = pack_bits(before.get(key)), pack_bits(after.get(key))
            grown, gone = count_kept(others & ~bits), count_kept(bits & ~others)
            problems.append(Problem(MASK, f"{grown} became non-zero, {gone} became zero", key))
    return problems


def _examine_two(before: Source, after: Source) -> Verification:
    count = len(before.axes) + len(before.matrices) + len(after.axes)
    with tqdm(total=count, desc="verifying", unit="tensor", disable=None) as bar:
        old = scan_source(before, {**before.axes, **before.matrices}, lambda _: bar.update())
        pruned = pruned_matrices(before, old)
        new = scan_source(after, {**after.axes, **before.axes, **dict.fromkeys(pruned)}, lambda _: bar.update())
    problems = compare(before, old, after, new, {*before.axes, *after.axes, *pruned})
    kept = [key for key in [*after.axes, *pruned] if key in new]
    facts = {key: facts_of(new[key]) for key in kept}
    tensors = {**{problem.key: None for problem in problems}, **facts}
    return Verification(after.name, before.name, tensors, tuple(problems), make_report(facts))


def _examine_directory(directory: os.PathLike[str], deep: bool) -> Verification:
    certificate = Certificate.read(directory)
    if deep and certificate.content_sha256 is None:
        raise CheckpointError(
            f"the certificate of {directory} holds no sha256 of contents; {call('certify', 'dir', deep=True)} writes "
            f"them"
        )
    problems: list[Problem] = []
    with DenseReader(directory) as reader:
        known = certificate.tensors.keys() | certificate.other.keys()
        present = set(reader.keys())
        problems += [Problem(CONTENTS, "missing; the certificate lists it", key) for key in known - present]
        problems += [Problem(CONTENTS, "not in the certificate", key) for key in present - known]
        axes: dict[str, int | None] = dict.fromkeys(sorted(known & present))
        for key, record in certificate.tensors.items():
            if key in axes and reader.shape(key) == record.shape:
                axes[key] = record.input_axis
        with tqdm(total=len(axes), desc="verifying", unit="tensor", disable=None) as bar:
            found = scan_reader(reader, axes, deep=deep, done=lambda _: bar.update())
        for key, scanned in sorted(found.items()):
            said = certificate.tensors.get(key)
            if said is None:
                if scanned.crc != certificate.other[key]:
                    problems.append(Problem(CONTENTS, "its contents have changed", key))
            elif scanned.facts is None:
                what = f"shape {reader.shape(key)}; the certificate says {said.shape}"
                problems.append(Problem(MASK, what, key))
            else:
                problems += _problems_of(key, said, scanned)
            if (
                certificate.content_sha256 is not None
                and deep
                and certificate.content_sha256.get(key) != scanned.sha256
            ):
                problems.append(Problem(CONTENTS, "the sha256 of its contents has changed", key))
    if certificate.base and certificate.base.fingerprint != certificate.fingerprint():
        base = certificate.base.name_or_path or "the base"
        what = f"the certificate's masks are not those of {base}, whose fingerprint it holds"
        problems.append(Problem(MASK, what))
    tensors = {key: found[key].facts if key in found else None for key in sorted(known | present)}
    return Verification(str(directory), None, tensors, tuple(problems), certificate.report())


def _problems_of(key: str, record: TensorRecord, scanned: Scanned) -> list[Problem]:
    facts, numel = facts_of(scanned), record.numel
    if not facts.valid:
        return [Problem(FINITE, "NaN or infinity", key)]
    if scanned.mask != record.mask_sha256:
        what = f"its zeros have changed: {facts.zeros} of {numel}, the certificate says {record.zeros}"
        return [Problem(MASK, what, key)]
    if (facts.zeros, facts.pattern) != (record.zeros, record.pattern):
        found, said = f"{facts.zeros} zeros, {facts.pattern}", f"{record.zeros} zeros, {record.pattern}"
        return [Problem(MASK, f"{found}; the certificate says {said}", key)]
    if facts.dtype != record.dtype:
        return [Problem(CONTENTS, f"{facts.dtype}; the certificate says {record.dtype}", key)]
    if scanned.crc != record.content_crc32:
        return [Problem(CONTENTS, "its contents have changed", key)]
    return []
