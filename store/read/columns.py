"""Reading arrays whose rows are cut into parts: column shards, as the ranks of a split model write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from residua.store.encoding.spec import ArraySpec
from residua.store.read.reader import Array, ArrayReader, Check


class RowReader(Protocol):
    """Reads rows of one array; see `ArrayReader`."""

    def read(self, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` (not included)."""
        ...

    def read_into(self, out: Array, start: int, stop: int) -> None:
        """Read rows `start` to `stop` (not included) into `out`."""
        ...

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Return the given rows."""
        ...


def reader_of(root: Path, spec: ArraySpec, n_rows: int, *, check: Check, threads: int | None) -> RowReader:
    """Return what reads the rows of an array, whole or in parts; arguments as for `ArrayReader`."""
    readers = [ArrayReader(root, part, n_rows, check=check, threads=threads) for part in spec.parts]
    return readers[0] if len(readers) == 1 else ColumnsReader(spec, readers)


class ColumnsReader:
    """Reads the parts of rows and puts them side by side.

    Args:
        spec: The whole array.
        parts: A reader of each of its parts.
    """

    def __init__(self, spec: ArraySpec, parts: Sequence[ArrayReader]) -> None:
        self._spec = spec
        self._parts = parts

    def read(self, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` (not included), (rows, *row shape), in storage dtype."""
        return np.concatenate([part.read(start, stop) for part in self._parts], axis=1)

    def read_into(self, out: Array, start: int, stop: int) -> None:
        """Read rows `start` to `stop` (not included) into `out`, of storage dtype."""
        width = self._spec.parts[0].row_shape[0]
        for i, part in enumerate(self._parts):
            out[:, i * width : (i + 1) * width] = part.read(start, stop)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Return the given rows, in the given order, (rows, *row shape), in storage dtype."""
        return np.concatenate([part.take(rows) for part in self._parts], axis=1)
