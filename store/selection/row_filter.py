"""Choosing rows by a line of text: `position > 0 and label == "code"`.

Names are `position`, `token` and `example` of the row, `is_last` for the last row of its example, and the columns of
the example table. A negative position counts from the end of its example. In an archive of examples with images there
are also `modality` ("text", "image" or "special"), `image`, `view`, `patch_row` and `patch_column`. A column of lists
has one value for each token of its example; the value of a row is that of its token.
`residua.store.selection.grammar` has the grammar.
"""

from functools import cache

import numpy as np

from residua.store.base.errors import DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.selection.evaluate import FROM_END, IS_LAST, ColumnAnswers, Items, LongArray, Mask, evaluate
from residua.store.selection.grammar import ColumnIn, Comparison, Condition, parse_condition


class RowFilter:
    """A condition on rows; make one with `RowFilter.parse`. It pickles as its text, and belongs to one thread.

    Attributes:
        text: The condition as it was written.
    """

    def __init__(self, text: str, condition: Condition) -> None:
        self.text = text
        self._condition = condition
        self._answers: ColumnAnswers | None = None

    @classmethod
    def parse(cls, text: str) -> "RowFilter":
        """Return the filter that `text` states.

        >>> RowFilter.parse('position > 0 and label in ["code", "prose"]')
        RowFilter('position > 0 and label in ["code", "prose"]')

        Raises:
            AnalysisError: The text is not a condition; the message says where.
        """
        return cls(text, parse_condition(text))

    def __reduce__(self) -> tuple[object, ...]:
        return RowFilter.parse, (self.text,)

    def __repr__(self) -> str:
        return f"RowFilter({self.text!r})"

    def mask(self, archive: Archive, start: int, stop: int) -> Mask:
        """Return for each of the rows `start` to `stop` (not included) whether it is selected.

        Only what the condition names is read. A column of the example table is read once for each archive in a row.

        Raises:
            AnalysisError: The archive has no such column, or its values are of another kind.
            NotCapturedError: A row is not captured yet.
        """
        rows = _Rows(archive, start, stop, self._answers_of(archive))
        return evaluate(
            self._condition, Items(stop - start, tuple(archive.plan.row_columns), rows.numbers, rows.column)
        )

    def rows(self, archive: Archive) -> LongArray:
        """Return the numbers of the selected rows among the captured ones, ascending: 8 bytes for each.

        Raises:
            AnalysisError: The archive has no such column, or its values are of another kind.
        """
        self.mask(archive, 0, 0)  # finds wrong names even in an archive without rows
        shards = archive.captured_rows()
        found = [start + np.flatnonzero(self.mask(archive, start, stop)) for start, stop in shards]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _answers_of(self, archive: Archive) -> ColumnAnswers:
        table = archive.example_table  # another one once a side table was written
        if self._answers is None or self._answers.table is not table:
            self._answers = ColumnAnswers(table)
        return self._answers


class _Rows:
    """The rows `start` to `stop` (not included) of an archive, as `Items` asks about them."""

    def __init__(self, archive: Archive, start: int, stop: int, answers: ColumnAnswers) -> None:
        self._archive, self._rows, self._answers = archive, range(start, stop), answers
        self.numbers = cache(self._numbers)  # each column of the rows is read once

    def _numbers(self, name: str) -> LongArray:
        archive, rows = self._archive, slice(self._rows.start, self._rows.stop)
        if name == IS_LAST:
            last = archive.example_table.index().first_row[1:] - 1
            return np.isin(np.arange(rows.start, rows.stop), last).astype(np.int64)
        if name == FROM_END:
            return self.numbers("position") - archive.example_table.index().n_tokens[self._examples()]
        return np.asarray(getattr(archive.rows, name).numpy(rows, dtype=np.int64))

    def _examples(self) -> LongArray:
        found, n_examples = self.numbers("example"), len(self._archive.example_table)
        if found.size and not 0 <= found.min() <= found.max() < n_examples:
            raise DamagedArchiveError(
                f"{self._archive.place}/rows/example names example {found.max()} of {n_examples}: the archive is "
                "damaged"
            )
        return found

    def column(self, condition: Comparison | ColumnIn) -> Mask:
        (found, starts), examples = self._answers(condition), self._examples()
        if starts is None:
            return found[examples]
        tokens = starts[examples] + self.numbers("position")
        if ((tokens < starts[examples]) | (tokens >= starts[examples + 1])).any():
            raise DamagedArchiveError(
                f"{self._archive.place}/rows/position has positions beyond the end of their example: the archive is "
                "damaged"
            )
        return np.asarray(found[tokens])
