"""Shard files mapped into memory. Each is opened and checked once; a limited number stays open.

A mapping costs a file descriptor and one read of the shard's index, but no memory. All readers of a process share the
mappings used last, because the limit on descriptors is the process's; a process that runs out of them gives these back
first. A shard file never changes once it has its name. Reading a mapped file beyond an end that moved crashes the
process (SIGBUS), so the size is compared before each use.
"""

import errno
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

_MAX_OPEN = 1024

Bytes = npt.NDArray[np.uint8]


class MappedShard:
    """One mapped shard file with a checked index.

    Attributes:
        path: The file.
        verified: For each chunk, whether its crc32c was compared, bool, (chunks,).
        is_verified: Whether all chunks were compared.
        raw_rows: For arrays stored raw, (chunks, rows of a chunk), each row one opaque item; empty for others.

    Args:
        root: Folder of the archive.
        spec: The array.
        shard: Number of the shard.
        n_rows: Rows of the array.
        verified: `verified` of an earlier mapping of the shard, which this one continues.

    Raises:
        DamagedArchiveError: The file is missing or cut short, or its index was altered.
        UnsafeArchiveError: The index is forged.
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
        self._mapping = mapping
        # Never closed: views may outlive this object, and the last one frees the mapping.
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

    def require_whole(self) -> None:
        """Raise DamagedArchiveError if the file became shorter since it was mapped; costs a call to the kernel."""
        if (size := self._mapping.size()) < self.n_bytes:
            raise DamagedArchiveError(
                f"{self.path} was cut short to {size:,} of {self.n_bytes:,} bytes while it was open: {RESTORE}"
            )

    def stored(self, chunk: int) -> Bytes:
        """Return the bytes of a chunk as stored, crc32c included."""
        start = self._starts[chunk]
        found: Bytes = self._bytes[start : start + self._sizes[chunk]]
        return found

    def verify(self, chunk: int) -> None:
        """Compare the crc32c of a chunk.

        Raises:
            DamagedArchiveError: The chunk was altered. The message names file, chunk and rows.
        """
        try:
            check_chunk(self.stored(chunk))
        except ValueError as error:
            raise self.damaged(chunk, error) from None
        self.verified[chunk] = True
        self.is_verified = bool(self.verified.all())

    def copy_raw(self, first: int, out: npt.NDArray[np.generic]) -> None:
        """Fill `out`, C-contiguous, with the raw rows from `first` on. Full chunks take one strided copy."""
        height, row_bytes = self._spec.rows_per_chunk, self._spec.row_bytes
        target = out.reshape(-1).view(np.uint8)
        last = first + len(out)
        row = first
        while row < last:
            chunk, start = divmod(row, height)
            n_full = 0 if start else (last - row) // height
            stop = min(height, start + last - row)
            at = (row - first) * row_bytes
            if n_full:
                n_bytes = n_full * self._spec.chunk_bytes
                np.copyto(target[at : at + n_bytes].reshape(n_full, -1), self._raw_chunks[chunk : chunk + n_full])
                row += n_full * height
            else:
                rows = self._raw_chunks[chunk, start * row_bytes : stop * row_bytes]
                np.copyto(target[at : at + rows.size], rows)
                row += stop - start

    def damaged(self, chunk: int, error: ValueError) -> DamagedArchiveError:
        """Return the error for a damaged chunk."""
        where = describe_chunk(self._spec, chunk, self._n_rows, self._first_row)
        return DamagedArchiveError(f"{self.path}: {where} is damaged: {error}: {RESTORE}")


class OpenShards:
    """The mapped shards used last, by the reader's key and the shard's number.

    Pages of a mapping that were read count as memory of the process, although the kernel takes them back when it needs
    them. `limit` bounds that count, for environments that end processes by it (Dask workers, for example).

    No lock guards it, since a fork could leave a lock closed. Each step is atomic in the interpreter. If two threads
    open the same shard at once, one of the two mappings is kept.

    Args:
        max_open: Most shards to keep open.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._max_bytes: int | None = None
        self._shards: OrderedDict[tuple[object, int], MappedShard] = OrderedDict()

    def get(self, key: tuple[object, int], open_: Callable[[], MappedShard]) -> MappedShard:
        """Return the shard kept under `key`, or open and keep it; the shards unused for longest are dropped."""
        found = self._shards.get(key)
        if found is None:
            found = self._opened(open_)
            self._shards[key] = found
            while self._is_over():
                self._shards.popitem(last=False)
        else:
            try:
                self._shards.move_to_end(key)
            except KeyError:  # another thread has just dropped it
                self._shards[key] = found
        return found

    def _opened(self, open_: Callable[[], MappedShard]) -> MappedShard:
        """Open a shard; if the process has no descriptor left, give back all of ours first."""
        try:
            return open_()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._shards.clear()
        try:
            return open_()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise OSError(
                error.errno,
                f"{error.filename or 'a shard'} cannot be opened: too many other files are open. Raise the limit "
                "(ulimit -n), or close files of your own",
            ) from error

    def limit(self, max_bytes: int) -> None:
        """Keep shards of at most `max_bytes` together, but always the last one."""
        self._max_bytes = max_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the shards kept."""
        return sum(shard.n_bytes for shard in list(self._shards.values()))

    def _is_over(self) -> bool:
        if len(self._shards) > self._max_open:
            return True
        return self._max_bytes is not None and len(self._shards) > 1 and self.n_bytes > self._max_bytes

    def drop(self, owner: object) -> None:
        """Drop all shards of one reader."""
        for key in [key for key in list(self._shards) if key[0] is owner]:
            self._shards.pop(key, None)

    def __len__(self) -> int:
        return len(self._shards)


def _max_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = soft if soft != resource.RLIM_INFINITY else 4 * _MAX_OPEN
    return max(16, min(_MAX_OPEN, available // 4))


OPEN_SHARDS = OpenShards(_max_open())


def cpu_threads() -> int:
    """Return the default number of a reader's threads: the processor's, up to four."""
    return min(4, os.cpu_count() or 1)
