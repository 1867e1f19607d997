"""Going through rows block by block, be they in a numpy array or in a Dask array that does not fit into memory."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from dask.array import Array as DaskArray

Array: TypeAlias = npt.NDArray[Any]
Blocks: TypeAlias = "Array | DaskArray"

_ROWS = 8192  # of a numpy array at a time


def row_blocks(values: Blocks) -> Iterator[Array]:
    """Yield the rows of `values` in order as numpy arrays; blocks of a Dask array are computed one at a time."""
    if not isinstance(values, DaskArray):
        whole = np.asarray(values)
        yield from (whole[start : start + _ROWS] for start in range(0, max(1, len(whole)), _ROWS))
        return
    rows = values.rechunk(dict.fromkeys(range(1, values.ndim), -1))  # type: ignore[no-untyped-call]  # dask's own
    for number in range(rows.numblocks[0]):
        yield np.asarray(rows.blocks[number].compute(scheduler="synchronous"))


def paired(values: Blocks, labels: Array) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of rows, each with its labels, (rows,)."""
    start = 0
    for block in row_blocks(values):
        yield block, labels[start : start + len(block)]
        start += len(block)
