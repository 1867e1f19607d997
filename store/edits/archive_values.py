"""What an edit takes from an archive: the check that it is there, classes of a column, means of a site's rows."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.edits.edit import Edit, Swap
from residua.store.examples.memory import Examples
from residua.store.read.archive import Archive
from residua.store.selection.grammar import Value
from residua.store.selection.tokens import TokenSelector, require_column, require_examples

_Piece: TypeAlias = tuple[int, int, int]
"""First row, row after the last, and the class that they belong to."""

_ROWS_AT_ONCE = 4096
_NAN = float("nan")  # one object, which a dictionary finds again


def check_edit(edit: Edit, selector: TokenSelector, source: Examples) -> None:
    """Look for the examples, rows, positions and columns that an edit names.

    Args:
        edit: The edit.
        selector: The selector of the edited archive.
        source: The examples that a swap takes rows from.

    Raises:
        PlanError: One of them does not exist.
    """
    selector.check(edit.chosen)
    if not isinstance(edit, Swap):
        return
    pairs = edit.source if isinstance(edit.source, Mapping) else {0: edit.source}
    here = selector.source.place
    require_examples(pairs, selector.source.example_table, here)
    require_examples(pairs.values(), source, here if edit.archive is None else str(edit.archive))
    if not isinstance(edit.align, str):
        selector.check_positions(tuple(here for here, _ in edit.align), edit.chosen.examples)


def column_classes(table: Examples, name: str) -> list[Value]:
    """Return the class of each example by the values of a column: equal values are one class, NaN too.

    Raises:
        PlanError: The dataset has no such column, or its values are lists or mappings.
    """
    require_column(name, table)
    values = table.table([name])[name].to_pylist()
    if not all(isinstance(value, Hashable) for value in values):
        raise PlanError(f"column {name!r} holds lists or mappings: give one of texts or numbers")
    return [_NAN if value != value else value for value in values]  # NaN, of whatever type


def class_members(table: Examples, name: str) -> dict[Value, list[int]]:
    """Return the examples of each class of a column; raises as `column_classes`."""
    found: dict[Value, list[int]] = {}
    for example, key in enumerate(column_classes(table, name)):
        found.setdefault(key, []).append(example)
    return found


def mean_rows(
    archive: Archive, site: str, classes: Sequence[Sequence[int] | None]
) -> list[npt.NDArray[np.float64] | None]:
    """Return the mean of the rows of each class of examples, (*row shape) float64, all in one pass.

    Args:
        archive: The archive.
        site: Name of a stored site.
        classes: The examples of each class; None for all rows. Rows that are not captured yet are left out.

    Returns:
        The mean of each class; NaN or infinite where a row is, and None if no row is captured yet.
    """
    stored = archive[site]
    totals, n_rows = np.zeros((len(classes), *stored.shape[1:])), np.zeros(len(classes), np.int64)
    pieces = sorted(
        (first, last, index)
        for index, examples in enumerate(classes)
        for first, last in _captured(archive, None if examples is None else map(archive.example_table.rows, examples))
    )
    for here in _by_block(pieces):
        rows = stored[np.concatenate([np.arange(first, last) for first, last, _ in here])]
        at = 0
        with np.errstate(invalid="ignore"):  # the mean of infinite values of both signs is NaN
            for first, last, index in here:
                totals[index] += rows[at : at + last - first].sum(0, dtype=np.float64)
                n_rows[index] += last - first
                at += last - first
    return [total / n if n else None for total, n in zip(totals, n_rows.tolist(), strict=True)]


def _by_block(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces that lie in one block of 4,096 rows, to be read at once: each chunk is decoded once for all."""
    here: list[_Piece] = []
    for first, last, index in pieces:
        for start in range(first - first % _ROWS_AT_ONCE, last, _ROWS_AT_ONCE):
            if here and here[0][0] // _ROWS_AT_ONCE != start // _ROWS_AT_ONCE:
                yield here
                here = []
            here.append((max(first, start), min(last, start + _ROWS_AT_ONCE), index))
    if here:
        yield here


def _captured(archive: Archive, ranges: Iterable[tuple[int, int]] | None) -> Iterator[tuple[int, int]]:
    """Yield those rows of `ranges` that lie in captured shards, as ranges."""
    captured = archive.captured_rows()
    if ranges is None or archive.is_sealed:
        yield from captured if ranges is None else ranges
        return
    for first, last in ranges:
        for start, stop in captured:
            if max(first, start) < min(last, stop):
                yield max(first, start), min(last, stop)
