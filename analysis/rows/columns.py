"""Numbers that belong to a row: token, position, example, its place in an image, and numeric columns of examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError, DamagedArchiveError, DatasetError
from residua.store.examples.annotate import ROW
from residua.store.examples.index import OWN_COLUMNS
from residua.store.examples.token_values import TokenValues, is_list, token_values
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array

Numbers: TypeAlias = npt.NDArray[np.int64]
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


def token_numbers(archive: Archive, starts: Numbers, examples: Numbers, positions: Numbers) -> Numbers:
    """Return the number of each row's token among those of all examples, the first tokens of which are `starts`.

    Raises:
        DamagedArchiveError: A position lies beyond the end of its example.
    """
    found: Numbers = starts[examples] + positions
    if (found >= starts[examples + 1]).any():
        raise DamagedArchiveError(f"{archive.place}/rows/position has positions beyond the end of their example")
    return found


def checked_examples(archive: Archive, rows: Numbers, examples: Numbers) -> Numbers:
    """Return `examples`, the stored example numbers of `rows`, if all of them exist.

    Raises:
        DamagedArchiveError: The archive has no example of that number.
    """
    return _checked(archive, "example", rows, examples, archive.example_table.index().n_examples)


def _checked(archive: Archive, name: str, rows: Numbers, values: Numbers, end: int) -> Numbers:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < max(1, end):
        raise DamagedArchiveError(
            f"{archive.place}/rows/{name} holds a number outside 0 to {max(1, end) - 1:,} in rows {rows.min():,} to "
            f"{rows.max():,}: the array and the example table do not belong to the same archive"
        )
    return values


class ExampleColumns:
    """Columns of the example table for rows: the value of each row's example, as it is stored.

    A column of a side table with a line for each row has the value of the row.

    Args:
        archive: The archive.
        names: The columns.

    Raises:
        DatasetError: There is no such column.
    """

    def __init__(self, archive: Archive, names: Sequence[str]) -> None:
        self._archive = archive
        self._examples: pa.Table | None = None
        self._by_token: dict[str, TokenValues] = {}
        if names:
            table = archive.example_table
            self._examples = found = table.table(names)
            of_rows = {name for side in archive.side_tables if side.key == ROW for name in side.columns}
            n_tokens = table.index().n_tokens
            for name in of_rows & set(names):
                self._by_token[name] = token_values(name, found[name], n_tokens)

    def __call__(self, rows: Numbers) -> dict[str, pa.Array]:
        """Return the values of `rows`, which may come in any order, by column.

        Raises:
            DamagedArchiveError: A row names an example, or a position, that is not there.
        """
        if self._examples is None:
            return {}
        archive = self._archive
        example, position = (
            np.asarray(column.numpy(rows), np.int64) for column in (archive.rows.example, archive.rows.position)
        )
        examples = checked_examples(archive, rows, example)
        taken = self._examples.select([name for name in self._examples.column_names if name not in self._by_token])
        found = dict(zip(taken.column_names, taken.take(pa.array(examples)), strict=True))
        for name, (values, starts) in self._by_token.items():
            found[name] = values.take(pa.array(token_numbers(archive, starts, examples, position)))
        return {name: found[name].combine_chunks() for name in self._examples.column_names}


def lookups(
    archive: Archive, names: Iterable[str], chosen: Callable[[], Iterable["Numbers | range"]]
) -> Mapping[str, Lookup]:
    """Return, for each of the columns `names`, a function from row numbers, in any order, to values, (rows,).

    Columns of rows (`token`, `position`, and those of images) are held in memory, 1 or 4 bytes a row; columns with a
    value a token take 8 bytes a row, and the others memory for each example.

    Args:
        archive: The archive.
        names: The columns.
        chosen: Yields the rows that will be asked for, in pieces; a column may be null elsewhere.

    Raises:
        AnalysisError: There is no such column, it does not hold numbers, or it is null for a chosen row.
    """
    return {name: _lookup(archive, name, chosen) for name in names}


def _lookup(archive: Archive, name: str, chosen: Callable[[], Iterable["Numbers | range"]]) -> Lookup:
    index = archive.example_table.index()
    if name in archive.plan.row_columns and name != "example":
        stored = getattr(archive.rows, name)
        values = np.zeros(stored.shape, stored.dtype)
        for start, stop in blocks(archive):
            values[start:stop] = stored[start:stop]
        return partial(_by_row, values)
    if name == "example":
        return partial(_by_example, index.first_row, None)
    column = _column(archive, name)
    take: Callable[[Array, Numbers], Array] = partial(_by_example, index.first_row)
    if is_list(column.type) and name not in OWN_COLUMNS:
        tokens, first_token = token_values(name, column, index.n_tokens)
        kept = archive.example_table.table(["positions"])["positions"].combine_chunks().flatten().to_numpy()
        column, take = tokens.take(pa.array(np.repeat(first_token[:-1], index.n_rows) + kept)), _by_row
    if not _is_numeric(column.type):
        raise AnalysisError(
            f"batches cannot have the column {name!r}, which holds {column.type}, because batches are tensors: ask for "
            "'example' and look up the value by that number"
        )
    if column.null_count:
        is_null = np.asarray(column.is_null().to_numpy())
        if n_null := sum(int(take(is_null, np.asarray(rows, np.int64)).sum()) for rows in chosen()):
            raise AnalysisError(
                f"batches cannot have the column {name!r}, which is null for {n_null:,} of the chosen rows: choose "
                f"only rows that have a value (where='{name} != null'), or look up the value by 'example'"
            )
        column = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
    return partial(take, column.to_numpy())


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _by_row(values: Array, rows: Numbers) -> Array:
    return values[rows]


def _by_example(first_row: Numbers, values: Array | None, rows: Numbers) -> Array:
    """Return the value of each row's example, or the example's number if there are no values."""
    examples = np.searchsorted(first_row, rows, side="right") - 1
    return examples if values is None else values[examples]


def _column(archive: Archive, name: str) -> pa.ChunkedArray:
    try:
        return archive.example_table.table([name])[name]
    except DatasetError as error:
        raise AnalysisError(
            f"batches cannot have a column {name!r}: rows have {', '.join(archive.plan.row_columns)}, and {error}"
        ) from error
