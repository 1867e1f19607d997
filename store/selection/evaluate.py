"""The one evaluator of conditions: a tree of `residua.store.selection.grammar` in, one answer a row or token out.

A null equals nothing but ``null``, and is neither less nor more than anything.
"""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from residua.store.base.errors import AnalysisError, DatasetError, few, shortened
from residua.store.examples.index import OWN_COLUMNS
from residua.store.examples.memory import Examples
from residua.store.examples.token_values import is_list, token_values
from residua.store.format.row_columns import MODALITIES
from residua.store.selection.grammar import At, ColumnIn, Comparison, Condition, Every, Not, Some, Value

Mask: TypeAlias = npt.NDArray[np.bool_]
LongArray: TypeAlias = npt.NDArray[np.int64]

ROW_NAMES = ("position", "token", "example")
"""The numbers of a row that a written condition may name; other names are columns of the example table."""

IS_LAST = "is_last"
"""Name of a condition: the row is the last of its example."""

FROM_END = "position from the end"
"""Number of an item that negative positions are compared with: its position less the tokens of its example."""

_MOST_LOOKED_AT = 1000  # texts of a column, for a text that may be meant
_ORDER: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARROW_NAMES = {"in": "equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}


class Items(NamedTuple):
    """What a condition is evaluated on: rows of an archive, the tokens of one example, or all examples.

    Attributes:
        n_items: How many there are.
        names: Names of the numbers that each has; other names are columns of the example table.
        numbers: Gives the number of each, by one of `names`, (items,); also 0 or 1 by `IS_LAST`, and by `FROM_END`.
        column: Gives the answer of each to a condition on a column of the example table, (items,).
    """

    n_items: int
    names: tuple[str, ...]
    numbers: Callable[[str], LongArray]
    column: "Callable[[Comparison | ColumnIn], Mask]"


def evaluate(condition: Condition, items: Items) -> Mask:
    """Return which of `items` meet a condition, (items,).

    Raises:
        AnalysisError: A written condition names a column that is not there, or compares it with another kind of value.
    """
    match condition:
        case Not(one):
            return ~evaluate(one, items)
        case Every(conditions):
            every = np.ones(items.n_items, bool)
            for one in conditions:
                every &= evaluate(one, items)
            return every
        case Some(conditions):
            some = np.zeros(items.n_items, bool)
            for one in conditions:
                some |= evaluate(one, items)
            return some
        case At(positions):
            return at_positions(positions, items.n_items)
        case Comparison(name, is_column=False) if name in items.names or name == IS_LAST:
            return _of_numbers(condition, items)
    return items.column(condition)


def _of_numbers(comparison: Comparison, items: Items) -> Mask:
    """Return which items meet a condition on one of their numbers."""
    if comparison.name == "position":
        return _compare_positions(items, comparison)
    if comparison.name == IS_LAST:
        wanted = [_fitting(value, pa.bool_(), comparison) for value in comparison.values if value is not None]
        return np.isin(items.numbers(IS_LAST), np.array(wanted, np.int64))
    return _compare_numbers(items.numbers(comparison.name), _coded(comparison))


def _compare_positions(items: Items, comparison: Comparison) -> Mask:
    """Compare positions, or, with negative numbers, positions from the end."""
    found = np.zeros(items.n_items, bool)
    for is_negative, name in ((False, "position"), (True, FROM_END)):
        values = [value for value in comparison.values if (_is_number(value) and value < 0) == is_negative]
        if values or not (is_negative or comparison.values):
            found |= _compare_numbers(items.numbers(name), comparison._replace(values=values))
    return found


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def at_positions(positions: Sequence[int] | LongArray | slice, n_tokens: int) -> Mask:
    """Return which tokens of an example are at `positions`, (tokens,); negative ones count from its end."""
    mask = np.zeros(n_tokens, bool)
    if isinstance(positions, slice):
        mask[positions] = True
    else:
        at = np.asarray(positions, np.int64)
        at = np.where(at < 0, at + n_tokens, at)
        mask[at[(at >= 0) & (at < n_tokens)]] = True
    return mask


class Answers(NamedTuple):
    """The answers to a condition on a column.

    Attributes:
        mask: One answer for each example, or for each token of all examples, one after the other.
        starts: Where each example begins among the tokens, then their number; None for one answer an example.
    """

    mask: Mask
    starts: LongArray | None


class ColumnAnswers:
    """Answers to conditions on columns of an example table; each is worked out once.

    Args:
        table: The example table.

    Attributes:
        table: As given.
    """

    def __init__(self, table: Examples) -> None:
        self.table = table
        self._known: dict[object, Answers] = {}

    def __call__(self, condition: Comparison | ColumnIn) -> "Answers":
        """Return the answers of all examples, or of all tokens if the column holds lists.

        Raises:
            AnalysisError: There is no such column, its lists have not one value a token, or a `Comparison` has a
                value of another kind, or a text that no example has.
        """
        # 1 equals true in Python, but not in a column.
        key = condition, tuple(map(type, condition.values))
        if key not in self._known:
            name = condition.name
            try:
                column = self.table.table([name])[name]
            except DatasetError as error:
                raise AnalysisError(
                    f"a filter asks for {name!r}, but rows have {', '.join(ROW_NAMES)}, and {error}"
                ) from error
            compare: Any = _compare_column if isinstance(condition, Comparison) else _equals_any
            # Of the table's own lists, `token` is in input_ids, and positions are those of the rows.
            if is_list(column.type) and name not in OWN_COLUMNS:
                values, starts = token_values(name, column, self.table.index().n_tokens)
                self._known[key] = Answers(compare(values, condition), starts)
            else:
                self._known[key] = Answers(compare(column, condition), None)
        return self._known[key]


def _coded(comparison: Comparison) -> Comparison:
    """Return a comparison of the modality of rows with the numbers that are stored for its words."""
    if comparison.name != "modality" or comparison.operator != "in":
        return comparison
    values: list[Value] = []
    for value in comparison.values:
        if isinstance(value, str) and value not in MODALITIES:
            raise AnalysisError(f"a filter compares modality with {value!r}: it is one of {', '.join(MODALITIES)}")
        values.append(MODALITIES.index(value) if isinstance(value, str) else value)
    return comparison._replace(values=values)


def _compare_numbers(values: LongArray, comparison: Comparison) -> Mask:
    wanted: Any = comparison.values
    if not isinstance(wanted, np.ndarray):
        wanted = [_fitting(value, pa.int64(), comparison) for value in wanted if value is not None]
    if comparison.operator != "in":
        return np.asarray(_ORDER[comparison.operator](values, wanted[0]))
    if not isinstance(wanted, np.ndarray):
        return np.isin(values, wanted) if len(wanted) else np.zeros(len(values), bool)
    at = np.searchsorted(wanted, values)  # ascending: a selection of many rows is looked through for every example
    return np.asarray(wanted[np.minimum(at, len(wanted) - 1)] == values) if len(wanted) else np.zeros(len(values), bool)


def _equals_any(column: pa.ChunkedArray, condition: ColumnIn) -> Mask:
    values = frozenset(condition.values)
    found = (isinstance(value, Hashable) and value in values for value in column.to_pylist())
    return np.fromiter(found, bool, len(column))


def _compare_column(column: pa.ChunkedArray, comparison: Comparison) -> Mask:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = pa.chunked_array([np.zeros(len(column), bool)])
    for value in comparison.values:
        answer = _answer(column, value, comparison)
        if isinstance(value, str) and comparison.operator == "in" and not comparison.may_miss:
            _require(value, column, answer, comparison.name)
        found = pc.call_function("or", [found, answer])
    return np.asarray(found.to_numpy())


def _require(value: str, column: pa.ChunkedArray, answer: pa.ChunkedArray, name: str) -> None:
    """Raise AnalysisError if a column of texts has `value` nowhere."""
    if not len(column) or not is_text(column.type) or pc.call_function("any", [answer]).as_py():
        return
    there = [text for text in column.unique()[:_MOST_LOOKED_AT].to_pylist() if text is not None]
    near = get_close_matches(value, there, n=1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    raise AnalysisError(
        f"no example has {name} == {value!r}; there is {few([repr(shortened(text, 40)) for text in there]) or 'null'}. "
        f'{meant}If the text may be missing, put a question mark behind it: {name} == "{value}"?'
    )


def _answer(column: pa.ChunkedArray, value: Value, comparison: Comparison) -> pa.ChunkedArray:
    if value is None:
        return column.is_null()
    if pa.types.is_null(column.type):  # Arrow compares nothing with these
        return column.is_valid()
    name = _ARROW_NAMES[comparison.operator]
    try:
        return pc.call_function(name, [column, _fitting(value, column.type, comparison)]).fill_null(False)
    except pa.ArrowInvalid as error:  # for example whole numbers beyond 2**53 with a fraction
        raise AnalysisError(f"column {comparison.name!r} cannot be compared with {value!r}: {error}") from error


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _fitting(value: Value, kind: pa.DataType, comparison: Comparison) -> Any:
    """Return `value` as something that Arrow and numpy compare with a column of type `kind`."""
    types = pa.types
    is_fitting = (_is_number(value) and (types.is_integer(kind) or types.is_floating(kind))) or (
        isinstance(value, bool) and types.is_boolean(kind)
    )
    if is_fitting or (isinstance(value, str) and is_text(kind)):
        return value
    if isinstance(value, str) and types.is_temporal(kind):
        try:
            return pa.scalar(value).cast(kind)
        except pa.ArrowInvalid as error:
            raise AnalysisError(
                f"column {comparison.name!r} holds {kind}, and {value!r} is not one ({error})"
            ) from error
    raise AnalysisError(
        f"a filter compares {comparison.name!r} with {value!r}, but that column holds {kind}: "
        "give a value of the column's own kind"
    )
