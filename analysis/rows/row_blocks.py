"""Going through rows block by block, be they in a numpy array or in a Dask array that does not fit into memory."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from dask.array import Array as DaskArray

Array: TypeAlias = npt.NDArray[Any]
Blocks: TypeAlias = "Array | DaskArray"

_ROWS = 8192  # at a time


def row_blocks(values: Blocks) -> Iterator[Array]:
    """Yield some rows of `values` at a time, in order; blocks of a Dask array are computed one after the other."""
    if not isinstance(values, DaskArray):
        yield from _cut(np.asarray(values))
        return
    rows = values.rechunk(dict.fromkeys(range(1, values.ndim), -1))  # type: ignore[no-untyped-call]  # dask's own
    for number in range(rows.numblocks[0]):
        yield from _cut(np.asarray(rows.blocks[number].compute(scheduler="synchronous")))


def _cut(rows: Array) -> Iterator[Array]:
    return (rows[start : start + _ROWS] for start in range(0, max(1, len(rows)), _ROWS))


def paired(values: Blocks, labels: Array) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of rows, each with its labels, (rows,)."""
    start = 0
    for block in row_blocks(values):
        yield block, labels[start : start + len(block)]
        start += len(block)
