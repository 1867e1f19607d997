"""Columns of a dataset with one value a token, such as labels: found by their length, and cut along with the tokens.

A column is one of these as long as every list in it is as long as its row has tokens. Nothing else tells them from
other lists, so a column is refused that was cut in one row and has another length in a later one. A column that has
another length in an earlier one stays as it is. A note says so if most of its lists are as long as their rows, or off
by one token such as a BOS.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from residua.store.base.errors import DatasetError
from residua.store.selection.values import plain


class TokenColumns:
    """The columns with one value a token, as far as the dataset has been read."""

    def __init__(self) -> None:
        self._others: set[str] = set()  # columns with a list of another length
        self._first_cut: dict[str, int] = {}  # column: row
        self._first_other: dict[str, tuple[int, int, int]] = {}  # column: row, values, tokens
        self._n_lists: Counter[str] = Counter()
        self._n_near: Counter[str] = Counter()  # as long as their rows, or off by one

    def see(self, row: int, columns: Mapping[str, Any], n_tokens: int) -> None:
        """Look at the columns of a row; to be called for each row, before `cut`.

        Raises:
            DatasetError: A column was cut in an earlier row, and has another length than the tokens here.
        """
        for name, value in columns.items():
            n_values = _n_values(value)
            if n_values is None:
                continue
            self._n_lists[name] += 1
            self._n_near[name] += abs(n_values - n_tokens) <= 1
            if n_values == n_tokens:
                continue
            if name in self._first_cut:
                raise DatasetError(
                    f"row {row}: column {name!r} has {n_values} values, and the row {n_tokens} tokens; in row "
                    f"{self._first_cut[name]} it had one value a token, and was cut with them: give it one value a "
                    "token in every row, or leave the column out"
                )
            self._others.add(name)
            self._first_other.setdefault(name, (row, n_values, n_tokens))

    def notes(self) -> list[str]:
        """Return a sentence for each column that was not cut, although most lists look like one value a token."""
        return [
            f"column {name!r} was kept as it is and not cut with the tokens: of its {self._n_lists[name]:,} lists "
            f"{self._n_near[name]:,} are as long as their rows or off by one, but row {row} has {n_values} values and "
            f"{n_tokens} tokens; give it one value a token (special tokens such as a BOS included) if it should be cut"
            for name, (row, n_values, n_tokens) in self._first_other.items()
            if 2 * self._n_near[name] > self._n_lists[name]
        ]

    def cut(
        self, row: int, columns: Mapping[str, Any], n_tokens: int, kept: slice, n_added: int = 0
    ) -> Mapping[str, Any]:
        """Return the columns of the tokens `kept` of a row, after `n_added` tokens that have no value: None.

        Args:
            row: The number of the row.
            columns: Its columns; those with one value a token have `n_tokens`.
            n_tokens: The tokens that `kept` counts in.
            kept: The tokens that are kept.
            n_added: Start tokens that are put before them.
        """
        if not n_added and (kept.start, kept.stop) == (0, n_tokens):
            return columns
        found = dict(columns)
        for name, value in columns.items():
            if name not in self._others and _n_values(value) == n_tokens:
                self._first_cut.setdefault(name, row)
                found[name] = [*[None] * n_added, *plain(value[kept])] if n_added else value[kept]
        return found


def _n_values(value: Any) -> int | None:
    """Return the length of a list of values; None for anything else."""
    if isinstance(value, list | tuple):
        return None if value and isinstance(value[0], Mapping) else len(value)
    return len(value) if getattr(value, "ndim", 0) else None
