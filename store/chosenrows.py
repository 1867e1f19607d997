"""Which tokens of which examples an edit means, from the archive's own tables."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from residua.store.archive import Archive
from residua.store.edits import Chosen, Edit, Scalar, Swap
from residua.store.errors import PlanError

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

    def check(self, edit: Edit) -> None:
        """Raise PlanError if `edit` names examples, rows, positions or columns that the archive does not have."""
        chosen, n_examples = edit.chosen, len(self._table)
        named = list(chosen.examples or ())
        if isinstance(edit, Swap) and edit.archive is None:
            named += list(edit.source.values()) if isinstance(edit.source, Mapping) else [edit.source]
        if named and max(named) >= n_examples:
            raise PlanError(f"there is no example {max(named):,}: the archive has {n_examples:,}, counted from 0")
        if chosen.rows is not None and max(chosen.rows) >= self._archive.n_rows:
            raise PlanError(f"there is no row {max(chosen.rows):,}: the archive has {self._archive.n_rows:,} rows")
        if isinstance(chosen.positions, tuple):
            self._check_positions(chosen.positions, chosen.examples)
        for name in chosen.where or {}:
            self.column(name)

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


def _at_positions(chosen: Chosen, n_tokens: int) -> Mask:
    mask = np.zeros(n_tokens, bool)
    if isinstance(chosen.positions, tuple):
        at = np.asarray(chosen.positions)
        at = np.where(at < 0, at + n_tokens, at)
        mask[at[(at >= 0) & (at < n_tokens)]] = True
    else:
        mask[slice(None) if chosen.positions is None else chosen.positions] = True
    return mask
