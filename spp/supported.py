"""Which versions of torch and transformers spp works with, and one message for all others."""

from __future__ import annotations

import importlib.metadata

from spp.errors import DependencyError

RANGES = {"torch": ("2.8", "3"), "transformers": ("5.1", "6")}  # from, and the first that is refused: as in pyproject


def require_supported() -> None:
    """Raise a DependencyError for a torch or transformers outside its range; what was not installed by pip passes."""
    for package, (oldest, beyond) in RANGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not numbers(oldest) <= numbers(version) < numbers(beyond):
            raise DependencyError(
                f"spp does not work with {package} {version}: pip install '{package}>={oldest},<{beyond}'"
            )


def numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version, for comparison: (2, 13, 0) of "2.13.0+cpu"."""
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
