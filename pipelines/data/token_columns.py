"""Columns of a dataset with one value a token, such as labels: found by their length, and cut along with the tokens.

A column is one of these as long as every list in it is as long as its row has tokens. Nothing else tells them from
other lists, so a column is refused that was cut in one row and has another length in a later one.
"""

from collections.abc import Mapping
from typing import Any

from residua.store.base.errors import DatasetError
from residua.store.selection.values import plain


class TokenColumns:
    """The columns with one value a token, as far as the dataset has been read."""

    def __init__(self) -> None:
        self._others: set[str] = set()  # columns with a list of another length
        self._first_cut: dict[str, int] = {}  # column: row

    def see(self, row: int, columns: Mapping[str, Any], n_tokens: int) -> None:
        """Look at the columns of a row; to be called for each row, before `cut`.

        Raises:
            DatasetError: A column was cut in an earlier row, and has another length than the tokens here.
        """
        for name, value in columns.items():
            n_values = _n_values(value)
            if n_values is None or n_values == n_tokens:
                continue
            if name in self._first_cut:
                raise DatasetError(
                    f"row {row}: column {name!r} has {n_values} values, and the row {n_tokens} tokens; in row "
                    f"{self._first_cut[name]} it had one value a token, and was cut with them: give it one value a "
                    "token in every row, or leave the column out"
                )
            self._others.add(name)

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
