"""A table that a user gives, such as a side table, as Arrow: from any of the usual libraries, or from a file.

Its columns become one of the few types that side tables have (`residua.store.examples.side_tables.KINDS`).
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from residua.store.base.errors import DatasetError
from residua.store.examples.side_tables import KINDS
from residua.store.examples.token_values import is_list
from residua.store.storage.mirror import fetched

_NO_VALUE = ["", "null", "NULL", "nan", "NaN"]  # of a CSV file; NA is a label as any other


def as_arrow(table: Any, key: str) -> pa.Table:
    """Return a table of the user as Arrow: of pyarrow, pandas, polars, a mapping, a list of mappings, or a file.

    Args:
        table: The table; a path ends in ``.csv``, ``.parquet`` or ``.jsonl``.
        key: Name of the key, which may be the index of a data frame of pandas.

    Raises:
        DatasetError: It is none of these, or mixes types in a column.
        OSError: The file cannot be read.
    """
    try:
        found = _converted(table, key)
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"the table cannot be read: {error}. Give each column one plain type: texts, numbers, true and false, or "
            "lists of these"
        ) from error
    if found is None:
        raise DatasetError(
            "give a table of pyarrow, pandas or polars, a mapping from columns to values, a list of mappings, or a "
            f"file that ends in .csv, .parquet or .jsonl; this is a {type(table).__name__}"
        )
    return found


def _converted(table: Any, key: str) -> pa.Table | None:
    if isinstance(table, str | PathLike):
        with fetched(table) as path:
            return _read_file(path)
    if isinstance(table, pa.Table | pa.RecordBatch):
        return pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table
    if hasattr(table, "reset_index"):  # pandas
        framed = table if key in table.columns or key not in table.index.names else table.reset_index()
        return pa.Table.from_pandas(framed, preserve_index=False)
    if hasattr(table, "to_arrow"):  # polars
        found: pa.Table = table.to_arrow()
        return found
    if isinstance(table, Mapping):
        return pa.table({str(name): pa.array(values, from_pandas=True) for name, values in table.items()})
    return pa.Table.from_pylist(table) if isinstance(table, list) else None


def _read_file(path: Path) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a file that ends in .csv, .parquet or .jsonl")
    if path.suffix == ".parquet":
        return pq.read_table(path)
    if path.suffix == ".csv":
        from pyarrow import csv

        options = csv.ConvertOptions(null_values=_NO_VALUE, strings_can_be_null=True, quoted_strings_can_be_null=False)
        return csv.read_csv(path, convert_options=options)
    if path.suffix in (".jsonl", ".ndjson"):
        from pyarrow import json

        return json.read_json(path)
    raise DatasetError(f"{path} is of no known kind: give a file that ends in .csv, .parquet or .jsonl")


def plain(name: str, column: Any) -> Any:
    """Return a column as one of the types of `KINDS`; NaN becomes null."""
    column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = _kind_of(column.type)
    if kind is None:
        raise DatasetError(
            f"column {name!r} of the side table holds {column.type}: it takes texts, whole numbers, numbers, true and "
            "false, or lists of these. Convert it, or leave it out"
        )
    try:
        column = column.cast(kind)
    except pa.ArrowException as error:
        raise DatasetError(f"column {name!r} of the side table cannot be stored as {kind}: {error}") from error
    if pa.types.is_floating(kind):
        column = pc.call_function("if_else", [pc.call_function("is_nan", [column]), pa.scalar(None, kind), column])
    if column.null_count == len(column):
        raise DatasetError(f"column {name!r} of the side table has no value: leave it out")
    return column


def _kind_of(kind: Any) -> pa.DataType | None:
    """Return the type in which values of a type are stored; None if they are not."""
    types = pa.types
    if is_list(kind):
        inner = None if is_list(kind.value_type) else _kind_of(kind.value_type)
        return None if inner is None else pa.list_(inner)
    tests = {
        "bool": (types.is_boolean,),
        "int64": (types.is_integer,),
        "float64": (types.is_floating,),
        "string": (types.is_string, types.is_large_string, types.is_string_view),
    }
    return next((KINDS[name] for name, found in tests.items() if any(test(kind) for test in found)), None)
