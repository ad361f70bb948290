"""Pattern: "N:M" keeps at most N of every M consecutive weights along the input dimension; a fraction is unstructured.

"2:4" is 50 % sparse, "2:8" is 75 %; the fraction p is the share of weights that is pruned.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from spp.errors import PatternError

# M of the patterns that are looked for in a mask; N is a power of two up to M / 2
USUAL_GROUPS = (2, 4, 8, 16, 32)
_LARGEST_SUGGESTED_GROUP = 64  # a suggestion with a longer group would help nobody


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: N:M (`kept` of every `group`), or unstructured (`fraction` pruned).

    Args:
        kept: N, at least 1 and below `group`; None for an unstructured pattern.
        group: M, at least 2.
        fraction: share pruned, at least 0 (nothing) and below 1; None for an N:M pattern.

    Raises:
        PatternError: the values make no pattern.

    Example:
        >>> str(Pattern.parse("2:4")), Pattern.parse("2:8").sparsity, str(Pattern.parse(0.5))
        ('2:4', 0.75, '0.5')
    """

    kept: int | None = None
    group: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is None:
            kept, group = self.kept, self.group
            if type(kept) is not int or type(group) is not int or not 1 <= kept < group:
                raise PatternError(
                    f"pattern {kept}:{group} makes no sense: N:M keeps N of every M weights, so 1 <= N < M"
                )
        elif self.kept is not None or self.group is not None:
            raise PatternError("a pattern is either N:M or a fraction, not both")
        elif not 0 <= self.fraction < 1:
            hint = f"; did you mean {self.fraction / 100:g}?" if 1 < self.fraction < 100 else ""
            raise PatternError(
                f"pattern {self.fraction!r} makes no sense: an unstructured pattern is the fraction of weights to "
                f"prune, at least 0 and below 1{hint}"
            )

    @classmethod
    def parse(cls, pattern: str | float | Pattern) -> Pattern:
        """Read "2:4", "0.5", 0.5 or a Pattern; anything else is a PatternError."""
        if isinstance(pattern, Pattern):
            return pattern
        if isinstance(pattern, str):
            text = pattern.strip()
            if match := re.fullmatch(r"(\d{1,9})\s*:\s*(\d{1,9})", text, re.ASCII):
                return cls(kept=int(match[1]), group=int(match[2]))
            percent = text.endswith("%")
            try:
                value = float(text.removesuffix("%"))
            except ValueError:
                value = math.nan
            if percent and 0 < value < 100:
                raise PatternError(f"pattern {pattern!r} is a percentage; write the fraction: {value / 100:g}")
            if math.isnan(value) or percent:
                raise PatternError(_nonsense(pattern))
            return cls(fraction=value + 0.0)  # no −0.0
        if isinstance(pattern, (bool, complex)) or not hasattr(pattern, "__float__") or getattr(pattern, "ndim", None):
            raise PatternError(_nonsense(pattern))
        try:
            fraction = float(pattern)
        except OverflowError:  # of a very large int
            raise PatternError(_nonsense(pattern)) from None
        return cls(fraction=fraction + 0.0)

    @property
    def is_nm(self) -> bool:
        """Whether this is an N:M pattern."""
        return self.fraction is None

    @property
    def sparsity(self) -> float:
        """The fraction of weights that the pattern prunes."""
        if self.kept is not None and self.group is not None:
            return 1 - self.kept / self.group
        assert self.fraction is not None
        return self.fraction

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.is_nm else repr(self.fraction)

    def require_fit(self, inputs: int, where: str = "the weight", *, common: int | None = None) -> None:
        """Raise PatternError, offering the nearest pattern that fits, unless `inputs` splits into whole groups.

        Args:
            inputs: the input dimension; where: whose, for the message.
            common: what the pattern that is offered has to divide; None for `inputs`.
        """
        if self.group is None or inputs % self.group == 0:
            return
        nearest = _nearest_fit(self, common or inputs)
        ways = f'the nearest that fits is "{nearest}", or prune' if nearest else "prune"
        raise PatternError(
            f"pattern {self} needs an input dimension that {self.group} divides; {where} has {inputs}: "
            f"{ways} unstructured with {self.sparsity:g}"
        )


def _nearest_fit(pattern: Pattern, inputs: int) -> Pattern | None:
    best: tuple[float, bool, int, int, int] | None = None
    assert pattern.group is not None and pattern.kept is not None
    for group in range(2, min(inputs, _LARGEST_SUGGESTED_GROUP) + 1):
        if inputs % group == 0:
            kept = min(max(1, round(group * pattern.kept / pattern.group)), group - 1)
            distance = abs(kept / group - pattern.kept / pattern.group)
            candidate = (distance, group not in USUAL_GROUPS, abs(group - pattern.group), group, kept)
            best = min(best or candidate, candidate)
    return Pattern(kept=best[4], group=best[3]) if best else None


def _nonsense(pattern: Any) -> str:
    return (
        f'{pattern!r:.40} is no sparsity pattern; write "N:M" (N kept of every M inputs, such as "2:4") '
        f"or the fraction to prune (such as 0.5)"
    )
