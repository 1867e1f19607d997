"""The labelled rows of one site, in any number of passes: from memory if they fit, else from the archive."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.target import TargetSummary, read_target
from residua.analysis.rows.blocks import Block
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.site_rows import pieces, width_of
from residua.analysis.support.open_archives import Location, opened

Floats = npt.NDArray[np.float64]


class Job(NamedTuple):
    """One site to probe; its rows are read where the job runs. `memory` is in bytes."""

    location: Location
    site: str
    blocks: Sequence[Block]
    target: str
    where: str | None
    summary: TargetSummary
    memory: int


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
    """The rows of a job; they are read once and kept if they take at most a quarter of its memory.

    Attributes:
        width: Values of a row.
        n_left_out: Rows that the latest pass left out because a value is NaN or infinite.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._archive = opened(job.location)
        self._target = read_target(self._archive, job.target)
        self.width = width_of(self._archive, job.site)
        row_bytes = self.width * max(4, self._archive[job.site].dtype.itemsize) + 40
        self._keeps = sum(job.summary.n_rows) * row_bytes <= job.memory // 4
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
        job = self._job
        for rows, values in pieces(self._archive, job.site, job.blocks, job.where):
            examples = examples_of(self._archive, rows)
            labels = np.column_stack([self._target.values(rows), job.summary.control.labels(rows, examples)])
            piece = LabelledRows(values, labels.astype(np.float64), job.summary.subsets[examples])
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                self.n_left_out += int(len(rows) - np.count_nonzero(finite))
                piece = LabelledRows(piece.values[finite], piece.labels[finite], piece.subsets[finite])
            yield piece
