"""Sites of an archive as Dask arrays."""

from typing import Any

import numpy as np
import numpy.typing as npt
from dask import array as da
from dask.base import tokenize

from residua.analysis.support.open_archives import Location, location, opened
from residua.store.read.archive import Archive
from residua.store.read.rows_in_shards import Array


def array(archive: Archive, site: str, *, dtype: npt.DTypeLike | None = None) -> da.Array:
    """Return a site as a Dask array, ``(rows, *row shape)``, with one block for each shard.

    Nothing is read until something is computed. The graph holds the archive's path and no data. Workers open the
    archive by that path, so it must be the same on their machines. On a Dask cluster, each block is read by the task
    that uses it, with one thread.

    >>> acts = array(archive, "resid_post.3")  # doctest: +SKIP
    >>> covariance = (acts.T @ acts).compute() / len(acts)  # doctest: +SKIP

    Args:
        archive: The archive.
        site: One of its sites.
        dtype: Type to cast the values to. By default the stored type, except that bfloat16 and float16 become float32:
            the cast is exact, and numpy and Dask sum them in their own type, which gives wrong sums. Blocks of another
            type are converted before anything is computed, so sums are as exact as that type.

    Raises:
        UnknownSiteError: The archive has no such site.
        NotCapturedError: When something is computed: rows are not captured yet.
    """
    stored = archive[site]
    kind = stored.dtype if dtype is None else np.dtype(dtype)
    n_rows, *row_shape = stored.shape
    height = archive.plan.rows_per_shard
    heights = tuple(min(height, n_rows - start) for start in range(0, n_rows, height)) or (0,)
    where = location(archive)
    make: Any = da.map_blocks  # which has no types
    lazy: da.Array = make(
        _block,
        where,
        stored.name,
        height,
        kind,
        name=f"{stored.name}-{tokenize(archive.place, archive.plan.digest, n_rows, stored.name, kind.name)}",
        chunks=(heights, *((size,) for size in row_shape)),
        dtype=kind,
        meta=np.empty((0,) * len(stored.shape), kind),
    )
    return lazy


def _block(where: Location, site: str, height: int, dtype: np.dtype[np.generic], *, block_id: tuple[int, ...]) -> Array:
    """Read one shard's rows of a site; Dask passes `block_id`."""
    stored = opened(where)[site]
    start = block_id[0] * height
    return stored.numpy(slice(start, start + height), dtype=dtype)
