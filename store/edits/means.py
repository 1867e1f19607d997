"""Means of a site's rows, in one pass and in float64."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import NotCapturedError
from residua.store.encoding.dtypes import to_float32
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

_PIECE_ROWS = 4096


def mean_row(archive: Archive, site: str, ranges: Iterable[tuple[int, int]] | None = None) -> npt.NDArray[np.float64]:
    """Return the mean of rows of a site, float64, (*row shape); NaN or infinite where a row is.

    Args:
        archive: Where they are stored.
        site: Name of a stored site.
        ranges: First row and row after the last, of each run of rows; all unless given. Those that are not captured
            yet are left out.

    Raises:
        NotCapturedError: There is no such row yet.
    """
    stored = archive[site]
    total, n_rows = np.zeros(stored.shape[1:]), 0
    for first, last in _captured(archive, ranges):
        for start in range(first, last, _PIECE_ROWS):
            rows = _wide(stored[start : min(start + _PIECE_ROWS, last)])
            with np.errstate(invalid="ignore"):  # of infinite values; the mean is NaN then
                total += rows.sum(0, dtype=np.float64)
            n_rows += len(rows)
    if not n_rows:
        raise NotCapturedError(f"{archive.path} has no captured row that a mean of {site} could be taken of")
    return total / n_rows


def _captured(archive: Archive, ranges: Iterable[tuple[int, int]] | None) -> Iterator[tuple[int, int]]:
    """Yield the parts of `ranges` that lie in captured shards."""
    captured = [commit.rows for _, commit in sorted(archive.commits.items())]
    if ranges is None or archive.is_sealed:
        yield from captured if ranges is None else ranges
        return
    for first, last in ranges:
        for start, stop in captured:
            if max(first, start) < min(last, stop):
                yield max(first, start), min(last, stop)


def _wide(rows: Array) -> npt.NDArray[np.generic]:
    return to_float32(rows, "bfloat16") if rows.dtype.name == "bfloat16" else rows
