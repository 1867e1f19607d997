"""Choosing rows by a line of text: `position > 0 and label == "code"`.

Names are `position`, `token` and `example` of the row, and the columns of the example table; in an archive of examples
with images also `modality` ("text", "image" or "special"), `image`, `view`, `patch_row` and `patch_column`. A column of
lists has one value for each token of its example; the value of a row is that of its token.
`residua.store.selection.grammar` has the grammar.
"""

from functools import cache

import numpy as np

from residua.store.base.errors import DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.selection.evaluate import ColumnAnswers, Items, LongArray, Mask, evaluate
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
        rows, answers = slice(start, stop), self._answers_of(archive)

        @cache
        def numbers(name: str) -> LongArray:
            return np.asarray(getattr(archive.rows, name).numpy(rows, dtype=np.int64))

        def column(condition: Comparison | ColumnIn) -> Mask:
            (found, starts), examples = answers(condition), numbers("example")
            n_examples = len(archive.example_table)
            if examples.size and not 0 <= examples.min() <= examples.max() < n_examples:
                raise DamagedArchiveError(
                    f"{archive.place}/rows/example names example {examples.max()} of {n_examples}: "
                    "the archive is damaged"
                )
            if starts is None:
                return found[examples]
            tokens = starts[examples] + numbers("position")
            if ((tokens < starts[examples]) | (tokens >= starts[examples + 1])).any():
                raise DamagedArchiveError(
                    f"{archive.place}/rows/position has positions beyond the end of their example: the archive is "
                    "damaged"
                )
            return np.asarray(found[tokens])

        names = tuple(archive.plan.row_columns)
        return evaluate(self._condition, Items(stop - start, names, numbers, column))

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
