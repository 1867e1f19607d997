"""Which tokens of which examples an edit means, from the archive's own tables."""

from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.edits.edit import Chosen, Edit, Scalar, Swap
from residua.store.examples.table import ExampleTable
from residua.store.read.archive import Archive

_NAN = float("nan")  # one object, which is found again where NaN is not

Mask = npt.NDArray[np.bool_]


class RowChooser:
    """Answers for one archive which tokens an edit means.

    Args:
        archive: The archive whose examples, rows and columns edits speak of.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._table = archive.example_table
        self._columns: dict[str, list[Scalar]] = {}

    def check(self, edit: Edit, source: ExampleTable) -> None:
        """Look at the examples, rows, positions and columns that an edit names.

        Args:
            edit: The edit.
            source: The examples that a swap takes rows from.

        Raises:
            PlanError: There is no such one.
        """
        chosen = edit.chosen
        _require_examples(chosen.examples or (), self._table, "the archive")
        if isinstance(edit, Swap):
            self._check_swap(edit, source)
        if chosen.rows is not None and max(chosen.rows) >= self._archive.n_rows:
            raise PlanError(f"there is no row {max(chosen.rows):,}: the archive has {self._archive.n_rows:,} rows")
        if isinstance(chosen.positions, tuple):
            self._check_positions(chosen.positions, chosen.examples)
        for name in chosen.where or {}:
            self.column(name)

    def _check_swap(self, edit: Swap, source: ExampleTable) -> None:
        pairs = edit.source if isinstance(edit.source, Mapping) else {0: edit.source}
        _require_examples(pairs, self._table, "the archive")
        _require_examples(pairs.values(), source, "the archive" if edit.archive is None else str(edit.archive))
        if not isinstance(edit.align, str):
            self._check_positions(tuple(here for here, _ in edit.align), edit.chosen.examples)

    def _check_positions(self, positions: tuple[int, ...], examples: tuple[int, ...] | None) -> None:
        lengths = self._lengths if examples is None else self._lengths[list(examples)]
        longest = int(lengths.max(initial=0))
        for position in positions:
            if not -longest <= position < longest:
                raise PlanError(f"there is no position {position}: the longest example chosen has {longest} tokens")

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        return self._table.index().n_tokens

    def column(self, name: str) -> list[Scalar]:
        """Return the values of a column of the dataset, one an example.

        Raises:
            PlanError: The dataset has no such column.
        """
        if name not in self._columns:
            known = self._table.column_types()
            if name not in known:
                raise PlanError(f"the examples have no column {name!r}; they have {', '.join(known) or 'none'}")
            self._columns[name] = self._table.table([name])[name].to_pylist()
        return self._columns[name]

    def classes(self, name: str) -> list[Scalar]:
        """Return the values of a column as classes, one an example: what is the same is one class, NaN too.

        Raises:
            PlanError: The dataset has no such column, or its values are not single ones.
        """
        values = self.column(name)
        strange = next((value for value in values if not isinstance(value, Hashable)), None)
        if strange is not None:
            raise PlanError(f"column {name!r} holds lists or mappings, and a class is one text or number an example")
        return [_NAN if value != value else value for value in values]  # NaN, of whatever type

    def members(self, name: str) -> dict[Scalar, list[int]]:
        """Return the examples of each class."""
        found: dict[Scalar, list[int]] = {}
        for example, key in enumerate(self.classes(name)):
            found.setdefault(key, []).append(example)
        return found

    def tokens(self, chosen: Chosen, example: int) -> Mask:
        """Say for each token of `example` whether an edit means it, (tokens,)."""
        n_tokens = int(self._lengths[example])
        if not self.means_example(chosen, example):
            return np.zeros(n_tokens, bool)
        mask = _at_positions(chosen, n_tokens)
        if chosen.rows is not None:
            mask &= self._at_rows(chosen.rows, example, n_tokens)
        if chosen.tokens is not None:
            mask &= np.isin(self._table.tokens(example), chosen.tokens)
        return mask

    def means_example(self, chosen: Chosen, example: int) -> bool:
        """Say whether an edit means any token of `example`."""
        if chosen.examples is not None and example not in chosen.examples:
            return False
        return all(self.column(name)[example] in values for name, values in (chosen.where or {}).items())

    def _at_rows(self, rows: tuple[int, ...], example: int, n_tokens: int) -> Mask:
        first, stop = self._table.rows(example)
        wanted = np.asarray(rows, np.int64)
        mask = np.zeros(n_tokens, bool)
        mask[self._table.positions(example)[wanted[(wanted >= first) & (wanted < stop)] - first]] = True
        return mask


def _require_examples(named: Iterable[int], table: ExampleTable, where: str) -> None:
    largest = max(named, default=-1)
    if largest >= len(table):
        raise PlanError(f"there is no example {largest:,}: {where} has {len(table):,}, counted from 0")


def _at_positions(chosen: Chosen, n_tokens: int) -> Mask:
    mask = np.zeros(n_tokens, bool)
    if isinstance(chosen.positions, tuple):
        at = np.asarray(chosen.positions)
        at = np.where(at < 0, at + n_tokens, at)
        mask[at[(at >= 0) & (at < n_tokens)]] = True
    else:
        mask[slice(None) if chosen.positions is None else chosen.positions] = True
    return mask
