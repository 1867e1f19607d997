"""Converts the user's own columns to Arrow. A column's first values set its type, and no value loses anything.

Arrow silently drops fields of a dictionary that its type does not name. So every run of values is compared with the
column's type before it is converted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from residua.store.base.errors import DatasetError, shortened
from residua.store.examples.index import OWN_COLUMNS, Example

_TYPES = pa.types


def check_names(names: Sequence[str]) -> None:
    """Raise DatasetError if a column of the user has the name of one of the table's own."""
    for name in names:
        if name in OWN_COLUMNS:
            raise DatasetError(
                f"the dataset has a column {name!r}, and the example table has one of that name itself: rename it, for "
                f"example with dataset.rename_column({name!r}, {'my_' + name!r}), or leave it out"
            )


def columns_of(examples: Sequence[Example], known: Mapping[str, pa.DataType], first_index: int) -> dict[str, pa.Array]:
    """Convert the user's columns of a run of examples; an example without a column gets null.

    Args:
        examples: A run of examples.
        known: Types of the columns seen so far, in order; new columns follow as they appear.
        first_index: Number of the first example, for messages.

    Raises:
        DatasetError: A column has a reserved name, or a value that Arrow cannot store or that is of another kind than
            the values before it.
    """
    names = dict.fromkeys([*known, *(name for example in examples for name in example.columns)])
    check_names(list(names))
    return {
        name: _column(name, [example.columns.get(name) for example in examples], known.get(name), first_index, examples)
        for name in names
    }


def _column(
    name: str, values: list[object], known: pa.DataType | None, first_index: int, examples: Sequence[Example]
) -> pa.Array:
    kind = None if known is None or _TYPES.is_null(known) else known
    found = _converted(values, None)
    if found is not None and kind is None and _storable(found.type):
        return found
    if found is not None and kind is not None and _fits(found.type, kind):
        column = _converted(values, kind)
        if column is not None:
            return column
    rows = [example.columns.get("source_index") for example in examples]
    raise DatasetError(_describe_misfit(name, values, kind, first_index, rows))


def _converted(values: list[object], kind: Any) -> pa.Array | None:
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def _describe_misfit(
    name: str, values: list[object], kind: pa.DataType | None, first_index: int, rows: Sequence[object]
) -> str:
    """Return a message that names the first value that does not fit the ones before it."""
    for i, value in enumerate(values):
        found = _converted([value], None)
        if found is None or not _storable(found.type) or (kind is not None and not _fits(found.type, kind)):
            row = "" if rows[i] is None else f" (row {rows[i]} of the dataset)"
            return (
                f"column {name!r}, example {first_index + i}: cannot store {shortened(repr(value))}{row} as "
                f"{kind or 'an Arrow value'}; {_advice(name)}"
            )
        kind = found.type if kind is None and not _TYPES.is_null(found.type) else kind
    return (
        f"column {name!r}, examples {first_index} to {first_index + len(values) - 1}: the values do not fit "
        f"one type ({kind}); {_advice(name)}"
    )


def _advice(name: str) -> str:
    return f"give the column one plain type throughout, or leave it out, as dataset.remove_columns({name!r}) does"


def _storable(kind: Any) -> bool:
    """Return whether Parquet can hold the type; it has no structs without fields."""
    if _TYPES.is_struct(kind):
        return kind.num_fields > 0 and all(_storable(kind.field(i).type) for i in range(kind.num_fields))
    return _storable(kind.value_type) if _TYPES.is_list(kind) else True


def _fits(found: Any, kind: Any) -> bool:
    """Return whether values of type `found` can be stored as `kind` without loss."""
    if found.equals(kind) or _TYPES.is_null(found):
        return True
    if _TYPES.is_list(found) and _TYPES.is_list(kind):
        return _fits(found.value_type, kind.value_type)
    if _TYPES.is_struct(found) and _TYPES.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return all(field.name in fields and _fits(field.type, fields[field.name]) for field in found)
    return _same_kind(found, kind)


def _same_kind(found: pa.DataType, kind: pa.DataType) -> bool:
    if _TYPES.is_integer(found):
        return bool(_TYPES.is_integer(kind) or _TYPES.is_floating(kind))
    tests = (_TYPES.is_floating, _TYPES.is_string, _TYPES.is_binary, _TYPES.is_temporal)
    return any(test(found) and test(kind) for test in tests)


def type_of_values(kind: Any) -> pa.DataType:
    """Return the type that Arrow gives to values whose type, read from Parquet, is `kind`: elements are called item."""
    if _TYPES.is_list(kind):
        return pa.list_(type_of_values(kind.value_type))
    if _TYPES.is_struct(kind):
        return pa.struct([(field.name, type_of_values(field.type)) for field in kind])
    found: pa.DataType = kind
    return found


def value_bytes(value: object) -> int:
    """Estimate the memory of a column's value, in bytes: texts and containers by their length."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(value_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(value_bytes, value))
    return int(getattr(value, "nbytes", 8))
