"""Memory that is laid out as a `raw` shard's file, so that rows go to the disk from where they were put.

In such a file four bytes of crc32c follow every chunk. Here they are left free behind every chunk, and the memory
begins where a block of the disk may begin. A full shard then only needs its checksums filled in: it is written as
it lies (`residua.store.storage.direct`), without another copy. Whoever fills a whole chunk at once may have it looked
through there and then, while it is in the processor's cache, instead of fetching it from memory again later.
"""

from collections.abc import Iterable, Iterator
from copy import copy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.nonfinite import count_nonfinite
from residua.store.encoding.spec import ArraySpec
from residua.store.storage.crc import CRC_BYTES, Buffer, crc32c, crc_bytes
from residua.store.storage.direct import BLOCK, aligned_bytes

_PIECE_BYTES = 4 * 1024 * 1024  # written at a time

Array = npt.NDArray[np.generic]


class Checked(NamedTuple):
    """What was found when a whole chunk was looked through: its crc32c as stored, and its NaN and infinite values."""

    crc: bytes
    n_nonfinite: int


class ShardMemory:
    """Memory for the rows of one shard of an array that `suits`; its content is arbitrary at first.

    Args:
        spec: The array.
        n_rows: Rows that there is room for, at least 1.

    Attributes:
        shape: (rows, *row shape).
        dtype: The storage dtype.
    """

    def __init__(self, spec: ArraySpec, n_rows: int) -> None:
        n_chunks = -(-n_rows // spec.rows_per_chunk)
        self.shape = (n_rows, *spec.row_shape)
        self.dtype = spec.storage_dtype
        self._spec = spec
        self._bytes = aligned_bytes(n_chunks * (spec.chunk_bytes + CRC_BYTES))
        self._checked: dict[int, Checked] = {}

    @staticmethod
    def suits(spec: ArraySpec) -> bool:
        """Say whether chunks of the array lie in its file as in memory, and values stay aligned behind a crc32c."""
        return PRESETS[spec.preset].effort is None and CRC_BYTES % spec.storage_dtype.itemsize == 0

    def first(self, n_rows: int) -> "ShardMemory":
        """Return the first `n_rows` rows, in the same memory."""
        part = copy(self)
        part.shape = (n_rows, *self.shape[1:])
        return part

    @property
    def chunks(self) -> list[Array]:
        """The rows of each chunk, (rows per chunk, *row shape), to be filled or read; the last one may be short."""
        height, size = self._spec.rows_per_chunk, self._spec.chunk_bytes
        starts = range(0, self.shape[0], height)
        whole = [self._bytes[i * (size + CRC_BYTES) :][:size].view(self.dtype) for i in range(len(starts))]
        shape = (height, *self.shape[1:])
        return [chunk.reshape(shape)[: self.shape[0] - start] for start, chunk in zip(starts, whole, strict=True)]

    def filled(self, chunk: int, n_rows: int) -> None:
        """Take note that `n_rows` rows were just written to chunk number `chunk`; a whole one is looked through."""
        if n_rows < self._spec.rows_per_chunk:
            self._checked.pop(chunk, None)
            return
        values = self._bytes[chunk * (self._spec.chunk_bytes + CRC_BYTES) :][: self._spec.chunk_bytes]
        n_nonfinite = count_nonfinite(values.view(self.dtype), self._spec.dtype)
        self._checked[chunk] = Checked(crc_bytes(crc32c(values)), n_nonfinite)

    def checked(self, chunk: int) -> Checked | None:
        """Return what was found in chunk number `chunk`, if it is whole and was looked through since it changed."""
        is_whole = (chunk + 1) * self._spec.rows_per_chunk <= self.shape[0]
        return self._checked.get(chunk) if is_whole else None

    def in_place(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        """Yield the bytes of `parts` as they lie in this memory, one after the other, in pieces of whole blocks.

        Args:
            parts: Chunks as they are stored, from the first one on. Those that are not in their place, as a
                checksum or a copy of the last chunk, are copied there.
        """
        done = end = 0
        for part in parts:
            data = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part.reshape(-1).view(np.uint8)
            place = self._bytes[end : end + data.size]
            if place.ctypes.data != data.ctypes.data:
                place[:] = data
            end += data.size
            if end - done >= _PIECE_BYTES:
                whole = end - end % BLOCK
                yield self._bytes[done:whole]
                done = whole
        yield self._bytes[done:end]
