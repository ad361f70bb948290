"""What a verification found: of each tensor its zeros, and whatever is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass

from spp.certificate import SparsityReport, TensorSparsity
from spp.errors import CheckpointError, MaskError, NonFiniteError

MASK, FINITE, CONTENTS = "mask", "finite", "contents"
_ORDER = (MASK, FINITE, CONTENTS)  # the first that is among the problems decides on the error


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: MASK (zeros, shapes, patterns), FINITE (NaN or infinity) or CONTENTS (values, dtypes, names).
        what: in words.
        key: of the tensor; "" where it concerns all.
    """

    kind: str
    what: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" if self.key else self.what


@dataclass(frozen=True)
class Verification:
    """The outcome of `spp.verify`, before it is an error or a report.

    Attributes:
        name: of what was verified; against: of what it was compared with, None for its certificate.
        tensors: the zeros of each tensor that was looked at; None where only its bytes were.
        problems: all that were found.
        report: what `spp.verify` returns if there are none.
    """

    name: str
    against: str | None
    tensors: dict[str, TensorSparsity | None]
    problems: tuple[Problem, ...]
    report: SparsityReport

    def of(self, key: str) -> list[Problem]:
        """Return the problems of one tensor."""
        return [problem for problem in self.problems if problem.key == key]

    def require(self) -> SparsityReport:
        """Return the report.

        Raises:
            MaskError, NonFiniteError, CheckpointError: there are problems; all of them are listed.
        """
        if not self.problems:
            return self.report
        if self.against is not None:
            raise_differences(self.problems, self.against, self.name)
        listed = sorted(self.problems, key=lambda problem: (_ORDER.index(problem.kind), str(problem)))
        problems = "\n  ".join(dict.fromkeys(map(str, listed)))
        if listed[0].kind == FINITE:
            raise NonFiniteError(f"{self.name} holds weights that are not finite:\n  {problems}")
        error = MaskError if listed[0].kind == MASK else CheckpointError
        raise error(f"{self.name} fails its certificate:\n  {problems}")


def raise_differences(problems: tuple[Problem, ...], before: str, after: str) -> None:
    """Raise a MaskError, NonFiniteError or CheckpointError, whichever problem is gravest, if two models differ."""
    if not problems:
        return
    listing = "\n  ".join(map(str, problems))
    kind = min((problem.kind for problem in problems), key=_ORDER.index)
    if kind == FINITE:
        raise NonFiniteError(f"weights are not finite:\n  {listing}")
    if kind == CONTENTS:
        raise CheckpointError(f"{after} and {before} cannot be compared in {len(problems)} tensors:\n  {listing}")
    raise MaskError(f"the zeros of {after} are not those of {before}, in {len(problems)} tensors:\n  {listing}")
