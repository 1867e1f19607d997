"""The labelled rows of one site, in any number of passes: from memory if they fit, else from the archive."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.controls import Control, Split
from residua.analysis.probes.target import Target
from residua.analysis.rows.blocks import Block
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.site_rows import pieces, width_of
from residua.store.read.archive import Archive

Floats = npt.NDArray[np.float64]


class LabelledRows(NamedTuple):
    """Some rows of a site.

    Attributes:
        values: (rows, width), finite.
        labels: True labels and those of the control, (rows, 2) float64.
        subsets: `FIT`, `VALIDATION` or `TEST`, (rows,).
    """

    values: npt.NDArray[np.floating]
    labels: Floats
    subsets: npt.NDArray[np.int8]


class ProbeRows:
    """The rows of one site that a probe uses.

    Args:
        archive: The archive.
        site: The site.
        blocks: The rows to read.
        target: The text of the target.
        where: Use only these rows.
        split: Which examples are held out.
        control: Labels that say nothing about the rows.
        n_rows: Number of rows.
        memory_limit: Bytes; rows that take no more are read once and kept.

    Attributes:
        n_left_out: Rows that the latest pass left out because a value is NaN or infinite.
    """

    def __init__(
        self,
        archive: Archive,
        site: str,
        blocks: Sequence[Block],
        *,
        target: str,
        where: str | None,
        split: Split,
        control: Control,
        n_rows: int,
        memory_limit: int,
    ) -> None:
        self._archive = archive
        self._site = site
        self._blocks = blocks
        self._target = Target(archive, target)
        self._where = where
        self._split = split
        self._control = control
        self._keeps = n_rows * (width_of(archive, site) * max(4, archive[site].dtype.itemsize) + 40) <= memory_limit
        self._kept: list[LabelledRows] | None = None
        self.n_left_out = 0

    def of(self, *subsets: int) -> Iterator[tuple[npt.NDArray[np.floating], Floats]]:
        """Yield the rows of `subsets` in order: values (rows, width), true and control labels (rows, 2)."""
        for values, labels, found in self.each():
            mask = np.isin(found, subsets)
            if mask.any():
                yield values[mask], labels[mask]

    def each(self) -> Iterator[LabelledRows]:
        """Yield all rows in order."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        self.n_left_out = 0
        for piece in self._read():
            if self._keeps:
                kept.append(piece)
            yield piece
        self._kept = kept if self._keeps else None

    def _read(self) -> Iterator[LabelledRows]:
        for rows, values in pieces(self._archive, self._site, self._blocks, self._where):
            examples = examples_of(self._archive, rows)
            labels = np.column_stack([self._target.values(rows), self._control.labels(rows, examples)])
            piece = LabelledRows(values, labels.astype(np.float64), self._split.subsets(examples))
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                self.n_left_out += int(len(rows) - np.count_nonzero(finite))
                piece = LabelledRows(*(array[finite] for array in piece))
            yield piece
