"""The description of one stored array that its writer and its reader share."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from residua.store.encoding.dtypes import storage_dtype


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape, type and encoding of one array of an archive; axis 0 is the row axis.

    Attributes:
        path: Node inside the archive, for example ``sites/resid_post/7``.
        row_shape: Shape of one row: ``(width,)``, ``(heads, head_width)``, or ``()`` for a scalar.
        dtype: Zarr data type name, for example ``bfloat16``.
        preset: Name of the codec, one of ``residua.store.encoding.codecs.PRESETS``.
        rows_per_shard: Height of a shard; a multiple of ``rows_per_chunk``.
        rows_per_chunk: Height of a chunk.
        column_shards: Into how many shards of equal width axis 1 is cut.
        column_shard: Which of them this is, where the spec describes one of them; None for the full array.
    """

    path: str
    row_shape: tuple[int, ...]
    dtype: str
    preset: str
    rows_per_shard: int
    rows_per_chunk: int
    column_shards: int = 1
    column_shard: int | None = None

    @property
    def file_specs(self) -> tuple["ArraySpec", ...]:
        """What each file of a shard holds, in the order of axis 1: one column shard, or full rows."""
        if self.column_shards == 1:
            return (self,)
        shape = (self.row_shape[0] // self.column_shards, *self.row_shape[1:])
        return tuple(replace(self, row_shape=shape, column_shard=i) for i in range(self.column_shards))

    @property
    def key(self) -> str:
        """The name under which commit records list a shard file of this array or column shard."""
        return self.path if self.column_shard is None else f"{self.path}#{self.column_shard}"

    @property
    def storage_dtype(self) -> np.dtype[np.generic]:
        """The numpy type that holds one element; for bfloat16, its bits in uint16."""
        return storage_dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Logical bytes of one row."""
        return prod(self.row_shape) * self.storage_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Logical bytes of one full chunk."""
        return self.rows_per_chunk * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Number of chunks in a shard."""
        return self.rows_per_shard // self.rows_per_chunk
