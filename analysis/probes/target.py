"""What a probe is to predict: a number or a name for every row, read from the archive by one line of text.

The text is one of

* ``token``, ``position`` or ``example`` of the row;
* a column of the example table: one value for all rows of an example, or a list with one value a token;
* a condition, such as ``position > 10 and label == "code"``: true or false.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from residua.analysis.rows.columns import examples_of, positions_of, row_numbers
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

Values: TypeAlias = npt.NDArray[Any]

_ROW_COLUMNS = ("token", "position", "example")


class Target:
    """The values of a target, by rows.

    Args:
        archive: The archive.
        text: What is meant; see the module's head.

    Attributes:
        names: What the values of `values` stand for, where they are no numbers.

    Raises:
        AnalysisError: There is no such column, it has values that cannot be predicted, or the text cannot be read.
    """

    def __init__(self, archive: Archive, text: str) -> None:
        self._archive = archive
        self._text = text
        self._condition: RowFilter | None = None
        self._column: _Column | None = None
        self.names: tuple[str | bool, ...] | None = None
        if text in _ROW_COLUMNS:
            return
        if text in archive.example_table.column_types() or text in ("n_tokens", "n_rows"):
            self._column = _read(archive, text)
            self.names = self._column.names
        else:
            self._condition = _condition(archive, text)
            self.names = (False, True)

    def values(self, rows: npt.NDArray[np.int64]) -> Values:
        """Return the values of `rows`, (rows,): int64, or float64 with NaN where there is none.

        Of a target with `names` they are numbers of names, and float64 NaN where there is none.

        Args:
            rows: Row numbers, ascending and near each other.
        """
        archive, column = self._archive, self._column
        if self._condition is not None:
            first = int(rows[0])
            mask = self._condition.mask(archive, first, int(rows[-1]) + 1)[rows - first]
            return np.asarray(mask.astype(np.int64))
        if column is None:
            return row_numbers(archive, self._text, rows)
        examples = examples_of(archive, rows)
        if column.starts is None:
            return np.asarray(column.values[examples])
        positions = positions_of(archive, rows)
        if (positions >= archive.example_table.index().n_tokens[examples]).any():
            raise DamagedArchiveError(f"{archive.path}/rows/position has positions behind the end of their example")
        return np.asarray(column.values[column.starts[examples] + positions])


@dataclass(frozen=True)
class _Column:
    """A column of the example table; where an example has many values, `starts` says where its own begin."""

    values: Values
    names: tuple[str | bool, ...] | None
    starts: npt.NDArray[np.int64] | None


def _condition(archive: Archive, text: str) -> RowFilter:
    try:
        condition = RowFilter.parse(text)
    except AnalysisError as error:
        if text.replace("_", "a").isalnum():
            known = ", ".join([*_ROW_COLUMNS, *archive.example_table.column_types()])
            raise AnalysisError(
                f"there is no column {text!r} to predict: there are {known}, and conditions such as 'position > 10'"
            ) from None
        raise AnalysisError(f"the target {text!r} is neither a column nor a condition: {error}") from error
    condition.mask(archive, 0, 0)  # names that do not exist come up here
    return condition


def _read(archive: Archive, name: str) -> _Column:
    column = archive.example_table.table([name])[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no examples
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not _is_list(column.type):
        return _Column(*_numbers(name, column), None)
    found = pc.call_function("list_value_length", [column]).fill_null(0)
    lengths = found.to_numpy(zero_copy_only=False).astype(np.int64)
    n_tokens = archive.example_table.index().n_tokens
    wrong = np.flatnonzero(lengths != n_tokens)
    if wrong.size:
        raise AnalysisError(
            f"column {name!r} holds lists, which must have one value a token, but example {wrong[0]} has "
            f"{lengths[wrong[0]]:,} values and {n_tokens[wrong[0]]:,} tokens: choose another column"
        )
    return _Column(*_numbers(name, column.flatten()), np.cumsum(lengths) - lengths)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _numbers(name: str, column: Any) -> tuple[Values, tuple[str | bool, ...] | None]:
    """Return the values as numbers, and what they stand for if they are none themselves."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_boolean(column.type):
        return _with_gaps(column.cast(pa.int64())), (False, True)
    if types.is_string(column.type) or types.is_large_string(column.type):
        encoded = column.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        ranks = pa.array(np.argsort(np.argsort(names)))  # names are numbered in their order, not in that of the rows
        return _with_gaps(ranks.take(encoded.indices)), tuple(sorted(names))
    if types.is_integer(column.type) or types.is_floating(column.type):
        return _with_gaps(column), None
    raise AnalysisError(f"column {name!r} holds {column.type}: a probe predicts numbers, texts, true or false")


def _with_gaps(column: Any) -> Values:
    if column.null_count or pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False))
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(np.int64)
