"""Which examples of an archive a job takes: by number, by the rows that they own, by a condition on their rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.selection.evaluate import LongArray, Mask
from residua.store.selection.grammar import format_numbers
from residua.store.selection.row_filter import RowFilter


@dataclass(frozen=True, kw_only=True)
class ExampleChoice:
    """The examples that were asked for; all that is given must hold.

    Attributes:
        examples: Numbers of examples.
        rows: Rows of the archive; the examples that own them are taken in full.
        where: A condition on rows; examples with a row that meets it are taken in full.
    """

    examples: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    where: str | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the choice as JSON values, the same for the same numbers in any order."""
        return {
            "examples": None if self.examples is None else _distinct(self.examples).tolist(),
            "rows": None if self.rows is None else format_numbers(_distinct(self.rows)),
            "where": self.where,
        }

    def of(self, archive: Archive) -> Mask:
        """Return for each example of an archive whether it was asked for and has a row, (examples,).

        Raises:
            PlanError: There is no such example or row, or nothing is left.
            AnalysisError: The condition does not fit the archive.
        """
        index = archive.example_table.index()
        numbers = np.arange(index.n_examples)
        chosen = index.n_rows > 0  # an example without rows has run in no batch
        if self.examples is not None:
            chosen &= np.isin(numbers, _within(_distinct(self.examples), index.n_examples, "examples"))
        for rows in self._rows(archive):
            chosen &= np.isin(numbers, np.searchsorted(index.first_row, rows, side="right") - 1)
        if not chosen.any():
            raise PlanError(
                "no example is left: none with a row fits the examples, the rows and the condition: choose others"
            )
        return chosen

    def _rows(self, archive: Archive) -> Iterator[LongArray]:
        if self.rows is not None:
            yield _within(_distinct(self.rows), archive.n_rows, "rows")
        if self.where is not None:
            yield RowFilter.parse(self.where).rows(archive)


def _distinct(numbers: Sequence[int]) -> LongArray:
    return np.unique(np.fromiter(numbers, np.int64))


def _within(numbers: LongArray, count: int, what: str) -> LongArray:
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if len(wrong):
        raise PlanError(f"{what} {wrong[:3].tolist()}: the archive has {count:,}, counted from 0")
    return numbers
