"""Which tokens of which examples an edit selects: by keys of a mapping, all of which must hold.

| key | value |
| --- | --- |
| `examples` | numbers of examples |
| `positions` | token positions in their example, negative ones from its end, or a slice as text, ``"-3:"`` |
| `rows` | rows of the archive |
| `tokens` | token ids |
| `where` | from a column of the dataset to a value or a list of values, ``{label: python}`` |
| `heads`, `channels` | not tokens, but the elements of each selected row |
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from residua.store.base.errors import PlanError
from residua.store.examples.memory import Examples, ExampleSource
from residua.store.examples.token_values import is_list
from residua.store.selection.evaluate import ColumnAnswers, Items, LongArray, Mask, evaluate
from residua.store.selection.grammar import At, ColumnIn, Comparison, Condition, Every, Value, parse_slice
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
        where: From a column of the dataset to the values that are selected.
        heads: Heads, for sites that have them.
        channels: Channels, along the last axis.
    """

    examples: tuple[int, ...] | None = None
    positions: tuple[int, ...] | slice | None = None
    rows: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    where: Mapping[str, tuple[Value, ...]] | None = None
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def is_every_token(self) -> bool:
        """Whether no position, row or token is named, so that newly generated tokens are selected too."""
        return self.positions is None and self.rows is None and self.tokens is None

    @property
    def of_examples(self) -> Condition:
        """The condition on examples."""
        columns = [ColumnIn(name, values) for name, values in (self.where or {}).items()]
        return Every((*_among("example", self.examples), *columns))

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


def _where(name: str, value: object) -> dict[str, tuple[Value, ...]]:
    if not isinstance(value, Mapping) or not value or len(value) > _MAX_COLUMNS:
        raise PlanError(f"{name} gives values by column, such as {{label: python}}, found {str(value)[:60]!r}")
    found = {}
    for column, values in value.items():
        listed = values if isinstance(values, list | tuple) else [values]
        if not all(isinstance(item, str | int | float | bool | None) for item in listed) or len(listed) > MAX_LIST:
            raise PlanError(f"{name}: the values of {column!r} are plain texts or numbers")
        found[text(name, column)] = tuple(listed)
    return found


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "examples": whole_numbers,
    "positions": _positions,
    "rows": whole_numbers,
    "tokens": whole_numbers,
    "where": _where,
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
        self._known: dict[int, tuple[Selection, Mask, Condition]] = {}

    def check(self, selection: Selection) -> None:
        """Look for the examples, rows, positions and columns that a selection names.

        Raises:
            PlanError: One of them does not exist.
        """
        require_examples(selection.examples or (), self._table, self.source.place)
        if selection.rows is not None and max(selection.rows) >= self.source.n_rows:
            raise PlanError(
                f"there is no row {max(selection.rows):,}: {self.source.place} has {self.source.n_rows:,} rows"
            )
        if isinstance(selection.positions, tuple):
            self.check_positions(selection.positions, selection.examples)
        for name in selection.where or {}:
            require_column(name, self._table)
            if is_list(self._table.column_types()[name]):
                raise PlanError(
                    f"where: the column {name!r} has a list for each example, and an edit compares one value for each: "
                    "choose the tokens by positions, rows or tokens"
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
        _, examples, condition = self._prepared(selection)
        n_tokens = int(self._table.index().n_tokens[example])
        if not examples[example]:
            return np.zeros(n_tokens, bool)
        numbers = partial(self._numbers, example)
        return evaluate(condition, Items(n_tokens, ("token", "row"), numbers, self._of_examples))

    def _of_examples(self, condition: Comparison | ColumnIn) -> Mask:
        return self._answers(condition).mask

    def _numbers(self, example: int, name: str) -> LongArray:
        """Return the ``token`` or the ``row`` of each token of an example; -1 for one that has no row."""
        if name == "token":
            return self._table.tokens(example).astype(np.int64)
        start, stop = self._table.rows(example)
        rows = np.full(int(self._table.index().n_tokens[example]), -1)
        rows[self._table.positions(example)] = np.arange(start, stop)
        return rows

    def includes(self, selection: Selection, example: int) -> bool:
        """Return whether `example` is among the selected ones, whatever its tokens."""
        return bool(self._prepared(selection)[1][example])

    def _prepared(self, selection: Selection) -> tuple[Selection, Mask, Condition]:
        """Return a selection with the examples that it selects and its condition on tokens."""
        if id(selection) not in self._known:  # kept with it, so that the id stays its own
            numbers = np.arange(len(self._table))
            examples = evaluate(
                selection.of_examples, Items(len(numbers), ("example",), lambda _: numbers, self._of_examples)
            )
            self._known[id(selection)] = selection, examples, selection.of_tokens
        return self._known[id(selection)]


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
