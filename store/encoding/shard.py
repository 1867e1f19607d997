"""One shard file: Zarr v3 `sharding_indexed` with the index at the end, encoded and checked here.

The file has the stored chunks without gaps, then the index (offset and size of every chunk as uint64, both 2**64 - 1
for a chunk past the end of the array), then the crc32c of the index. A crc32c covers every byte of the file. Readers
accept no gaps, so no bytes can hide or overlap.

The digest of a shard is the SHA-256 of its index and of the crc32c stored after each chunk. It pins every chunk without
a second pass over the data. The size and the crc32c of every chunk, `ChunkTable`, are all that index and digest say.

`ShardEncoder` makes the bytes of a file, from rows in any memory. Rows in a `ShardMemory` are laid out as in the file
of a raw array, so that they are written without a copy.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
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
_PIECE_BYTES = 4 * 1024 * 1024  # what `ShardMemory.in_place` yields at a time

Array = npt.NDArray[np.generic]
ChunkTable = npt.NDArray[np.uint32]
"""Stored size, crc32c included, and crc32c of each chunk of a shard file, little endian, (chunks, 2)."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The places of the chunks in one shard file; every range is inside the file.

    Attributes:
        offsets: First byte of each chunk that is present, int64.
        sizes: Stored bytes of each of them, crc32c included, int64.
        stored: The index as it is in the file, crc32c included.
    """

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    stored: bytes


def shard_path(root: Path, spec: ArraySpec, shard: int) -> Path:
    """Return the file of shard number `shard` of an array or column shard in the archive `root`."""
    across = ["0"] * len(spec.row_shape)
    if spec.column_shard is not None:
        across[0] = str(spec.column_shard)
    return root.joinpath(spec.path, "c", str(shard), *across)


def shard_rows(spec: ArraySpec, n_rows: int, shard: int) -> int:
    """Return the number of rows that shard number `shard` of an array of `n_rows` holds."""
    return max(0, min(spec.rows_per_shard, n_rows - shard * spec.rows_per_shard))


class Checked(NamedTuple):
    """The crc32c of a full chunk, as stored, and the number of its NaN and infinite values."""

    crc: bytes
    n_nonfinite: int


class ShardMemory:
    """Memory for the rows of one shard, laid out as the file of a raw array; uninitialised at first.

    In the file, four bytes of crc32c follow every chunk. Here they stay free after every chunk, and the memory starts
    at a block boundary. A full shard then only needs its checksums and can be written from where it is
    (`residua.store.storage.direct`). A writer that fills a full chunk at once can have it checked by `filled`, while
    the chunk is still in the processor's cache.

    Args:
        spec: The array, one that `suits`.
        n_rows: Capacity in rows, at least 1.

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
        """Say whether chunks are stored as they are in memory, and values stay aligned after a crc32c."""
        return PRESETS[spec.preset].is_raw and CRC_BYTES % spec.storage_dtype.itemsize == 0

    def first(self, n_rows: int) -> "ShardMemory":
        """Return the first `n_rows` rows, in the same memory."""
        first = copy(self)
        first.shape = (n_rows, *self.shape[1:])
        return first

    @property
    def chunks(self) -> list[Array]:
        """The rows of each chunk, (rows per chunk, *row shape), to fill or to read; the last one may be short."""
        height, size = self._spec.rows_per_chunk, self._spec.chunk_bytes
        starts = range(0, self.shape[0], height)
        full = [self._bytes[i * (size + CRC_BYTES) :][:size].view(self.dtype) for i in range(len(starts))]
        shape = (height, *self.shape[1:])
        return [chunk.reshape(shape)[: self.shape[0] - start] for start, chunk in zip(starts, full, strict=True)]

    def filled(self, chunk: int, n_rows: int) -> None:
        """Note that `n_rows` rows were just written to chunk number `chunk`; check it at once if it is full."""
        if n_rows < self._spec.rows_per_chunk:
            self._checked.pop(chunk, None)
            return
        values = self._bytes[chunk * (self._spec.chunk_bytes + CRC_BYTES) :][: self._spec.chunk_bytes]
        n_nonfinite = count_nonfinite(values.view(self.dtype), self._spec.dtype)
        self._checked[chunk] = Checked(crc_bytes(crc32c(values)), n_nonfinite)

    def checked(self, chunk: int) -> Checked | None:
        """Return what `filled` found in chunk number `chunk`; None if it is not full or changed since."""
        is_full = (chunk + 1) * self._spec.rows_per_chunk <= self.shape[0]
        return self._checked.get(chunk) if is_full else None

    def in_place(self, buffers: Iterable[Buffer]) -> Iterator[Buffer]:
        """Yield the bytes of `buffers` from this memory, one after the other, in pieces of full blocks.

        Args:
            buffers: Chunks as they are stored, from the first one on. Buffers that are not in this memory yet, such as
                a checksum or a copy of the last chunk, are copied to their place.
        """
        done = end = 0
        for buffer in buffers:
            data = np.frombuffer(buffer, np.uint8) if isinstance(buffer, bytes) else buffer.reshape(-1).view(np.uint8)
            place = self._bytes[end : end + data.size]
            if place.ctypes.data != data.ctypes.data:
                place[:] = data
            end += data.size
            if end - done >= _PIECE_BYTES:
                aligned = end - end % BLOCK
                yield self._bytes[done:aligned]
                done = aligned
        yield self._bytes[done:end]


class ShardEncoder:
    """The bytes of one shard file, encoded on demand: write each buffer before taking the next.

    A chunk is checked, compressed and written while it is in the processor's cache, and at most one encoded chunk is in
    memory.

    Args:
        rows: C-contiguous (rows, *row shape) in storage dtype, or such rows in a `ShardMemory`, from which they are
            written without a copy. Only the last shard of an array may be short; its last chunk is padded with zeros.
        spec: The array that the rows belong to.

    Attributes:
        n_bytes: Size of the file; like the others, known once all buffers are taken.
        digest: The shard's digest, in hex; see the module's head.
        chunks: Size and crc32c of every chunk.
        n_nonfinite: Number of NaN and infinite values in the rows.

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
        self.chunks: ChunkTable = np.empty((0, 2), "<u4")
        self.n_nonfinite = 0

    def __iter__(self) -> Iterator[Buffer]:
        sizes: list[int] = []
        crcs: list[bytes] = []
        self.n_nonfinite = 0
        buffers = self._encode(sizes, crcs)
        yield from self._rows.in_place(buffers) if isinstance(self._rows, ShardMemory) else buffers
        index = _make_index(sizes, self._spec.chunks_per_shard)
        self.n_bytes = sum(sizes) + len(index)
        self.digest = _digest(index, crcs)
        self.chunks = _chunk_table(sizes, crcs)
        yield index

    def _encode(self, sizes: list[int], crcs: list[bytes]) -> Iterator[Buffer]:
        """Yield the buffers of every chunk; append its stored size and its crc32c to the lists."""
        for number, chunk in enumerate(_chunks(self._rows, self._spec)):
            checked = self._rows.checked(number) if isinstance(self._rows, ShardMemory) else None
            if checked is None:
                self.n_nonfinite += count_nonfinite(chunk, self._spec.dtype)
                stored = encode_chunk(chunk, self._spec.preset)
            else:
                self.n_nonfinite += checked.n_nonfinite
                stored = [chunk, checked.crc]
            sizes.append(sum(len(buffer) if isinstance(buffer, bytes) else buffer.nbytes for buffer in stored))
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
        UnsafeArchiveError: The index is intact but forged: chunks overlap, leave gaps, are outside the file, or are
            larger than the array allows.
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


def check_shard(path: Path, spec: ArraySpec, n_rows: int, *, first_row: int = 0) -> str:
    """Read a shard file once, compare the crc32c of its index and of every chunk, and return its digest.

    Memory stays below the size of one stored chunk and the index. `first_row` is the shard's first row, for messages.

    Raises:
        DamagedArchiveError: The file is missing, cut short or altered; the message names it and the chunks.
        UnsafeArchiveError: The index is forged.
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
                damaged.append(f"{describe_chunk(spec, i, n_rows, first_row)} ({error})")
            crcs.append(chunk[-CRC_BYTES:].tobytes())
    if damaged:
        raise DamagedArchiveError(f"{path}: altered in {few(damaged, _MAX_LISTED, '; ')}: {RESTORE}")
    return _digest(index.stored, crcs)


def read_chunk_table(path: Path, spec: ArraySpec, n_rows: int) -> ChunkTable:
    """Return size and crc32c of every chunk of a shard file, from its index and the stored crc32c; no chunk is read.

    Raises:
        DamagedArchiveError: The file is missing or cut short, or its index was altered.
        UnsafeArchiveError: The index is forged.
    """
    with open_shard(path) as descriptor:
        n_bytes = os.fstat(descriptor).st_size
        return chunk_table_of(lambda at, size: os.pread(descriptor, size, at), n_bytes, spec, n_rows, path)


def chunk_table_of(
    read: Callable[[int, int], bytes], file_bytes: int, spec: ArraySpec, n_rows: int, path: Path
) -> ChunkTable:
    """Return what `read_chunk_table` does, of a file that `read` reads.

    Args:
        read: Returns the bytes from an offset on, as many as are asked for.
        file_bytes: Size of the file.
        spec: The array that the file belongs to.
        n_rows: Rows that the shard holds.
        path: The file, for messages.
    """
    size = index_bytes(spec)
    stored = read(file_bytes - size, size) if size <= file_bytes else b""
    index = parse_index(stored, spec, n_rows=n_rows, file_bytes=file_bytes, path=path)
    crcs = [read(end - CRC_BYTES, CRC_BYTES) for end in (index.offsets + index.sizes).tolist()]
    if any(len(crc) < CRC_BYTES for crc in crcs):
        raise DamagedArchiveError(f"{path} was cut short while it was read: {RESTORE}")
    return _chunk_table(index.sizes.tolist(), crcs)


def shard_bytes(chunks: ChunkTable, spec: ArraySpec) -> int:
    """Return the size of the shard file of these chunks."""
    return int(chunks[:, 0].sum(dtype=np.int64)) + index_bytes(spec)


def shard_index(chunks: ChunkTable, spec: ArraySpec) -> bytes:
    """Return the end of the shard file of these chunks, which says where each chunk is."""
    return _make_index(chunks[:, 0].tolist(), spec.chunks_per_shard)


def shard_digest(chunks: ChunkTable, spec: ArraySpec) -> str:
    """Return the digest of the shard file of these chunks, in hex."""
    index = shard_index(chunks, spec)
    return _digest(index, [np.ascontiguousarray(chunks[:, 1]).tobytes()])


def chunk_table_problem(chunks: ChunkTable, spec: ArraySpec, n_rows: int) -> str:
    """Return why no shard file of `n_rows` rows can have these chunks; empty if one can."""
    n_present = -(-n_rows // spec.rows_per_chunk)
    if len(chunks) != n_present:
        return f"{len(chunks)} chunks, expected {n_present}"
    least, largest = _chunk_sizes(spec)
    sizes = chunks[:, 0]
    if sizes.size and not least <= int(sizes.min()) <= int(sizes.max()) <= largest:
        return f"chunks of {sizes.min():,} to {sizes.max():,} bytes, which must have {least:,} to {largest:,}"
    return ""


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
    """Name a chunk for a message; its shard holds `n_rows` rows from `first_row` on."""
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
    least, largest = _chunk_sizes(spec)
    offsets, sizes = entries.T
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


def _chunk_sizes(spec: ArraySpec) -> tuple[int, int]:
    """Return the least and the most bytes of a stored chunk."""
    largest = max_chunk_bytes(spec.preset, spec.chunk_bytes)
    return largest if PRESETS[spec.preset].is_raw else CRC_BYTES + 1, largest


def _chunk_table(sizes: list[int], crcs: list[bytes]) -> ChunkTable:
    return np.stack([np.array(sizes, "<u4"), np.frombuffer(b"".join(crcs), "<u4")], axis=1)


def _digest(index: bytes, crcs: list[bytes]) -> str:
    return hashlib.sha256(index + b"".join(crcs)).hexdigest()
