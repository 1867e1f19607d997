"""Choosing rows by a line of text: `position > 0 and label == "code"`.

Names are `position`, `token` and `example` of the row, and the columns of the example table.
`residua.store.selection.grammar` has the grammar. A null equals nothing but `null`, and is neither less nor more
than anything.
"""

import weakref
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.selection.evaluate import ROW_NAMES, compare_column, compare_numbers
from residua.store.selection.grammar import Comparison, Condition, Every, Not, Some, parse

Mask: TypeAlias = npt.NDArray[np.bool_]


class RowFilter:
    """A condition on rows; make one with `RowFilter.parse`. It pickles as its text, and belongs to one thread.

    Attributes:
        text: The condition as it was written.
    """

    def __init__(self, text: str, condition: Condition) -> None:
        self.text = text
        self._condition = condition
        self._answers: dict[Comparison, Mask] = {}
        self._answered: weakref.ref[Archive] | None = None

    @classmethod
    def parse(cls, text: str) -> "RowFilter":
        """Return the filter that `text` spells.

        >>> RowFilter.parse('position > 0 and label in ["code", "prose"]')
        RowFilter('position > 0 and label in ["code", "prose"]')

        Raises:
            AnalysisError: It is not a condition; the message says where.
        """
        return cls(text, parse(text))

    def __reduce__(self) -> tuple[object, ...]:
        return RowFilter.parse, (self.text,)

    def __repr__(self) -> str:
        return f"RowFilter({self.text!r})"

    def mask(self, archive: Archive, start: int, stop: int) -> Mask:
        """Say for each of the rows `start` to `stop` (not included) whether it is chosen.

        Only what the condition names is read; a column of the example table is read once for as long as the same
        archive is asked.

        Raises:
            AnalysisError: The archive has no such column, or its values are of another kind.
            NotCapturedError: A row is not captured yet.
        """
        return _Rows(self, archive, start, stop).choose(self._condition)

    def rows(self, archive: Archive) -> npt.NDArray[np.int64]:
        """Return the numbers of the chosen rows among those that are captured, ascending: 8 bytes for each.

        Raises:
            AnalysisError: The archive has no such column, or its values are of another kind.
        """
        self.mask(archive, 0, 0)  # even of an archive without rows, wrong names are to be noticed
        shards = sorted(commit.rows for commit in archive.commits.values())
        found = [start + np.flatnonzero(self.mask(archive, start, stop)) for start, stop in shards]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def of_examples(self, archive: Archive, comparison: Comparison) -> Mask:
        """Answer a comparison with a column of the example table, for every example; kept for the same archive."""
        if self._answered is None or self._answered() is not archive:
            self._answers, self._answered = {}, weakref.ref(archive)
        if comparison not in self._answers:
            self._answers[comparison] = compare_column(archive, comparison)
        return self._answers[comparison]


class _Rows:
    """A run of rows, and what of them was read so far."""

    def __init__(self, chosen: RowFilter, archive: Archive, start: int, stop: int) -> None:
        self._filter = chosen
        self._archive = archive
        self._rows = slice(start, stop)
        self._read: dict[str, npt.NDArray[np.int64]] = {}

    def choose(self, condition: Condition) -> Mask:
        match condition:
            case Not(part):
                return ~self.choose(part)
            case Every(parts):
                return np.asarray(np.logical_and.reduce([self.choose(part) for part in parts]))
            case Some(parts):
                return np.asarray(np.logical_or.reduce([self.choose(part) for part in parts]))
            case Comparison(name) if name in ROW_NAMES:
                return compare_numbers(self._column(name), condition)
        of_examples = self._filter.of_examples(self._archive, condition)
        examples = self._column("example")
        if examples.size and not 0 <= examples.min() <= examples.max() < len(of_examples):
            raise DamagedArchiveError(
                f"{self._archive.path}/rows/example names example {examples.max()} of {len(of_examples)}: "
                "the archive is damaged"
            )
        return of_examples[examples]

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        if name not in self._read:
            self._read[name] = getattr(self._archive.rows, name).numpy(self._rows, dtype=np.int64)
        return self._read[name]
