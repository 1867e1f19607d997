"""Examples in memory: what a job needs of examples, and a table of them that no file holds.

`ExampleTable` reads the examples of an archive, and `ExamplesInMemory` holds those of a run. A job that takes
`Examples` works on both.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa

from residua.store.base.errors import DatasetError
from residua.store.examples.columns import columns_of
from residua.store.examples.index import (
    OWN_COLUMNS,
    Example,
    ExampleIndex,
    IntArray,
    add_to_digest,
    starts,
)


class Examples(Protocol):
    """Examples in order, with their tokens, kept positions and columns; `ExampleTable` reads the same from files."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def index(self) -> ExampleIndex:
        """Return the lengths of all examples."""
        ...

    def rows(self, example_index: int, /) -> tuple[int, int]:
        """Return the first row of one example, and the row after its last."""
        ...

    def tokens(self, example_index: int, /) -> IntArray:
        """Return the token ids of one example, int32, (tokens)."""
        ...

    def positions(self, example_index: int, /) -> IntArray:
        """Return the kept positions of one example, int32, (rows of the example)."""
        ...

    def batch(self, example_indices: Sequence[int], /) -> list[tuple[IntArray, IntArray]]:
        """Return (token ids, positions) of examples."""
        ...

    def lists(self, column: str, example_indices: Sequence[int], /) -> list[IntArray]:
        """Return one of the columns of lists of whole numbers for examples, int32."""
        ...

    def table(self, columns: Sequence[str] | None = None, /) -> pa.Table:
        """Return all examples as one table, or only `columns`."""
        ...

    def column_types(self) -> dict[str, pa.DataType]:
        """Return the Arrow types of the user's own columns; null for one without any value."""
        ...


class ExampleSource(Protocol):
    """Something that has examples and a row for each of their kept positions: an archive, or a run."""

    @property
    def place(self) -> str:
        """What messages call it."""
        ...

    @property
    def example_table(self) -> Examples:
        """Its examples."""
        ...

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        ...


class ExamplesInMemory:
    """A table of examples that are in memory; what `Examples` says.

    Args:
        examples: The examples, in order.

    Raises:
        DatasetError: A column has a reserved name, or values of several kinds.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = list(examples)
        self._columns = columns_of(self._examples, {}, 0)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples in order."""
        return iter(self._examples)

    def index(self) -> ExampleIndex:
        """Return the lengths of all examples."""
        return self._index

    @cached_property
    def _index(self) -> ExampleIndex:
        digest = hashlib.sha256()
        for example in self._examples:
            add_to_digest(digest, example.input_ids, example.positions)
        n_rows = np.array([example.positions.size for example in self._examples], np.int32)
        return ExampleIndex(
            n_tokens=np.array([example.input_ids.size for example in self._examples], np.int32),
            n_rows=n_rows,
            first_row=starts(n_rows),
            first_example=np.array([0, len(self._examples)], np.int64),
            digest=digest.hexdigest(),
        )

    def rows(self, example_index: int) -> tuple[int, int]:
        """Return the first row of one example, and the row after its last."""
        start, stop = self._index.first_row[example_index : example_index + 2].tolist()
        return start, stop

    def tokens(self, example_index: int) -> IntArray:
        """Return the token ids of one example, int32, (tokens)."""
        return self._examples[example_index].input_ids

    def positions(self, example_index: int) -> IntArray:
        """Return the kept positions of one example, int32, (rows of the example)."""
        return self._examples[example_index].positions

    def batch(self, example_indices: Sequence[int]) -> list[tuple[IntArray, IntArray]]:
        """Return (token ids, positions) of examples."""
        return [(self.tokens(number), self.positions(number)) for number in example_indices]

    def lists(self, column: str, example_indices: Sequence[int]) -> list[IntArray]:
        """Return one of the columns of lists of whole numbers for examples, int32."""
        values = self.table([column])[column]
        return [np.array(values[number].as_py(), np.int32) for number in example_indices]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all examples as one table, or only `columns`.

        Raises:
            DatasetError: There is no such column.
        """
        known = [*OWN_COLUMNS, *self._columns]
        missing = [name for name in columns or () if name not in known]
        if missing:
            raise DatasetError(f"the examples have no column {missing[0]!r}; they have {', '.join(known)}")
        return pa.table({name: self._column(name) for name in (known if columns is None else columns)})

    def _column(self, name: str) -> pa.Array:
        if name in self._columns:
            return self._columns[name]
        own = {
            "first_row": self._index.first_row[:-1],
            "n_rows": self._index.n_rows,
            "n_tokens": self._index.n_tokens,
            "input_ids": [example.input_ids for example in self._examples],
            "positions": [example.positions for example in self._examples],
        }
        return pa.array(own[name], OWN_COLUMNS[name])

    def column_types(self) -> dict[str, pa.DataType]:
        """Return the Arrow types of the user's own columns; null for one without any value."""
        return {name: values.type for name, values in self._columns.items()}
