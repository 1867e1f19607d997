"""Comparing columns with the values of a condition: the numbers of rows, and what examples have of any Arrow type."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from residua.store.base.errors import AnalysisError, DatasetError
from residua.store.read.archive import Archive
from residua.store.selection.grammar import Comparison, Value

Mask: TypeAlias = npt.NDArray[np.bool_]

ROW_NAMES = ("position", "token", "example")
_ORDER: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARROW_NAMES = {"in": "equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}


def compare_numbers(values: npt.NDArray[np.int64], comparison: Comparison) -> Mask:
    """Compare numbers of rows.

    Raises:
        AnalysisError: The condition compares them with a text, true or false.
    """
    wanted = [_fitting(value, pa.int64(), comparison) for value in comparison.values if value is not None]
    if comparison.operator != "in":
        return np.asarray(_ORDER[comparison.operator](values, wanted[0]))
    return np.isin(values, wanted) if wanted else np.zeros(len(values), bool)


def compare_column(archive: Archive, comparison: Comparison) -> Mask:
    """Compare a column of the example table: one answer an example.

    Raises:
        AnalysisError: There is no such column, or its values are of another kind.
    """
    name = comparison.name
    try:
        column = archive.example_table.table([name])[name]
    except DatasetError as error:
        raise AnalysisError(f"a filter asks for {name!r}, but rows have {', '.join(ROW_NAMES)}, and {error}") from error
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = pa.chunked_array([np.zeros(len(column), bool)])
    for value in comparison.values:
        found = pc.call_function("or", [found, _answer(column, value, comparison)])
    return np.asarray(found.to_numpy())


def _answer(column: pa.ChunkedArray, value: Value, comparison: Comparison) -> pa.ChunkedArray:
    if value is None:
        return column.is_null()
    if pa.types.is_null(column.type):  # Arrow compares nothing with these
        return column.is_valid()
    name = _ARROW_NAMES[comparison.operator]
    try:
        return pc.call_function(name, [column, _fitting(value, column.type, comparison)]).fill_null(False)
    except pa.ArrowInvalid as error:  # whole numbers beyond 2**53, say, with a fraction
        raise AnalysisError(f"column {comparison.name!r} cannot be compared with {value!r}: {error}") from error


def _fitting(value: Value, kind: pa.DataType, comparison: Comparison) -> Any:
    """Return `value` as something that Arrow and numpy compare with a column of type `kind`."""
    types = pa.types
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_fitting = (is_number and (types.is_integer(kind) or types.is_floating(kind))) or (
        isinstance(value, bool) and types.is_boolean(kind)
    )
    if is_fitting or (isinstance(value, str) and (types.is_string(kind) or types.is_large_string(kind))):
        return value
    if isinstance(value, str) and types.is_temporal(kind):
        try:
            return pa.scalar(value).cast(kind)
        except pa.ArrowInvalid as error:
            raise AnalysisError(f"column {comparison.name!r} holds {kind}, and {value!r} is none ({error})") from error
    raise AnalysisError(
        f"a filter compares {comparison.name!r} with {value!r}, but that column holds {kind}: "
        "give a value of the column's own kind"
    )
