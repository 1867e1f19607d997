"""One shard file: Zarr v3 `sharding_indexed` with its index at the end, encoded and checked by hand.

The file is the stored chunks, one directly behind the other, then the index (offset and size of every chunk as
uint64, both 2**64 - 1 for a chunk past the end of the array), then the index's crc32c. Every byte of the file is
under some crc32c. We write no gaps and accept none, so nothing can hide or overlap.

A shard's digest is the SHA-256 of its index and of the crc32c stored behind each chunk. It pins every chunk
without a second pass over the data.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError, few
from residua.store.encoding.codecs import PRESETS, check_chunk, encode_chunk, max_chunk_bytes
from residua.store.encoding.lossy import count_nonfinite
from residua.store.encoding.spec import ArraySpec
from residua.store.storage.crc import CRC_BYTES, Buffer, crc32c, crc_bytes
from residua.store.storage.direct import BLOCK, aligned_bytes

INDEX_CODECS = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})
INDEX_LOCATION = "end"
RESTORE = (
    "restore the file from a copy, or delete the shard's record commits/NNNNNNNN-*.json and run the same capture again"
)
_EMPTY = np.uint64(2**64 - 1)
_ENTRY_BYTES = 16
_MAX_LISTED = 8

Array = npt.NDArray[np.generic]
_PIECE_BYTES = 4 * 1024 * 1024  # written at a time


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the chunks of one shard file lie; every range is inside the file.

    Attributes:
        offsets: First byte of each chunk that is there, int64.
        sizes: Stored bytes of each of them, crc32c included, int64.
        stored: The index as it is in the file, crc32c included.
    """

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    stored: bytes


def shard_path(root: Path, spec: ArraySpec, shard: int) -> Path:
    """Return the file of shard number `shard` of an array, or of a part of one, in the archive `root`."""
    across = ["0"] * len(spec.row_shape)
    if spec.column_shard is not None:
        across[0] = str(spec.column_shard)
    return root.joinpath(spec.path, "c", str(shard), *across)


def shard_rows(spec: ArraySpec, n_rows: int, shard: int) -> int:
    """Return how many rows of an array of `n_rows` lie in shard number `shard`."""
    return max(0, min(spec.rows_per_shard, n_rows - shard * spec.rows_per_shard))


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
        return PRESETS[spec.preset].is_raw and CRC_BYTES % spec.storage_dtype.itemsize == 0

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


class ShardEncoder:
    """The bytes of one shard file, encoded while they are taken: iterate once, and write each part before the next.

    A chunk is looked through, checked, compressed and written while it is in the processor's cache, and no more
    than one encoded chunk is in memory.

    Args:
        rows: C-contiguous (rows, *row shape) in storage dtype, or such rows in a `ShardMemory`, from which they are
            written without a copy. Only the last shard of an array may be short; its last chunk is filled up with
            zeros.
        spec: The array that the rows belong to.

    Attributes:
        n_bytes: Size of the file, once all parts are taken.
        digest: The shard's digest, in hex, then as well; see the module's head.
        n_nonfinite: NaN and infinite values among the rows, then as well.

    Raises:
        ValueError: The rows do not fit the array.
    """

    def __init__(self, rows: Array | ShardMemory, spec: ArraySpec) -> None:
        expected = (spec.row_shape, spec.storage_dtype)
        if (rows.shape[1:], rows.dtype) != expected or not 0 < rows.shape[0] <= spec.rows_per_shard:
            raise ValueError(
                f"{spec.path} takes 1 to {spec.rows_per_shard} rows of {expected}, found {rows.shape} of {rows.dtype}"
            )
        self._rows = rows
        self._spec = spec
        self.n_bytes = 0
        self.digest = ""
        self.n_nonfinite = 0

    def __iter__(self) -> Iterator[Buffer]:
        sizes: list[int] = []
        crcs: list[bytes] = []
        parts = self._encode(sizes, crcs)
        yield from self._rows.in_place(parts) if isinstance(self._rows, ShardMemory) else parts
        index = _make_index(sizes, self._spec.chunks_per_shard)
        self.n_bytes = sum(sizes) + len(index)
        self.digest = _digest(index, crcs)
        yield index

    def _encode(self, sizes: list[int], crcs: list[bytes]) -> Iterator[Buffer]:
        """Yield the parts of every chunk; its stored size and its crc32c are appended to the lists."""
        for number, chunk in enumerate(_chunks(self._rows, self._spec)):
            checked = self._rows.checked(number) if isinstance(self._rows, ShardMemory) else None
            if checked is None:
                self.n_nonfinite += count_nonfinite(chunk, self._spec.dtype)
                stored = encode_chunk(chunk, self._spec.preset)
            else:
                self.n_nonfinite += checked.n_nonfinite
                stored = [chunk, checked.crc]
            sizes.append(sum(len(part) if isinstance(part, bytes) else part.nbytes for part in stored))
            crcs.append(bytes(stored[-1]))
            yield from stored


def index_bytes(spec: ArraySpec) -> int:
    """Return the size of a shard's index, crc32c included."""
    return spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES


def parse_index(stored: bytes, spec: ArraySpec, *, n_rows: int, file_bytes: int, path: Path) -> ShardIndex:
    """Check the index of a shard file and return it.

    Args:
        stored: The last `index_bytes(spec)` bytes of the file.
        spec: The array that the file belongs to.
        n_rows: Rows that the shard holds.
        file_bytes: Size of the file.
        path: The file, for messages.

    Raises:
        DamagedArchiveError: The index was altered or cut off.
        UnsafeArchiveError: The index is intact and yet no honest writer's: chunks that overlap, leave gaps, lie
            outside the file, or are larger than the array allows.
    """
    body = stored[:-CRC_BYTES]
    if len(stored) != index_bytes(spec) or crc_bytes(crc32c(body)) != stored[-CRC_BYTES:]:
        raise DamagedArchiveError(
            f"{path}: the shard's index is damaged, or the file was cut short ({file_bytes:,} bytes): {RESTORE}"
        )
    entries = np.frombuffer(body, "<u8").reshape(-1, 2)
    n_present = -(-n_rows // spec.rows_per_chunk)
    if not (entries[n_present:] == _EMPTY).all():
        raise UnsafeArchiveError(f"{path}: the index has chunks beyond the shard's {n_rows:,} rows")
    _check_entries(entries[:n_present], spec, file_bytes - len(stored), path)
    offsets, sizes = entries[:n_present].astype(np.int64).T.copy()
    return ShardIndex(offsets=offsets, sizes=sizes, stored=stored)


def check_shard(path: Path, spec: ArraySpec, n_rows: int) -> str:
    """Read a shard file once, compare the crc32c of its index and of every chunk, and return its digest.

    Memory stays below the size of one stored chunk and the index.

    Raises:
        DamagedArchiveError: The file is missing, cut short or altered; the message names it and the chunks.
        UnsafeArchiveError: The index is hostile.
    """
    crcs: list[bytes] = []
    damaged: list[str] = []
    with open_shard(path) as descriptor:
        index = read_index(descriptor, spec, n_rows=n_rows, path=path)
        buffer = np.empty(int(index.sizes.max()), np.uint8)
        for i, (offset, size) in enumerate(zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)):
            chunk = buffer[:size]
            n_read = os.preadv(descriptor, [chunk.data], offset)
            try:
                check_chunk(chunk[:n_read])
            except ValueError as error:
                damaged.append(f"{describe_chunk(spec, i, n_rows)} ({error})")
            crcs.append(chunk[-CRC_BYTES:].tobytes())
    if damaged:
        raise DamagedArchiveError(f"{path}: altered in {few(damaged, _MAX_LISTED, '; ')}: {RESTORE}")
    return _digest(index.stored, crcs)


@contextmanager
def open_shard(path: Path) -> Iterator[int]:
    """Yield a descriptor of a shard file, open for reading.

    Raises:
        DamagedArchiveError: It is missing, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedArchiveError(f"{path} is missing: {RESTORE}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedArchiveError(f"{path} is not a regular file: {RESTORE}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_index(descriptor: int, spec: ArraySpec, *, n_rows: int, path: Path) -> ShardIndex:
    """Read and check the index of an open shard file; see `parse_index`."""
    file_bytes = os.fstat(descriptor).st_size
    size = index_bytes(spec)
    stored = os.pread(descriptor, size, file_bytes - size) if size <= file_bytes else b""
    return parse_index(stored, spec, n_rows=n_rows, file_bytes=file_bytes, path=path)


def describe_chunk(spec: ArraySpec, chunk: int, n_rows: int, first_row: int = 0) -> str:
    """Return the words by which messages name a chunk of a shard that holds `n_rows` rows from `first_row` on."""
    start = chunk * spec.rows_per_chunk
    stop = min(start + spec.rows_per_chunk, n_rows)
    return f"chunk {chunk} (rows {first_row + start:,} to {first_row + stop - 1:,})"


def _chunks(rows: Array | ShardMemory, spec: ArraySpec) -> Iterator[Array]:
    height = spec.rows_per_chunk
    if isinstance(rows, ShardMemory):
        chunks = rows.chunks
    else:
        chunks = [rows[start : start + height] for start in range(0, len(rows), height)]
    for chunk in chunks:
        if len(chunk) < height:
            padded = np.zeros((height, *spec.row_shape), rows.dtype)
            padded[: len(chunk)] = chunk
            yield padded
        else:
            yield chunk


def _make_index(sizes: list[int], n_chunks: int) -> bytes:
    entries = np.full((n_chunks, 2), _EMPTY, "<u8")
    entries[: len(sizes), 1] = sizes
    entries[: len(sizes), 0] = np.cumsum([0, *sizes[:-1]])
    body = entries.tobytes()
    return body + crc_bytes(crc32c(body))


def _check_entries(entries: npt.NDArray[np.uint64], spec: ArraySpec, data_bytes: int, path: Path) -> None:
    """Raise UnsafeArchiveError unless the chunks fill the first `data_bytes` of the file, one after the other."""
    largest = max_chunk_bytes(spec.preset, spec.chunk_bytes)
    offsets, sizes = entries.T
    least = largest if PRESETS[spec.preset].is_raw else CRC_BYTES + 1
    impossible = (sizes > largest) | (sizes < least)
    if not impossible.any():
        ends = np.cumsum(sizes)
        impossible = (offsets != ends - sizes) | (ends > data_bytes)
        if not impossible.any() and ends[-1] == data_bytes:
            return
    chunk = int(impossible.argmax()) if impossible.any() else len(entries) - 1
    raise UnsafeArchiveError(
        f"{path}: the index puts chunk {chunk} at byte {offsets[chunk]} with {sizes[chunk]} bytes; chunks must "
        f"follow each other, have {least:,} to {largest:,} bytes, and fill {data_bytes:,} bytes"
    )


def _digest(index: bytes, crcs: list[bytes]) -> str:
    return hashlib.sha256(index + b"".join(crcs)).hexdigest()
