"""Which tokens of which examples an edit selects: by keys of a mapping, all of which must hold.

A condition means what it means for rows (`residua.store.selection.row_filter`), token by token.

| key | value |
| --- | --- |
| `examples` | numbers of examples |
| `positions` | token positions in their example, negative ones from its end, or a slice as text, ``"-3:"`` |
| `rows` | rows of the archive |
| `tokens` | token ids |
| `where` | a condition, ``'label == "a" and position > 0'``; or values of examples by column, ``{label: a}`` |
| `allow_empty` | whether a `where` may match no example |
| `heads`, `channels` | not tokens, but the elements of each selected row |
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from residua.store.base.errors import AnalysisError, PlanError
from residua.store.examples.memory import Examples, ExampleSource
from residua.store.examples.token_values import is_list
from residua.store.selection.evaluate import (
    FROM_END,
    IS_LAST,
    ROW_NAMES,
    ColumnAnswers,
    Items,
    LongArray,
    Mask,
    evaluate,
)
from residua.store.selection.grammar import (
    At,
    ColumnIn,
    Comparison,
    Condition,
    Every,
    Value,
    may_miss,
    parse_condition,
    parse_slice,
)
from residua.store.selection.values import MAX_LIST, signed_numbers, text, whole_numbers

_MAX_COLUMNS = 1000


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows an edit changes, and which elements of each; None selects all.

    Attributes:
        examples: Numbers of examples.
        positions: Token positions in their example, or a slice of them.
        rows: Rows of the archive.
        tokens: Token ids.
        where: A written condition on tokens, or from a column of the dataset to the values that are selected.
        allow_empty: Whether `where` may match no example.
        heads: Heads, for sites that have them.
        channels: Channels, along the last axis.
    """

    examples: tuple[int, ...] | None = None
    positions: tuple[int, ...] | slice | None = None
    rows: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    where: Mapping[str, tuple[Value, ...]] | str | None = None
    allow_empty: bool = False
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def is_every_token(self) -> bool:
        """Whether no position, row, token or condition is given, so that newly generated tokens are selected too."""
        return self.positions is None and self.rows is None and self.tokens is None and not isinstance(self.where, str)

    @property
    def of_examples(self) -> Condition:
        """The condition on examples."""
        return Every((*_among("example", self.examples), *self.of_columns))

    @property
    def of_columns(self) -> list[Condition]:
        """The conditions on columns of whole examples."""
        return (
            [ColumnIn(name, values) for name, values in self.where.items()] if isinstance(self.where, Mapping) else []
        )

    @property
    def of_tokens(self) -> Condition:
        """The condition on the tokens of a selected example."""
        at = [] if self.positions is None else [At(self.positions)]
        return Every((*at, *_among("row", self.rows), *_among("token", self.tokens)))


def _among(name: str, numbers: tuple[int, ...] | None) -> list[Condition]:
    return [] if numbers is None else [Comparison(name, "in", np.sort(np.asarray(numbers, np.int64)))]


def parse_selection(item: Mapping[str, Any]) -> Selection:
    """Return the selection that a mapping states; other keys of it are left alone.

    Raises:
        PlanError: A value is not of the kind that its key has.
    """
    return Selection(**{name: read(name, item[name]) for name, read in _READERS.items() if item.get(name) is not None})


def _positions(name: str, value: object) -> tuple[int, ...] | slice:
    return parse_slice(value, name) if isinstance(value, str) else signed_numbers(name, value)


def _where(name: str, value: object) -> dict[str, tuple[Value, ...]] | str:
    if isinstance(value, str):
        _parsed(value)
        return value
    if not isinstance(value, Mapping) or not value or len(value) > _MAX_COLUMNS:
        raise PlanError(
            f"{name} is a condition, such as 'label == \"a\"', or gives values by column, such as {{label: a}}, "
            f"found {str(value)[:60]!r}"
        )
    found = {}
    for column, values in value.items():
        listed = values if isinstance(values, list | tuple) else [values]
        if not all(isinstance(item, str | int | float | bool | None) for item in listed) or len(listed) > MAX_LIST:
            raise PlanError(f"{name}: the values of {column!r} are plain texts or numbers")
        found[text(name, column)] = tuple(listed)
    return found


def _parsed(condition: str) -> Condition:
    try:
        return parse_condition(condition)
    except AnalysisError as error:
        raise PlanError(f"where: {error}") from error


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{name} is true or false, found {str(value)[:60]!r}")
    return value


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "examples": whole_numbers,
    "positions": _positions,
    "rows": whole_numbers,
    "tokens": whole_numbers,
    "where": _where,
    "allow_empty": _flag,
    "heads": whole_numbers,
    "channels": whole_numbers,
}


class TokenSelector:
    """Answers for one archive, or one run, which tokens an edit selects.

    Args:
        source: The archive or run whose examples, rows and columns edits name.

    Attributes:
        source: The archive or run.
    """

    def __init__(self, source: ExampleSource) -> None:
        self.source = source
        self._table = source.example_table
        self._answers = ColumnAnswers(self._table)
        self._known: dict[int, _Prepared] = {}

    def check(self, selection: Selection) -> None:
        """Look for the examples, rows, positions and columns that a selection names.

        Raises:
            PlanError: One of them does not exist, or no example has the values that it names.
        """
        require_examples(selection.examples or (), self._table, self.source.place)
        if selection.rows is not None and max(selection.rows) >= self.source.n_rows:
            raise PlanError(
                f"there is no row {max(selection.rows):,}: {self.source.place} has {self.source.n_rows:,} rows"
            )
        if isinstance(selection.positions, tuple):
            self.check_positions(selection.positions, selection.examples)
        self._check_columns(selection)

    def _check_columns(self, selection: Selection) -> None:
        if isinstance(selection.where, str):
            if len(self._table):
                self.tokens(selection, 0)  # finds wrong names and values
            return
        for name in selection.where or {}:
            require_column(name, self._table)
            if is_list(self._table.column_types()[name]):
                raise PlanError(
                    f"where: the column {name!r} has a list for each example, and an edit compares one value for each: "
                    f"choose tokens by a condition, such as '{name} == 1', or by positions, rows or tokens"
                )
        if (
            selection.where
            and not selection.allow_empty
            and not self._among_examples(Every(tuple(selection.of_columns))).any()
        ):
            asked = " and ".join(f"{name} in {list(values)!r}"[:100] for name, values in selection.where.items())
            raise PlanError(
                f"where: no example of {self.source.place} has {asked}: name values that are there, or say that it may "
                "match nothing by allow_empty: true"
            )

    def check_positions(self, positions: tuple[int, ...], examples: tuple[int, ...] | None) -> None:
        """Raise PlanError if no example among `examples` (all if None) has one of `positions`."""
        n_tokens = self._table.index().n_tokens
        longest = int((n_tokens if examples is None else n_tokens[list(examples)]).max(initial=0))
        for position in positions:
            if not -longest <= position < longest:
                raise PlanError(f"there is no position {position}: the longest selected example has {longest} tokens")

    def tokens(self, selection: Selection, example: int) -> Mask:
        """Return for each token of `example` whether it is selected, (tokens,)."""
        prepared = self._prepared(selection)
        n_tokens = int(self._table.index().n_tokens[example])
        if not prepared.examples[example]:
            return np.zeros(n_tokens, bool)
        numbers, column = partial(self._numbers, example), partial(self._of_tokens, example)
        found = evaluate(prepared.of_tokens, Items(n_tokens, ("token", "row"), numbers, column))
        if prepared.written is not None:
            try:
                found &= evaluate(prepared.written, Items(n_tokens, ROW_NAMES, numbers, column))
            except AnalysisError as error:
                raise PlanError(f"where: {error}") from error
        return found

    def _among_examples(self, condition: Condition) -> Mask:
        """Return which examples meet a condition, (examples,)."""
        numbers = np.arange(len(self._table))
        items = Items(len(numbers), ("example",), lambda _: numbers, lambda column: self._answers(column).mask)
        return evaluate(condition, items)

    def _of_tokens(self, example: int, condition: Comparison | ColumnIn) -> Mask:
        """Return the answer of each token of an example to a condition on a column, (tokens,)."""
        found, starts = self._answers(condition)
        if starts is None:
            return np.full(int(self._table.index().n_tokens[example]), found[example])
        return found[starts[example] : starts[example + 1]]

    def _numbers(self, example: int, name: str) -> LongArray:
        """Return a number of each token of an example; the ``row`` of one that has none is -1."""
        n_tokens = int(self._table.index().n_tokens[example])
        at = np.arange(n_tokens)
        if name == "token":
            return self._table.tokens(example).astype(np.int64)
        if name != "row":
            last = (at == n_tokens - 1).astype(np.int64)
            of_place: dict[str, LongArray] = {"position": at, FROM_END: at - n_tokens, IS_LAST: last}
            return of_place.get(name, np.full(n_tokens, example))
        start, stop = self._table.rows(example)
        rows = np.full(n_tokens, -1)
        rows[self._table.positions(example)] = np.arange(start, stop)
        return rows

    def includes(self, selection: Selection, example: int) -> bool:
        """Return whether `example` is among the selected ones, whatever its tokens."""
        return bool(self._prepared(selection).examples[example])

    def _prepared(self, selection: Selection) -> "_Prepared":
        if id(selection) not in self._known:
            self._known[id(selection)] = _Prepared(
                selection,
                self._among_examples(selection.of_examples),
                selection.of_tokens,
                _written(selection),
            )
        return self._known[id(selection)]


def _written(selection: Selection) -> "Condition | None":
    """Return the condition that a selection states as text; None if there is none."""
    if not isinstance(selection.where, str):
        return None
    condition = _parsed(selection.where)
    return may_miss(condition) if selection.allow_empty else condition


class _Prepared(NamedTuple):
    """A selection and what follows from it.

    Attributes:
        selection: The selection, kept so that its id stays its own.
        examples: Which examples may have selected tokens, (examples,).
        of_tokens: The condition on their tokens.
        written: The written condition on them, if there is one.
    """

    selection: Selection
    examples: Mask
    of_tokens: Condition
    written: "Condition | None"


def require_examples(named: Iterable[int], table: Examples, where: str) -> None:
    """Raise PlanError unless `table` has the examples `named`; `where` says whose it is."""
    largest = max(named, default=-1)
    if largest >= len(table):
        raise PlanError(f"there is no example {largest:,}: {where} has {len(table):,}, counted from 0")


def require_column(name: str, table: Examples) -> None:
    """Raise PlanError unless `table` has the column `name`, besides its own."""
    known = table.column_types()
    if name not in known:
        raise PlanError(f"the examples have no column {name!r}; they have {', '.join(known) or 'none'}")
