"""Numbers that stand beside a row: its token, position and example, and numeric columns of the example table."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError, DatasetError
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

Rows = npt.NDArray[np.int64]
Lookup = Callable[[Rows], Array]


def lookups(archive: Archive, names: Iterable[str]) -> Mapping[str, Lookup]:
    """Return, for each of the columns `names`, what finds its values by row number.

    `token` and `position` are read whole, 4 bytes a row; the others take memory an example.

    Raises:
        AnalysisError: There is no such column, or it holds no numbers.
    """
    return {name: _lookup(archive, name) for name in names}


def _lookup(archive: Archive, name: str) -> Lookup:
    if name in ("token", "position"):
        stored = getattr(archive.rows, name)
        values = np.zeros(stored.shape, stored.dtype)
        for start, stop in blocks(archive):
            values[start:stop] = stored[start:stop]
        return _Of(values)
    first_row = archive.example_table.index().first_row
    return _OfExample(first_row, None if name == "example" else _column(archive, name))


def _column(archive: Archive, name: str) -> Array:
    try:
        column = archive.example_table.table([name])[name]
    except DatasetError as error:
        raise AnalysisError(
            f"batches cannot have a column {name!r}: rows have token, position, example, and {error}"
        ) from error
    types = pa.types
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
        raise AnalysisError(
            f"batches cannot have the column {name!r}, which holds {column.type}: batches are tensors; ask for "
            "'example', and look the value up by that number"
        )
    if column.null_count:
        raise AnalysisError(
            f"batches cannot have the column {name!r}, which is null for {column.null_count:,} examples: choose rows "
            f"that have it (where='{name} != null') and look the value up by 'example'"
        )
    values: Array = column.to_numpy()
    return values


class _Of:
    """Values by row."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def __call__(self, rows: Rows) -> Array:
        return self._values[rows]


class _OfExample:
    """Values by the example that a row belongs to, or, without values, its number."""

    def __init__(self, first_row: Rows, values: Array | None) -> None:
        self._first_row = first_row
        self._values = values

    def __call__(self, rows: Rows) -> Array:
        examples = np.searchsorted(self._first_row, rows, side="right") - 1
        return examples if self._values is None else self._values[examples]
