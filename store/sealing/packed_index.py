"""The packed index of a sealed archive: what all commit records say, in one file that is read in parts.

`commits.index` has a head, and pages of `page_bytes` each, the last one shorter. The root's metadata have the SHA-256
of the head, and the head has that of every page. A reader takes the head with one read, and then only the pages that it
needs; each is compared when it is read. `store/FORMAT.md` has the layout. Nothing in the file has to be parsed: where
an entry stands follows from the plan and the number of rows.

An index covers every shard. It is a mapping from shard to commit, as the records of an archive that is not sealed are.
"""

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.store.base.canonical import Json
from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import check_file
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.shard import (
    ChunkTable,
    chunk_table_problem,
    index_bytes,
    shard_bytes,
    shard_digest,
    shard_rows,
)
from residua.store.format.commits import Commit, ShardFile
from residua.store.format.plan import Plan
from residua.store.storage.objects import ObjectFolder

INDEX = "commits.index"
MAGIC = b"RESIDUA\x01"
HEADER = struct.Struct("<8sIIQQQ32s")  # magic, page bytes, files of a shard, shards, rows, losses, digest of the plan
PAGE_BYTES = 64 * 1024
DIGEST_BYTES = 32
MAX_HEAD_BYTES = 256 * 1024 * 1024
REBUILD = "restore it from a copy, or delete it and run residua pack, which makes it again from the records in commits/"
TOTALS = np.dtype(
    [
        ("n_bytes", "<u8"),
        ("n_nonfinite", "<u8"),
        ("n_overflowed", "<u8"),
        ("n_spoiled", "<u8"),
        ("squares", "<f8"),
        ("error_squares", "<f8"),
        ("n_losses", "<u8"),
    ]
)
"""Sums over all shard files of one array or column shard, and the number of its entries among the losses."""
LOSS = np.dtype([("shard", "<u8"), ("n_nonfinite", "<u8"), ("n_overflowed", "<u8"), ("n_spoiled", "<u8")])
"""Numbers of a shard file that are not all zero."""
_CHUNK_BYTES = 8
_SQUARES_BYTES = 16
_N_SLOTS = 128  # pages kept, 8 MiB

WHOLE_BYTES = 256 * 2**10
"""An index of at most so many bytes, of some 32,000 chunks, comes at once from an address."""


class FileTotals(NamedTuple):
    """Sums over the shard files of one array or column shard; see `ShardFile`."""

    n_bytes: int
    n_nonfinite: int
    n_overflowed: int
    n_spoiled: int
    squares: float
    error_squares: float


class IndexLayout:
    """Where the entries of an index stand, counted from its first page.

    Args:
        plan: The plan of the archive.
        n_rows: Its rows.

    Attributes:
        files: What the shard files of one shard hold, in the order of the index.
        n_shards: Shards of the archive.
        tables_bytes: Bytes of the chunk tables and of the squares; losses follow.
    """

    def __init__(self, plan: Plan, n_rows: int) -> None:
        self.files = tuple(spec for array in plan.arrays for spec in array.file_specs)
        self.number = {spec.key: i for i, spec in enumerate(self.files)}
        self.n_shards = plan.n_shards(n_rows)
        self._tables = []
        at = 0
        for spec in self.files:
            self._tables.append(at)
            at += _CHUNK_BYTES * -(-n_rows // spec.rows_per_chunk)
        self._squares: dict[int, int] = {}
        for key in lossy_keys(plan):
            self._squares[self.number[key]] = at
            at += _SQUARES_BYTES * self.n_shards
        self.tables_bytes = at

    def table_at(self, file: int, shard: int) -> int:
        """Return where the chunk table of a shard file begins."""
        return self._tables[file] + _CHUNK_BYTES * shard * self.files[file].chunks_per_shard

    def squares_at(self, file: int, shard: int) -> int | None:
        """Return where the two sums of squares of a shard file stand; None if its codec is lossless."""
        start = self._squares.get(file)
        return None if start is None else start + _SQUARES_BYTES * shard


def lossy_keys(plan: Plan) -> list[str]:
    """Return the keys of the shard files whose records have sums of squares."""
    sites = [site for site in plan.sites if not PRESETS[site.codec].is_lossless]
    return [spec.key for site in sites for spec in site.arrays(plan.rows_per_shard)[0].file_specs]


def head_bytes(n_files: int, n_pages: int) -> int:
    """Return the size of an index's head."""
    return HEADER.size + TOTALS.itemsize * n_files + DIGEST_BYTES * n_pages


class PackedIndex(Mapping[int, Commit]):
    """The commit of every shard of a sealed archive, from its packed index.

    Opening reads the head. Every other access reads the pages that it needs, and keeps some.

    Args:
        archive: Folder of the archive.
        plan: Its plan.
        n_rows: Its rows.
        entry: What the root's metadata say about the index.
        start: For an address: its first bytes, as far as they are known.
        whole_bytes: For an address: an index of at most so many bytes comes with one request.

    Attributes:
        path: The file, or its address.
        digest: SHA-256 of its head, in hex, which protects everything that the index says.
        n_bytes: Bytes of the file.

    Raises:
        DamagedArchiveError: The index is missing or was altered.
        UnsafeArchiveError: It is not an index that Residua writes, or of another archive.
        StorageError: It is at an address, and cannot be read.
    """

    def __init__(
        self,
        archive: Path | ObjectFolder,
        plan: Plan,
        n_rows: int,
        entry: Mapping[str, Json],
        start: bytes = b"",
        whole_bytes: int = WHOLE_BYTES,
    ) -> None:
        self._file: _File = (
            _RemoteFile(archive, start, whole_bytes) if isinstance(archive, ObjectFolder) else _LocalFile(archive)
        )
        self.path = self._file.path
        self.digest = str(entry["sha256"])
        self._args = (archive, plan, n_rows, dict(entry))
        self._plan = plan
        self._n_rows = n_rows
        self.n_bytes, self._head_bytes = int(str(entry["n_bytes"])), int(str(entry["head_bytes"]))
        self._file.check(self.n_bytes)
        if self._head_bytes > min(MAX_HEAD_BYTES, self.n_bytes):
            raise UnsafeArchiveError(f"{self.path}: a head of {self._head_bytes:,} of {self.n_bytes:,} bytes")
        head = self._file.read(0, self._head_bytes, self.n_bytes)
        if start and hashlib.sha256(head).hexdigest() != entry["sha256"]:
            self._file.forget()
            head = self._file.read(0, self._head_bytes, self.n_bytes)
        if hashlib.sha256(head).hexdigest() != entry["sha256"]:
            raise DamagedArchiveError(f"{self.path} was altered (the SHA-256 of its head differs): {REBUILD}")
        self._parse_head(head)
        self._slots: list[tuple[int, bytes]] = [(-1, b"")] * _N_SLOTS  # by page number; each is replaced in one step

    def __reduce__(self) -> tuple[object, ...]:
        return PackedIndex, self._args

    def _parse_head(self, head: bytes) -> None:
        if len(head) < HEADER.size:
            raise UnsafeArchiveError(f"{self.path} has a head of {len(head)} bytes")
        magic, page_bytes, n_files, n_shards, n_rows, n_losses, plan = HEADER.unpack_from(head)
        layout = IndexLayout(self._plan, self._n_rows)
        expected = (MAGIC, len(layout.files), layout.n_shards, self._n_rows, bytes.fromhex(self._plan.digest))
        if (magic, n_files, n_shards, n_rows, plan) != expected:
            raise UnsafeArchiveError(
                f"{self.path} is an index of {n_files:,} files a shard, {n_shards:,} shards and {n_rows:,} rows, or of "
                f"another plan; this archive has {expected[1]:,}, {expected[2]:,} and {expected[3]:,}: {REBUILD}"
            )
        body_bytes = layout.tables_bytes + LOSS.itemsize * n_losses
        n_pages = -(-body_bytes // page_bytes) if page_bytes else -1
        sizes = (head_bytes(n_files, n_pages), self._head_bytes + body_bytes)
        if page_bytes > 2**24 or sizes != (self._head_bytes, self.n_bytes):
            raise UnsafeArchiveError(
                f"{self.path} should have {sizes[0]:,} bytes of head and {sizes[1]:,} in all, and the archive's "
                f"metadata say {self._head_bytes:,} and {self.n_bytes:,}"
            )
        totals = np.frombuffer(head, TOTALS, n_files, HEADER.size)
        squares = np.stack([totals["squares"], totals["error_squares"]])
        if not (np.isfinite(squares) & (squares >= 0)).all():
            raise UnsafeArchiveError(f"{self.path}: a sum of squares is {squares.min()}")
        counts = [int(count) for count in totals["n_losses"].tolist()]
        if sum(counts) != n_losses or max(counts, default=0) > n_shards:
            raise UnsafeArchiveError(f"{self.path}: the numbers of losses do not add up to {n_losses:,}")
        self._layout, self._page_bytes, self._body_bytes, self._totals = layout, page_bytes, body_bytes, totals
        self._first_loss = np.cumsum([0, *counts]).tolist()
        self._digests = head[HEADER.size + totals.nbytes :]

    def __len__(self) -> int:
        return self._layout.n_shards

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._layout.n_shards))

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, int) and 0 <= shard < self._layout.n_shards

    def __getitem__(self, shard: int) -> Commit:
        if shard not in self:
            raise KeyError(shard)
        arrays = {spec.key: self._shard_file(number, shard) for number, spec in enumerate(self._layout.files)}
        return Commit(plan=self._plan.digest, shard=shard, rows=self.rows(shard), arrays=dict(sorted(arrays.items())))

    def rows(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard, and the row after its last."""
        first = shard * self._plan.rows_per_shard
        return first, min(first + self._plan.rows_per_shard, self._n_rows)

    def file(self, key: str, shard: int) -> ShardFile:
        """Return what the record of a shard says about one of its files.

        Raises:
            KeyError: There is no such array or column shard.
            DamagedArchiveError: The index was altered.
            UnsafeArchiveError: The index says something that no shard file can have.
        """
        return self._shard_file(self._layout.number[key], shard)

    def chunk_table(self, key: str, shard: int) -> ChunkTable:
        """Return size and crc32c of every chunk of one shard file; raises as `file` does."""
        return self._table(self._layout.number[key], shard)

    def file_bytes(self, key: str) -> npt.NDArray[np.int64]:
        """Return the size of every shard file of an array or column shard, (shards,); raises as `file` does."""
        number = self._layout.number[key]
        spec = self._layout.files[number]
        n_chunks = -(-self._n_rows // spec.rows_per_chunk)
        table = np.frombuffer(self._read(self._layout.table_at(number, 0), _CHUNK_BYTES * n_chunks), "<u4")
        starts = np.arange(0, n_chunks, spec.chunks_per_shard)
        return np.add.reduceat(table[::2].astype(np.int64), starts) + index_bytes(spec) if len(starts) else starts

    def check(self) -> None:
        """Read all pages; raises DamagedArchiveError if one was altered."""
        for number in range(-(-self._body_bytes // self._page_bytes)):
            self._page(number)

    def totals(self, key: str) -> FileTotals:
        """Return the sums over the shard files of an array or column shard; KeyError if there is none."""
        return FileTotals(*self._totals[self._layout.number[key]].tolist()[:-1])

    def losses(self, key: str) -> npt.NDArray[np.void]:
        """Return the numbers of the shard files that have any of `LOSS`, in the order of their shards."""
        first, stop = self._first_loss[self._layout.number[key] :][:2]
        found = np.frombuffer(self._losses(first, stop), LOSS)
        shards = found["shard"]
        if shards.size and (int(shards[-1]) >= len(self) or (shards[1:] <= shards[:-1]).any()):
            raise UnsafeArchiveError(f"{self.path}: the losses of {key} are not in the order of shards")
        return found

    def _shard_file(self, number: int, shard: int) -> ShardFile:
        spec = self._layout.files[number]
        table = self._table(number, shard)
        at = self._layout.squares_at(number, shard)
        squares, error_squares = (None, None) if at is None else struct.unpack("<dd", self._read(at, _SQUARES_BYTES))
        loss = self._loss(number, shard)
        return ShardFile(
            n_bytes=shard_bytes(table, spec),
            digest=shard_digest(table, spec),
            n_nonfinite=loss[0],
            squares=squares,
            error_squares=error_squares,
            n_overflowed=loss[1],
            n_spoiled=loss[2],
            chunks=table.tobytes(),
        )

    def _table(self, number: int, shard: int) -> ChunkTable:
        spec = self._layout.files[number]
        n_rows = shard_rows(spec, self._n_rows, shard)
        n_chunks = -(-n_rows // spec.rows_per_chunk)
        stored = self._read(self._layout.table_at(number, shard), _CHUNK_BYTES * n_chunks)
        table = np.frombuffer(stored, "<u4").reshape(-1, 2)
        if problem := chunk_table_problem(table, spec, n_rows):
            raise UnsafeArchiveError(f"{self.path}: shard {shard} of {spec.key} has {problem}")
        return table

    def _loss(self, number: int, shard: int) -> tuple[int, int, int]:
        first, stop = self._first_loss[number : number + 2]
        place = bisect_left(range(first, stop), shard, key=lambda i: self._loss_entry(i)[0]) + first
        entry = self._loss_entry(place) if place < stop else (-1, 0, 0, 0)
        return (entry[1], entry[2], entry[3]) if entry[0] == shard else (0, 0, 0)

    def _loss_entry(self, place: int) -> tuple[int, int, int, int]:
        shard, n_nonfinite, n_overflowed, n_spoiled = struct.unpack("<QQQQ", self._losses(place, place + 1))
        return shard, n_nonfinite, n_overflowed, n_spoiled

    def _losses(self, first: int, stop: int) -> bytes:
        return self._read(self._layout.tables_bytes + LOSS.itemsize * first, LOSS.itemsize * (stop - first))

    def _read(self, start: int, n_bytes: int) -> bytes:
        """Return bytes of the body, from pages whose digests were compared."""
        pages = range(start // self._page_bytes, -(-(start + n_bytes) // self._page_bytes))
        joined = b"".join(map(self._page, pages))
        return joined[start - pages.start * self._page_bytes :][:n_bytes]

    def _page(self, number: int) -> bytes:
        slot = number % _N_SLOTS
        kept, content = self._slots[slot]
        if kept != number:
            start = number * self._page_bytes
            n_bytes = min(self._page_bytes, self._body_bytes - start)
            content = self._file.read(self._head_bytes + start, n_bytes, self.n_bytes)
            if hashlib.sha256(content).digest() != self._digests[DIGEST_BYTES * number :][:DIGEST_BYTES]:
                raise DamagedArchiveError(f"{self.path} was altered (page {number:,}): {REBUILD}")
            self._slots[slot] = number, content
        return content


class _LocalFile:
    """An index in a folder. It is opened for each read, so that a fork or a thread shares nothing."""

    def __init__(self, archive: Path) -> None:
        self.path = archive / INDEX
        self._archive = archive

    def check(self, n_bytes: int) -> None:
        """Raise unless there is such a file of at most `n_bytes` in the archive."""
        check_file(self._archive, self.path, n_bytes)

    def forget(self) -> None:
        """Do nothing: nothing is kept."""

    def read(self, start: int, n_bytes: int, file_bytes: int) -> bytes:
        """Return bytes of the file, which has to have `file_bytes`."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedArchiveError(f"{self.path} cannot be read ({error.strerror}): {REBUILD}") from error
        try:
            if (size := os.fstat(descriptor).st_size) != file_bytes:
                raise DamagedArchiveError(f"{self.path} has {size:,} of {file_bytes:,} bytes: {REBUILD}")
            return os.pread(descriptor, n_bytes, start)
        finally:
            os.close(descriptor)


class _RemoteFile:
    """An index at an address. A short one comes whole with its head, for another request would take longer.

    Args:
        folder: The archive.
        start: The first bytes of the index, as far as they are known.
        whole_bytes: An index of at most so many bytes comes with one request.
    """

    def __init__(self, folder: ObjectFolder, start: bytes, whole_bytes: int) -> None:
        self.path = f"{folder}/{INDEX}"
        self._folder = folder
        self._start = start
        self._whole_bytes = whole_bytes

    def check(self, n_bytes: int) -> None:
        """Ask for nothing: the first read tells."""

    def read(self, start: int, n_bytes: int, file_bytes: int) -> bytes:
        """Return bytes of the file; its size is known from the metadata, and ranges say if they are short."""
        if not n_bytes:
            return b""
        stop = start + n_bytes
        if stop > len(self._start) and file_bytes <= self._whole_bytes:
            self._start = self._ask(0, file_bytes)
        return self._start[start:stop] if stop <= len(self._start) else self._ask(start, n_bytes)

    def forget(self) -> None:
        """Ask again for what is known: it may be of an archive that was replaced meanwhile."""
        self._start = b""

    def _ask(self, start: int, n_bytes: int) -> bytes:
        try:
            return bytes(self._folder.read_range(INDEX, start, start + n_bytes))
        except FileNotFoundError:
            raise DamagedArchiveError(f"{self.path} is missing: copy the archive there again") from None


_File = _LocalFile | _RemoteFile


def file_record(commits: Mapping[int, Commit], key: str, shard: int) -> ShardFile:
    """Return what is recorded of one shard file: of an index, without what it says of the others of that shard."""
    return commits.file(key, shard) if isinstance(commits, PackedIndex) else commits[shard].arrays[key]


def file_totals(commits: Mapping[int, Commit], key: str) -> FileTotals:
    """Return the sums over the shard files of an array or column shard, from records or from a packed index."""
    if isinstance(commits, PackedIndex):
        return commits.totals(key)
    files = [commits[shard].arrays[key] for shard in sorted(commits)]
    return FileTotals(
        n_bytes=sum(file.n_bytes for file in files),
        n_nonfinite=sum(file.n_nonfinite for file in files),
        n_overflowed=sum(file.n_overflowed for file in files),
        n_spoiled=sum(file.n_spoiled for file in files),
        squares=sum(file.squares or 0.0 for file in files),
        error_squares=sum(file.error_squares or 0.0 for file in files),
    )
