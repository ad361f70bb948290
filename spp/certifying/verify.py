"""Prove that zeros stayed zeros: a checkpoint against its certificate, or one model against another."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from spp.certifying.certificate import (
    Certificate,
    SparsityReport,
    TensorLayout,
    TensorRecord,
    TensorSparsity,
    make_report,
)
from spp.certifying.scan import Scanned, scan_reader, scan_source
from spp.certifying.sources import (
    ModelOrPath,
    Source,
    checkpoint_directory,
    input_axes,
    open_source,
    projection_keys,
    require_projections,
    same_names,
    unreadable_in,
)
from spp.errors import CheckpointError, ConfigError, MaskError, NonFiniteError, SPPWarning, arg, call
from spp.files import CheckpointReader
from spp.masks.patterns import UNSTRUCTURED, count_kept, is_loose, pack_bits
from spp.models.unreadable import describe_unreadable
from spp.weights.packed.disk import DenseReader

PRUNED_FROM = 0.1  # the fraction of zeros from which a matrix that is no projection by its name counts as pruned


def sparsity(model_or_dir: ModelOrPath) -> SparsityReport:
    """Count the zeros of every projection weight.

    Args:
        model_or_dir: a model (of a wrapped one, its frozen weights count), a checkpoint directory or a hub id.

    Returns:
        SparsityReport; a tensor with NaN or infinity has valid=False. A warning names projections that are stored so
        that their zeros cannot be read, such as by GPTQ: they are not in it.

    Raises:
        CheckpointError: the files are bad, or not one projection weight in them can be read.
        TargetError: the same of a model.

    Example:
        >>> spp.sparsity("pruned-2of4").pattern  # doctest: +SKIP
        '2:4'
    """
    with open_source(model_or_dir) as source:
        found = scan_source(source, source.axes)
        if source.unreadable:
            warnings.warn(
                f"of {source.name} the zeros of {len(source.unreadable)} projections cannot be read and were not "
                f"counted: {describe_unreadable(source.unreadable)}",
                SPPWarning,
                stacklevel=2,
            )
    return make_report({key: found[key].zeros for key in source.axes})


def verify(
    before: ModelOrPath, after: ModelOrPath | None = None, *, deep: bool = False, more_zeros_allowed: bool = False
) -> SparsityReport:
    """Check a checkpoint against its certificate, or that two models have the same zeros in every projection.

    Two models are compared in all projections, and in every other matrix of `before` (such as an output head; not an
    embedding) of which a tenth or more is zero. A certificate names its tensors: the projections, and what was merged.

    Not promised: that values or dtypes of two models are alike, or anything of their other tensors; that a certificate
    is the one that was written first (spp.certifying.certificate says what one is worth); files of the directory that
    hold no weights, and weight files that its index does not name, which nobody loads.

    Args:
        before: with `after` a model, a directory or a hub id (of a wrapped model, its frozen weights count); alone, a
            directory with a certificate.
        after: what must have the zeros of `before`. Values and dtypes may differ. What bitsandbytes quantized (NF4,
            FP4, 8 bits) is decoded, a few rows at a time, and so is GPTQ and AWQ where its codes are of 2, 4 or 8 bits;
            of fp8 the stored bits tell.
        deep: compare the sha256 of contents too (needs a certificate that was made with deep=True).
        more_zeros_allowed: `after` may have been pruned further: every zero of `before` must still be one, and the
            report counts those that are new.

    Returns:
        The report on what was compared of `after`, or on what the certificate names.

    Raises:
        MaskError: zeros differ; every differing tensor is listed, sorted, with what became non-zero and zero.
        NonFiniteError: a projection weight holds NaN or infinity.
        CheckpointError: files are bad; contents, names, shapes or dtypes are not what the certificate says; or there
            are projections that it does not list as such, or whose zeros cannot be read.
        TargetError: a model has no projection weight that can be read.

    Example:
        >>> spp.verify("pruned-2of4", "tuned-2of4").sparsity  # doctest: +SKIP
        0.5
    """
    return examine(before, after, deep=deep, more_zeros_allowed=more_zeros_allowed).require()


def examine(
    before: ModelOrPath, after: ModelOrPath | None = None, *, deep: bool = False, more_zeros_allowed: bool = False
) -> Verification:
    """Do what `verify` does, and return what was found instead of raising it; arguments as there."""
    if after is not None:
        if deep:
            raise ConfigError(
                f"{arg('deep', True)} compares a directory with its certificate; it needs one argument, not two"
            )
        with open_source(before, dequantize=True) as one, open_source(after, dequantize=True) as other:
            return _examine_two(*same_names(one, other), more_zeros_allowed=more_zeros_allowed)
    if more_zeros_allowed:
        raise ConfigError(
            f"{arg('more_zeros_allowed', True)} compares a model that was pruned further with the one before; it needs "
            f"both, and only one is given"
        )
    if isinstance(before, nn.Module):
        raise ConfigError(
            f"a model in memory has no certificate; pass what to compare it with: {call('verify', 'before, after')}"
        )
    return _examine_directory(checkpoint_directory(before, copied=False), deep)


def require_same_masks(before: Source, after: Source, keys: Iterable[str]) -> None:
    """Raise unless these weights have the same zeros and are finite; arguments as for `compare`."""
    keys = set(keys)
    problems = compare(before, scan_source(before, keys), after, scan_source(after, keys), keys)
    raise_differences(tuple(problems), before.name, after.name)


def pruned_matrices(source: Source, scanned: Mapping[str, Scanned] | None = None) -> list[str]:
    """Return the matrices besides the projections of which a tenth or more is zero, such as a pruned output head."""
    found = scan_source(source, source.matrices) if scanned is None else scanned

    def is_pruned(key: str) -> bool:
        facts = found[key].zeros
        return 0 < facts.zeros >= PRUNED_FROM * math.prod(facts.shape)

    return [key for key in source.matrices if is_pruned(key)]


def compare(
    before: Source, old: Mapping[str, Scanned], after: Source, new: Mapping[str, Scanned], keys: Set[str]
) -> list[Problem]:
    """Return where the zeros of these weights differ, sorted; also what is missing, misshapen or not finite.

    After these come the projections that the one cannot read and the other cannot, or does not have.

    Args:
        before, after: the models; old, new: what a scan found of those weights that each has.
        keys: the weights.
    """
    problems = [] if old.keys() & new.keys() else [Problem(MASK, "they have no weight in common")]
    for key in sorted(keys):
        if key not in old or key not in new:
            here, other_side = (before, after) if key in old else (after, before)
            stored = other_side.unreadable.get(key.removesuffix(".weight"))
            also = f"; {other_side.name} has it stored as {stored}" if stored else ""
            problems.append(Problem(MASK, f"only in {here.name}{also}", key))
            continue
        one, other = old[key].zeros, new[key].zeros
        if one.shape != other.shape:
            problems.append(Problem(MASK, f"shape {one.shape} became {other.shape}", key))
            continue
        bad = [source.name for source, facts in ((before, one), (after, other)) if not facts.valid]
        if bad:
            problems.append(Problem(FINITE, f"NaN or infinity in {' and in '.join(bad)}", key))
        if old[key].mask != new[key].mask:
            bits, others = pack_bits(before.get(key)), pack_bits(after.get(key))
            grown, gone = count_kept(others & ~bits), count_kept(bits & ~others)
            form = f" (quantized as {after.quantized[key]})" if key in after.quantized else ""
            what = f"{grown} became non-zero, {gone} became zero{form}"
            problems.append(Problem(MASK, what, key, zeros_added=0 if grown else gone, came_back=grown))
    unreadable = {**before.unreadable, **after.unreadable}
    problems += [
        Problem(CONTENTS, f"stored as {unreadable[path]}: its zeros cannot be read", path)
        for path in sorted(unreadable.keys() - keys - {key.removesuffix(".weight") for key in keys})
    ]
    return problems


def _examine_two(before: Source, after: Source, *, more_zeros_allowed: bool) -> Verification:
    count = len(before.axes) + len(before.matrices) + len(after.axes)
    with tqdm(total=count, desc="verifying", unit="tensor", disable=None) as bar:
        old = scan_source(before, {**before.axes, **before.matrices}, lambda _: bar.update())
        pruned = pruned_matrices(before, old)
        new = scan_source(after, {**after.axes, **before.axes, **dict.fromkeys(pruned)}, lambda _: bar.update())
    problems = compare(before, old, after, new, {*before.axes, *after.axes, *pruned})
    kept = [key for key in [*after.axes, *pruned] if key in new]
    facts = {key: new[key].zeros for key in kept}
    report = make_report(facts)
    if more_zeros_allowed:
        report = replace(report, zeros_added=sum(problem.zeros_added for problem in problems))
        problems = [problem for problem in problems if not problem.zeros_added]
    tensors = {**{problem.key: None for problem in problems}, **facts}
    return Verification(after.name, before.name, tensors, tuple(problems), report, _survival(old, new, after, problems))


def _survival(
    old: Mapping[str, Scanned], new: Mapping[str, Scanned], after: Source, problems: Iterable[Problem]
) -> dict[str, Survival]:
    """Return what became of the zeros of each weight that is quantized."""
    filled = {problem.key: problem.came_back for problem in problems}
    found = {}
    for key in after.axes:
        if key in after.quantized and key in old and old[key].zeros.shape == new[key].zeros.shape:
            zeros = old[key].zeros.zeros
            survived = zeros - filled.get(key, 0)
            found[key] = Survival(after.quantized[key], zeros, survived, new[key].zeros.zeros - survived)
    return found


def header_problems(certificate: Certificate, reader: CheckpointReader) -> list[Problem]:
    """Return where names, shapes and dtypes alone tell that a checkpoint is not what its certificate says."""
    projections, present, axes = set(projection_keys(reader)), set(reader.keys()), input_axes(reader)
    known = certificate.tensors.keys() | certificate.other.keys()
    problems = [Problem(CONTENTS, "missing; the certificate lists it", key) for key in known - present]
    problems += [Problem(CONTENTS, "not in the certificate", key) for key in present - known]
    problems += [
        Problem(CONTENTS, f"stored as {how}: its zeros cannot be read", path)
        for path, how in unreadable_in(reader).items()
    ]
    problems += [
        Problem(CONTENTS, "a projection, of whose zeros the certificate says nothing", key)
        for key in projections & certificate.other.keys()
    ]
    said: Mapping[str, TensorRecord | TensorLayout] = {**(certificate.other_layout or {}), **certificate.tensors}
    for key in present & said.keys():
        of, found = said[key], TensorLayout.of(reader.shape(key), reader.dtype(key))
        if found.shape != of.shape:
            kind = MASK if key in certificate.tensors else CONTENTS
            problems.append(Problem(kind, f"shape {found.shape}; the certificate says {of.shape}", key))
        elif found.dtype != of.dtype:
            problems.append(Problem(CONTENTS, f"{found.dtype}; the certificate says {of.dtype}", key))
        elif isinstance(of, TensorRecord) and of.input_axis != axes.get(key, of.input_axis):
            what = f"its inputs run along axis {axes[key]}; the certificate says {of.input_axis}"
            problems.append(Problem(MASK, what, key))
    return problems


def _examine_directory(directory: os.PathLike[str], deep: bool) -> Verification:
    with DenseReader(directory) as reader:
        require_projections(reader, whole=False)
        certificate = Certificate.read(directory)
        if deep and certificate.content_sha256 is None:
            raise CheckpointError(
                f"the certificate of {directory} holds no sha256 of contents; {call('certify', 'dir', deep=True)} "
                f"writes them"
            )
        problems = header_problems(certificate, reader)
        misshapen = {problem.key for problem in problems if problem.kind == MASK}
        known, present = certificate.tensors.keys() | certificate.other.keys(), set(reader.keys())
        axes: dict[str, int | None] = dict.fromkeys(sorted(known & present))
        for key, record in certificate.tensors.items():
            if key in axes and key not in misshapen:
                axes[key] = record.input_axis
        with tqdm(total=len(axes), desc="verifying", unit="tensor", disable=None) as bar:
            found = scan_reader(reader, axes, deep=deep, done=lambda _: bar.update())
    for key, scanned in sorted(found.items()):
        said = certificate.tensors.get(key)
        if said is None:
            if scanned.crc != certificate.other[key]:
                problems.append(Problem(CONTENTS, "its contents have changed", key))
        elif scanned.facts is not None:
            problems += _problems_of(key, said, scanned)
        if deep and certificate.content_sha256 and certificate.content_sha256[key] != scanned.sha256:
            problems.append(Problem(CONTENTS, "the sha256 of its contents has changed", key))
    if certificate.base and certificate.base.fingerprint != certificate.fingerprint():
        base = certificate.base.name_or_path or "the base"
        what = f"the certificate's masks are not those of {base}, whose fingerprint it holds"
        problems.append(Problem(MASK, what))
    tensors = {key: found[key].facts if key in found else None for key in sorted(known | present)}
    return Verification(str(directory), None, tensors, tuple(problems), certificate.report())


def _problems_of(key: str, record: TensorRecord, scanned: Scanned) -> list[Problem]:
    facts, numel = scanned.zeros, record.numel
    if not facts.valid:
        return [Problem(FINITE, "NaN or infinity", key)]
    if scanned.mask != record.mask_sha256:
        what = f"its zeros have changed: {facts.zeros} of {numel}, the certificate says {record.zeros}"
        return [Problem(MASK, what, key)]
    of_before = record.pattern == UNSTRUCTURED and is_loose(facts.pattern, numel - facts.zeros, numel)
    if facts.zeros != record.zeros or (facts.pattern != record.pattern and not of_before):
        found, said = f"{facts.zeros} zeros, {facts.pattern}", f"{record.zeros} zeros, {record.pattern}"
        return [Problem(MASK, f"{found}; the certificate says {said}", key)]
    if facts.dtype == record.dtype and scanned.crc != record.content_crc32:
        return [Problem(CONTENTS, "its contents have changed", key)]
    return []


# ---- What a verification found: of each tensor its zeros, and whatever is not as it should be.

MASK, FINITE, CONTENTS = "mask", "finite", "contents"
_ORDER = (MASK, FINITE, CONTENTS)  # the first that is among the problems decides on the error


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: MASK (zeros, shapes, patterns), FINITE (NaN or infinity) or CONTENTS (values, dtypes, names).
        what: in words.
        key: of the tensor; "" where it concerns all.
        zeros_added: how many of its weights became zero, if that is all that differs; else 0.
        came_back: how many of its zeros are none any more.
    """

    kind: str
    what: str
    key: str = ""
    zeros_added: int = 0
    came_back: int = 0

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" if self.key else self.what


@dataclass(frozen=True)
class Survival:
    """The zeros of a weight that was quantized.

    Attributes:
        form: how it is stored, such as "nf4".
        zeros: before it was quantized.
        survived: of these.
        more: other weights that are zero now: small ones, which were rounded to it.
    """

    form: str
    zeros: int
    survived: int
    more: int


@dataclass(frozen=True)
class Verification:
    """The outcome of `spp.verify`, before it is an error or a report.

    Attributes:
        name: of what was verified; against: of what it was compared with, None for its certificate.
        tensors: the zeros of each tensor that was looked at; None where only its bytes were.
        problems: all that were found.
        report: what `spp.verify` returns if there are none.
        survival: of two models, the zeros of each weight that is quantized in the second.
    """

    name: str
    against: str | None
    tensors: dict[str, TensorSparsity | None]
    problems: tuple[Problem, ...]
    report: SparsityReport
    survival: Mapping[str, Survival] = field(default_factory=dict)

    def of(self, key: str) -> list[Problem]:
        """Return the problems of one tensor."""
        return [problem for problem in self.problems if problem.key == key]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the whole as JSON-ready values: of what was found, whether that is as it should be or not."""
        found = make_report({key: tensor for key, tensor in self.tensors.items() if tensor is not None})
        values = replace(found, zeros_added=self.report.zeros_added).to_dict()
        unread = {key: None for key, tensor in self.tensors.items() if tensor is None and key}
        return {
            "name": self.name,
            "against": self.against,
            "ok": self.ok,
            "problems": [asdict(problem) for problem in self.problems],
            **values,
            "tensors": {**values["tensors"], **unread},
            "survival": {key: asdict(survival) for key, survival in self.survival.items()},
        }

    def require(self, most: int | None = None) -> SparsityReport:
        """Return the report.

        Args:
            most: problems that a message lists; None lists all.

        Raises:
            MaskError, NonFiniteError, CheckpointError: there are problems.
        """
        if not self.problems:
            return self.report
        if self.against is not None:
            further = all(problem.zeros_added for problem in self.problems)
            way = call("verify", "before, after", more_zeros_allowed=True)
            why = "if it was pruned further,"
            if self.survival:
                why = "all survived the quantization, which rounded other weights to zero:"
            more = f"\nNo zero was lost: {why} {way} accepts the new ones." if further else ""
            raise_differences(self.problems, self.against, self.name, more, most)
        listed = sorted(self.problems, key=lambda problem: (_ORDER.index(problem.kind), str(problem)))
        problems = _listing(dict.fromkeys(map(str, listed)), most)
        if listed[0].kind == FINITE:
            raise NonFiniteError(f"{self.name} holds weights that are not finite:\n  {problems}")
        error = MaskError if listed[0].kind == MASK else CheckpointError
        raise error(f"{self.name} fails its certificate:\n  {problems}")


def _listing(problems: Iterable[object], most: int | None) -> str:
    lines = [str(problem) for problem in problems]
    left = 0 if most is None else len(lines) - most
    if left > 0:
        lines[most:] = [f"… and {left} more; {arg('every', True)} lists all"]
    return "\n  ".join(lines)


def raise_differences(
    problems: tuple[Problem, ...], before: str, after: str, more: str = "", most: int | None = None
) -> None:
    """Raise a MaskError, NonFiniteError or CheckpointError, whichever problem is gravest, if two models differ."""
    if not problems:
        return
    listing = _listing(problems, most)
    many = "1 tensor" if len(problems) == 1 else f"{len(problems)} tensors"
    kind = min((problem.kind for problem in problems), key=_ORDER.index)
    if kind == FINITE:
        raise NonFiniteError(f"weights are not finite:\n  {listing}")
    if kind == CONTENTS:
        raise CheckpointError(f"{after} and {before} cannot be compared in {many}:\n  {listing}")
    raise MaskError(f"the zeros of {after} are not those of {before}, in {many}:\n  {listing}{more}")
