"""Examples and positions of chosen rows, checked before anything is counted or looked up by them."""

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.read.archive import Archive

Numbers = npt.NDArray[np.int64]


def examples_of(archive: Archive, rows: Numbers) -> Numbers:
    """Return the number of the example of each row, (rows,).

    Args:
        archive: The archive.
        rows: Row numbers, ascending and near each other: all between the first and the last are read.

    Raises:
        DamagedArchiveError: A number is not that of an example.
    """
    return _read(archive, "example", rows, max(1, archive.example_table.index().n_examples))


def positions_of(archive: Archive, rows: Numbers) -> Numbers:
    """Return the position of each row's token in its example, (rows,); `rows` as in `examples_of`.

    Raises:
        DamagedArchiveError: A position lies behind the end of the longest example.
    """
    lengths = archive.example_table.index().n_tokens
    return _read(archive, "position", rows, max(1, int(lengths.max(initial=0))))


def _read(archive: Archive, name: str, rows: Numbers, end: int) -> Numbers:
    if not len(rows):
        return np.zeros(0, np.int64)
    first = int(rows[0])
    found: Numbers = getattr(archive.rows, name).numpy(slice(first, int(rows[-1]) + 1), dtype=np.int64)[rows - first]
    if found.min() < 0 or found.max() >= end:
        raise DamagedArchiveError(
            f"{archive.path}/rows/{name} has a number outside 0 to {end - 1:,} in the rows {first:,} to {rows[-1]:,}: "
            "the array and the example table are not of one archive"
        )
    return found
