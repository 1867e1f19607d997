"""Shard files mapped into memory: opened and checked once, kept while in use, and at most so many at a time.

A mapping costs no memory but a file descriptor and, at first, a look at the shard's index. So recently used ones
are kept, for all readers of the process together, since the limit on descriptors is the process's. Shard files never
change once they have their name; whoever cuts one short while it is mapped makes readers crash (SIGBUS).
"""

import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.base.untrusted import check_inside
from residua.store.encoding.codecs import PRESETS, check_chunk
from residua.store.encoding.shard import RESTORE, describe_chunk, open_shard, read_index, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.storage.crc import CRC_BYTES

_MOST_OPEN = 1024

Bytes = npt.NDArray[np.uint8]


class MappedShard:
    """One shard file, its index checked, its bytes in reach.

    Attributes:
        path: The file.
        verified: Per chunk, whether its crc32c was compared.
        is_verified: Whether that is so for all chunks.
        raw_rows: For arrays stored raw, (chunks, rows of a chunk), each row an opaque item; empty for others.

    Args:
        root: Folder of the archive.
        spec: The array.
        shard: Number of the shard.
        n_rows: Rows of the array.
        verified: What an earlier mapping of the shard had as `verified`; marked further by this one.

    Raises:
        DamagedArchiveError: The file is missing, cut short, or its index altered.
        UnsafeArchiveError: Its index is hostile.
    """

    def __init__(
        self, root: Path, spec: ArraySpec, shard: int, n_rows: int, verified: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self.path = shard_path(root, spec, shard)
        self._spec = spec
        self._first_row = shard * spec.rows_per_shard
        self._n_rows = shard_rows(spec, n_rows, shard)
        check_inside(root, self.path)
        with open_shard(self.path) as descriptor:
            index = read_index(descriptor, spec, n_rows=self._n_rows, path=self.path)
            mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        # Never closed by hand: views of it may outlive this object, and the last one frees it.
        self._bytes: Bytes = np.frombuffer(mapping, np.uint8)
        self._starts = index.offsets.tolist()
        self._sizes = index.sizes.tolist()
        self.verified = np.zeros(len(self._starts), bool) if verified is None else verified
        self.is_verified = bool(self.verified.all())
        n_chunks = len(self._starts) if PRESETS[spec.preset].is_raw else 0
        strides = (spec.chunk_bytes + CRC_BYTES, spec.row_bytes)
        self._raw_chunks: Bytes = np.ndarray(
            (n_chunks, spec.chunk_bytes), np.uint8, self._bytes.data, 0, (strides[0], 1)
        )
        self.raw_rows: npt.NDArray[np.void] = np.ndarray(
            (n_chunks, spec.rows_per_chunk), np.dtype((np.void, spec.row_bytes)), self._bytes.data, 0, strides
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self._bytes.nbytes

    def stored(self, chunk: int) -> Bytes:
        """Return the bytes of a chunk as they lie in the file, crc32c included."""
        start = self._starts[chunk]
        found: Bytes = self._bytes[start : start + self._sizes[chunk]]
        return found

    def verify(self, chunk: int) -> None:
        """Compare the crc32c of a chunk.

        Raises:
            DamagedArchiveError: The chunk was altered; the message names file, chunk and rows.
        """
        try:
            check_chunk(self.stored(chunk))
        except ValueError as error:
            raise self.damaged(chunk, error) from None
        self.verified[chunk] = True
        self.is_verified = bool(self.verified.all())

    def copy_raw(self, first: int, out: npt.NDArray[np.generic]) -> None:
        """Fill `out`, C-contiguous, with the raw rows from `first` on; whole chunks go in one strided copy."""
        height, row_bytes = self._spec.rows_per_chunk, self._spec.row_bytes
        target = out.reshape(-1).view(np.uint8)
        last = first + len(out)
        row = first
        while row < last:
            chunk, start = divmod(row, height)
            n_whole = 0 if start else (last - row) // height
            stop = min(height, start + last - row)
            at = (row - first) * row_bytes
            if n_whole:
                n_bytes = n_whole * self._spec.chunk_bytes
                whole = target[at : at + n_bytes].reshape(n_whole, -1)
                np.copyto(whole, self._raw_chunks[chunk : chunk + n_whole])
                row += n_whole * height
            else:
                part = self._raw_chunks[chunk, start * row_bytes : stop * row_bytes]
                np.copyto(target[at : at + part.size], part)
                row += stop - start

    def damaged(self, chunk: int, error: ValueError) -> DamagedArchiveError:
        """Return the error that says what is wrong with a chunk."""
        where = describe_chunk(self._spec, chunk, self._n_rows, self._first_row)
        return DamagedArchiveError(f"{self.path}: {where} is damaged: {error}: {RESTORE}")


class OpenShards:
    """The most recently used mapped shards, by their reader's key and shard number.

    What is mapped and was read counts as memory of the process, though the kernel takes it back when it needs it;
    where somebody ends processes by that count, `limit` keeps it low.

    There is no lock that a fork could leave closed: each step is atomic in the interpreter, and if two threads open
    the same shard at once, one of the two mappings is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_bytes: int | None = None
        self._shards: OrderedDict[tuple[object, int], MappedShard] = OrderedDict()

    def get(self, key: tuple[object, int], open_: Callable[[], MappedShard]) -> MappedShard:
        """Return the shard kept under `key`, or open it, keep it, and let the one unused for longest go."""
        found = self._shards.get(key)
        if found is None:
            found = open_()
            self._shards[key] = found
            while self._is_over():
                self._shards.popitem(last=False)
        else:
            try:
                self._shards.move_to_end(key)
            except KeyError:  # another thread has just let it go
                self._shards[key] = found
        return found

    def limit(self, most_bytes: int) -> None:
        """Keep shards of at most so many bytes together, but always the last one."""
        self._most_bytes = most_bytes

    def _is_over(self) -> bool:
        if len(self._shards) > self._most:
            return True
        if self._most_bytes is None or len(self._shards) < 2:
            return False
        return sum(shard.n_bytes for shard in list(self._shards.values())) > self._most_bytes

    def drop(self, owner: object) -> None:
        """Let go of all shards of one reader."""
        for key in [key for key in list(self._shards) if key[0] is owner]:
            self._shards.pop(key, None)

    def __len__(self) -> int:
        return len(self._shards)


def _most_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = soft if soft != resource.RLIM_INFINITY else 4 * _MOST_OPEN
    return max(16, min(_MOST_OPEN, available // 4))


OPEN_SHARDS = OpenShards(_most_open())


def cpu_threads() -> int:
    """Return how many threads a reader takes unless it is told: the processor's, up to four."""
    return min(4, os.cpu_count() or 1)
