"""Which versions of PEFT the plug-in works with, and one message for all others."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator

from spp.errors import DependencyError
from spp.supported import numbers

OLDEST, NEWEST = "0.20.0", "0.21.2"  # both tested
BEYOND = "0.22"  # the first that is refused: what the plug-in overrides may be built otherwise there


def require_peft() -> str:
    """Return PEFT's version.

    Raises:
        DependencyError: it is missing, or outside the range that the plug-in works with.
    """
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise DependencyError("spp.integrations.peft needs PEFT: pip install 'spp[peft]'") from None
    if not numbers(OLDEST) <= numbers(version) < numbers(BEYOND):
        raise DependencyError(_refusal(version))
    return version


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say which versions work, where registering with the installed one fails because it is built otherwise."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DependencyError):
            raise
        found = f"{type(error).__name__}: {error}"
        raise DependencyError(f"{_refusal(importlib.metadata.version('peft'))} ({found})") from error


def _refusal(version: str) -> str:
    return (
        f"spp.integrations.peft does not work with peft {version}: it was tested with {OLDEST} to {NEWEST}. "
        f"Install one of these: pip install 'peft>={OLDEST},<{BEYOND}'"
    )
