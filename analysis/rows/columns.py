"""Numbers that belong to a row: token, position, example, its place in an image, and numeric columns of examples."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError, DamagedArchiveError, DatasetError
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

Numbers: TypeAlias = npt.NDArray[np.int64]
Integers = TypeVar("Integers", bound=npt.NDArray[Any])
Lookup: TypeAlias = Callable[[Numbers], Array]


def row_numbers(archive: Archive, name: str, rows: Numbers) -> Numbers:
    """Return the `token`, `position`, `example`, or a column of images, of each of `rows`, (rows,) int64, as stored.

    Args:
        archive: The archive.
        name: One of the plan's ``row_columns``.
        rows: Row numbers, ascending and close together: every row between the first and the last is read.

    Raises:
        NotCapturedError: A row is not captured yet.
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    first = int(rows[0])
    values: Numbers = getattr(archive.rows, name).numpy(slice(first, int(rows[-1]) + 1), dtype=np.int64)
    return values[rows - first]


def examples_of(archive: Archive, rows: Numbers) -> Numbers:
    """Return the number of each row's example, (rows,) int64; `rows` as in `row_numbers`.

    Raises:
        DamagedArchiveError: The archive has no example of that number.
    """
    return checked_examples(archive, rows, row_numbers(archive, "example", rows))


def positions_of(archive: Archive, rows: Numbers) -> Numbers:
    """Return the position of each row's token in its example, (rows,) int64; `rows` as in `row_numbers`.

    Raises:
        DamagedArchiveError: A position lies beyond the end of the longest example.
    """
    end = int(archive.example_table.index().n_tokens.max(initial=0))
    return _checked(archive, "position", rows, row_numbers(archive, "position", rows), end)


def checked_examples(archive: Archive, rows: Numbers, examples: Integers) -> Integers:
    """Return `examples`, the stored example numbers of `rows`, if all of them exist.

    Raises:
        DamagedArchiveError: The archive has no example of that number.
    """
    return _checked(archive, "example", rows, examples, archive.example_table.index().n_examples)


def _checked(archive: Archive, name: str, rows: Numbers, values: Integers, end: int) -> Integers:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < max(1, end):
        raise DamagedArchiveError(
            f"{archive.place}/rows/{name} holds a number outside 0 to {max(1, end) - 1:,} in rows {rows.min():,} to "
            f"{rows.max():,}: the array and the example table do not belong to the same archive"
        )
    return values


def lookups(archive: Archive, names: Iterable[str]) -> Mapping[str, Lookup]:
    """Return, for each of the columns `names`, a function from row numbers, in any order, to values, (rows,).

    Columns of rows (`token`, `position`, and those of images) are held in memory, 1 or 4 bytes a row; the others take
    memory for each example.

    Raises:
        AnalysisError: There is no such column, or it does not hold numbers.
    """
    return {name: _lookup(archive, name) for name in names}


def _lookup(archive: Archive, name: str) -> Lookup:
    if name in archive.plan.row_columns and name != "example":
        stored = getattr(archive.rows, name)
        values = np.zeros(stored.shape, stored.dtype)
        for start, stop in blocks(archive):
            values[start:stop] = stored[start:stop]
        return partial(_by_row, values)
    first_row = archive.example_table.index().first_row
    return partial(_by_example, first_row, None if name == "example" else _column(archive, name))


def _by_row(values: Array, rows: Numbers) -> Array:
    return values[rows]


def _by_example(first_row: Numbers, values: Array | None, rows: Numbers) -> Array:
    """Return the value of each row's example, or the example's number if there are no values."""
    examples = np.searchsorted(first_row, rows, side="right") - 1
    return examples if values is None else values[examples]


def _column(archive: Archive, name: str) -> Array:
    try:
        column = archive.example_table.table([name])[name]
    except DatasetError as error:
        raise AnalysisError(
            f"batches cannot have a column {name!r}: rows have {', '.join(archive.plan.row_columns)}, and {error}"
        ) from error
    types = pa.types
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
        raise AnalysisError(
            f"batches cannot have the column {name!r}, which holds {column.type}, because batches are tensors: ask for "
            "'example' and look up the value by that number"
        )
    if column.null_count:
        raise AnalysisError(
            f"batches cannot have the column {name!r}, which is null for {column.null_count:,} examples: choose only "
            f"rows that have a value (where='{name} != null'), or look up the value by 'example'"
        )
    values: Array = column.to_numpy()
    return values
