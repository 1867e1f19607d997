"""The errors that a caller may want to distinguish, and helpers for the texts of messages.

Every message says what was asked, what was found and what to do. The tree:

    ResiduaError
    ├── UnknownSiteError (KeyError)       a site that the model or the archive does not have
    ├── PlanError (ValueError)            settings that contradict each other or an existing archive
    ├── DatasetError (ValueError)         a dataset, column or example that cannot be used
    ├── DamagedArchiveError (OSError)     a file of the archive is missing, cut short or altered
    ├── UnsafeArchiveError (ValueError)   an archive whose metadata Residua does not write
    ├── NotCapturedError (LookupError)    rows that the capture has not reached yet
    ├── StorageError (OSError)            a bucket, server or repository that cannot be read or written as asked
    ├── MissingPackageError (ImportError) a package is not installed; the message names the extra that installs it
    ├── TooLargeError (MemoryError)       too little memory for the requested rows
    ├── CaptureError (RuntimeError)       the capture itself failed; the cause is chained
    └── AnalysisError (RuntimeError)      an analysis cannot be done as asked, or failed; the cause is chained
"""

from collections.abc import Sequence


class ResiduaError(Exception):
    """Base of all errors that Residua raises on purpose."""


class UnknownSiteError(ResiduaError, KeyError):
    """The model or the archive does not have the named site."""

    def __str__(self) -> str:
        """Return the message itself; ``KeyError`` would put it in quotes."""
        return str(self.args[0])


class PlanError(ResiduaError, ValueError):
    """Settings contradict each other, the model, or the archive that they should continue."""


class DatasetError(ResiduaError, ValueError):
    """A dataset, a column or an example cannot be used as asked."""


class DamagedArchiveError(ResiduaError, OSError):
    """A file of the archive is missing, cut short or altered; the message names it."""


class UnsafeArchiveError(ResiduaError, ValueError):
    """The archive's metadata is malformed or forged; nothing was allocated or read by it."""


class NotCapturedError(ResiduaError, LookupError):
    """The capture has not reached some of the requested rows yet."""


class StorageError(ResiduaError, OSError):
    """A bucket, a server or a repository cannot be read or written as asked; the message names the object."""


class MissingPackageError(ResiduaError, ImportError):
    """A package is not installed; the message names the extra of the distribution that installs it."""


class TooLargeError(ResiduaError, MemoryError):
    """There is too little memory for the requested rows."""


class CaptureError(ResiduaError, RuntimeError):
    """The capture failed; the chained cause says why."""


class AnalysisError(ResiduaError, RuntimeError):
    """An analysis cannot be done as asked, or failed; where something failed, the chained cause says why."""


def few(items: Sequence[object], most: int = 5, between: str = ", ") -> str:
    """Return the first `most` of `items` as text, and the number of the others.

    Example:
        >>> few([1, 2, 3, 4], most=2)
        '1, 2 and 2 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(map(str, items[:most])) + more


def shortened(text: str, most: int = 80) -> str:
    """Return `text`, or its beginning if it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
