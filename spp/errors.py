"""Every exception and warning that spp raises.

    SPPError
    ├── ConfigError (ValueError)          an option that makes no sense: r, scaling, dropout, …
    │   └── PatternError                  a sparsity pattern that makes no sense, or does not fit a shape
    ├── TargetError (ValueError)          no module, or the wrong one, is meant by target_modules
    ├── WrapError (RuntimeError)          wrapped twice, not wrapped, still wrapped
    ├── NonFiniteError (ValueError)       NaN or infinity in a base weight, an adapter, an activation or a result
    ├── MaskError (ValueError)            a zero pattern is not the one that it must be
    ├── AdapterError (ValueError)         an adapter does not fit its model
    ├── CheckpointError (ValueError)      a file is missing, truncated, corrupt, unsafe or from a newer version
    │   └── StreamingError                its weights cannot be taken from the disk part by part
    ├── OutputError (OSError)             a path cannot be written: read-only, disk full
    │   └── OutputExistsError (FileExistsError)
    ├── HubError (ConnectionError)        the hub cannot be reached, or refuses
    ├── DataError (ValueError)            training, calibration or evaluation data is empty or malformed
    ├── GradientError (RuntimeError)      a derivative that does not exist here was asked for
    └── DependencyError (ImportError)     an optional package is missing; the message names the extra
    SPPWarning (UserWarning)

The second base class is the built-in one that a caller who knows nothing of spp would catch.
"""

from __future__ import annotations

from collections.abc import Iterable


class SPPError(Exception):
    """Base class of everything that spp raises on purpose."""


class ConfigError(SPPError, ValueError):
    """An option has a value that makes no sense."""


class PatternError(ConfigError):
    """A sparsity pattern is malformed or does not fit a weight's shape."""


class TargetError(SPPError, ValueError):
    """The target modules cannot be found, or cannot be adapted."""


class WrapError(SPPError, RuntimeError):
    """A model is in the wrong state: wrapped already, not wrapped, or still wrapped."""


class NonFiniteError(SPPError, ValueError):
    """NaN or infinity where a finite number is needed."""


class MaskError(SPPError, ValueError):
    """The zero pattern of a weight is not the one that it must be."""


class AdapterError(SPPError, ValueError):
    """An adapter does not fit the model that it is loaded onto."""


class CheckpointError(SPPError, ValueError):
    """A file that is read is missing, truncated, corrupt, unsafe or of an unknown version."""


class StreamingError(CheckpointError):
    """A checkpoint stores its weights otherwise than its model has them, so parts of it cannot be loaded alone."""


class OutputError(SPPError, OSError):
    """A path cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """The output exists already and overwriting was not asked for."""


class HubError(SPPError, ConnectionError):
    """The Hugging Face hub cannot be reached, or refuses what it is asked."""


class DataError(SPPError, ValueError):
    """Training, calibration or evaluation data is empty or malformed."""


class GradientError(SPPError, RuntimeError):
    """A derivative was asked for that the fast path does not have."""


class DependencyError(SPPError, ImportError):
    """An optional package is missing."""


class SPPWarning(UserWarning):
    """Something is allowed, but probably not what was meant."""


def some_of(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message, sorted: all of them, or the first `most` and an ellipsis."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")
