"""Reads rows of one array, by range or by list, from memory-mapped shard files.

Arrays stored raw are read as strided views of the files, with one gather for each shard. Compressed chunks are decoded
into place, each once per call, by a few threads. A chunk's crc32c is compared when the chunk is used first, so an
altered bit is an error that names file and chunk, and never a wrong number.

Several threads may use a reader at once. It survives a fork, and pickles as its path and settings.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.base.untrusted import require_there
from residua.store.encoding.codecs import PRESETS, decode_chunk
from residua.store.encoding.spec import ArraySpec
from residua.store.read.mapped import OPEN_SHARDS, MappedShard, OpenShards, cpu_threads

_FEW_CHUNKS = 3  # decoded faster without waking a thread
_MAX_THREADS = max(4, os.cpu_count() or 1)

Array: TypeAlias = npt.NDArray[np.generic]
Check: TypeAlias = Literal["once", "always", "never"]
RowNumbers: TypeAlias = npt.NDArray[np.int64]
T = TypeVar("T")


class _Span(NamedTuple):
    """Rows of one shard or chunk: its number, first row and row after the last, and their place in the output."""

    block: int
    first: int
    last: int
    at: int


class _Key:
    """The key of one reader's shards among the open ones."""


class ArrayReader:
    """Reads rows of one array.

    Args:
        root: Folder of the archive.
        spec: The array.
        n_rows: Rows of the array.
        check: When a chunk's crc32c is compared: ``once`` (when it is used first), ``always`` or ``never``.
        threads: Threads that decode compressed chunks, from a pool that all readers of the process share; by default
            the processor's, up to four.
        open_shards: Keeps shard files open; by default for all readers of the process.
    """

    def __init__(
        self,
        root: Path,
        spec: ArraySpec,
        n_rows: int,
        *,
        check: Check = "once",
        threads: int | None = None,
        open_shards: OpenShards = OPEN_SHARDS,
    ) -> None:
        self._root = root
        self._spec = spec
        self._n_rows = n_rows
        self._check: Check = check
        self._threads = cpu_threads() if threads is None else threads
        self._is_raw = PRESETS[spec.preset].is_raw
        self._key = _Key()
        self._verified: dict[int, npt.NDArray[np.bool_]] = {}  # a byte a chunk; outlives the mappings
        self._open_shards = open_shards
        weakref.finalize(self, open_shards.drop, self._key)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._root, self._spec, self._n_rows, self._check, self._threads)

    def read(self, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` (not included), (rows, *row shape), in storage dtype.

        Raises:
            IndexError: The array has no such rows.
            DamagedArchiveError: A shard file is missing or altered; the message names it.
            UnsafeArchiveError: The index of a shard file is forged.
        """
        self._check_range(start, stop)
        if start < stop:
            self._require(start // self._spec.rows_per_shard)  # a missing shard is an error before memory is taken
        out = np.empty((stop - start, *self._spec.row_shape), self._spec.storage_dtype)
        self.read_into(out, start, stop)
        return out

    def read_into(self, out: Array, start: int, stop: int) -> None:
        """Read rows `start` to `stop` (not included) into `out`; raises as `read` does.

        Args:
            out: C-contiguous (rows, *row shape) in storage dtype.
            start: First row.
            stop: Row after the last.

        Raises:
            ValueError: `out` is not of that shape, dtype and layout.
        """
        self._check_range(start, stop)
        expected = (stop - start, *self._spec.row_shape)
        if out.shape != expected or out.dtype != self._spec.storage_dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"rows {start:,} to {stop:,} of {self._spec.path} need a C-contiguous {self._spec.storage_dtype} "
                f"array {expected}, found {out.dtype} {out.shape}"
            )
        if self._is_raw:
            for span in _spans(start, stop, self._spec.rows_per_shard):
                self._copy_raw(span, out)
        else:
            self._run(lambda span: self._decode(span, out), list(_spans(start, stop, self._spec.rows_per_chunk)))

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Return rows in the given order, repeats allowed: (rows, *row shape) in storage dtype.

        Raises:
            IndexError: The array has no such row.
            DamagedArchiveError: A shard file is missing or altered; the message names it.
            UnsafeArchiveError: The index of a shard file is forged.
        """
        wanted = self._check_rows(rows)
        out = np.empty((len(wanted), *self._spec.row_shape), self._spec.storage_dtype)
        if len(wanted):
            items = self._as_items(out)
            if self._is_raw:
                self._gather_raw(wanted, items)
            else:
                chunks, local = np.divmod(wanted, self._spec.rows_per_chunk)
                jobs = [(chunk, local[places], places) for chunk, places in _groups(chunks)]
                self._run(lambda job: self._gather(*job, items), jobs)
        return out

    def ahead(
        self,
        pieces: Iterable[RowNumbers | range],
        most_bytes: int,  # noqa: ARG002  # for addresses
    ) -> Iterator[RowNumbers | range]:
        """Yield `pieces` of rows that will be read one after the other; at an address, the next are fetched meanwhile.

        Args:
            pieces: Numbers of rows.
            most_bytes: Most stored bytes that are fetched ahead.
        """
        yield from pieces

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._n_rows:
            raise IndexError(f"rows {start:,} to {stop:,} of {self._spec.path} do not exist: it has {self._n_rows:,}")

    def _check_rows(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> RowNumbers:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise IndexError(f"rows of {self._spec.path}: give a list of integers, not {rows!r}")
        outside = (wanted < 0) | (wanted >= self._n_rows)
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]:,} of {self._spec.path} does not exist: it has {self._n_rows:,}")
        return wanted.astype(np.int64)

    def _as_items(self, values: Array) -> npt.NDArray[np.void]:
        """Return a view with each row as one opaque item, which numpy gathers much faster."""
        return values.reshape(-1).view(np.dtype((np.void, self._spec.row_bytes)))

    def _require(self, shard: int) -> None:
        """Raise if the file of a shard is not there."""
        self._open(shard)

    def _open(self, shard: int) -> MappedShard:
        found = self._open_shards.get((self._key, shard), lambda: self._map(shard))
        found.require_whole()
        return found

    def _map(self, shard: int) -> MappedShard:
        try:
            mapped = MappedShard(self._root, self._spec, shard, self._n_rows, self._verified.get(shard))
        except DamagedArchiveError:
            require_there(self._root)
            raise
        self._verified.setdefault(shard, mapped.verified)
        return mapped

    def _trusts(self, shard: MappedShard) -> bool:
        """Return whether no chunk of `shard` needs comparing."""
        return self._check == "never" or (self._check == "once" and shard.is_verified)

    def _verify(self, shard: MappedShard, chunks: Iterable[int]) -> None:
        """Compare the crc32c of `chunks`, as far as `check` demands."""
        if self._trusts(shard):
            return
        for chunk in chunks:
            if self._check == "always" or not shard.verified[chunk]:
                shard.verify(chunk)

    def _copy_raw(self, span: _Span, out: Array) -> None:
        shard = self._open(span.block)
        height = self._spec.rows_per_chunk
        self._verify(shard, range(span.first // height, -(-span.last // height)))
        shard.copy_raw(span.first, out[span.at : span.at + span.last - span.first])

    def _decode(self, span: _Span, out: Array) -> None:
        target = out[span.at : span.at + span.last - span.first]
        if len(target) == self._spec.rows_per_chunk:
            self._decode_chunk(span.block, target)
        else:
            target[:] = self._new_chunk(span.block)[span.first : span.last]

    def _new_chunk(self, chunk: int) -> Array:
        values = np.empty((self._spec.rows_per_chunk, *self._spec.row_shape), self._spec.storage_dtype)
        self._decode_chunk(chunk, values)
        return values

    def _decode_chunk(self, number: int, out: Array) -> None:
        """Decode a chunk, numbered across all shards, into `out`."""
        shard_number, chunk = divmod(number, self._spec.chunks_per_shard)
        shard = self._open(shard_number)
        self._verify(shard, [chunk])
        try:
            decode_chunk(shard.stored(chunk), out, self._spec.preset, check=False)
        except ValueError as error:
            raise shard.damaged(chunk, error) from error

    def _gather_raw(self, wanted: RowNumbers, items: npt.NDArray[np.void]) -> None:
        """Gather shard by shard. All arithmetic comes first, so that each shard costs a few microseconds."""
        shards, local = np.divmod(wanted, self._spec.rows_per_shard)
        chunks, rows = np.divmod(local, self._spec.rows_per_chunk)
        for number, places in _groups(shards):
            shard = self._open(number)
            picked = chunks[places]
            if not self._trusts(shard):
                self._verify(shard, np.unique(picked).tolist())
            items[places] = shard.raw_rows[picked, rows[places]]

    def _gather(self, chunk: int, local: RowNumbers, places: RowNumbers, items: npt.NDArray[np.void]) -> None:
        items[places] = self._as_items(self._new_chunk(chunk))[local]

    def _run(self, work: Callable[[T], None], jobs: Sequence[T]) -> None:
        """Do all jobs, in this thread and in others. Return when every thread has finished."""
        n_slices = min(self._threads, len(jobs)) if len(jobs) > _FEW_CHUNKS else 1

        def work_on(start: int) -> None:
            for job in jobs[start::n_slices]:
                work(job)

        futures = [_threads_of(os.getpid()).submit(work_on, i) for i in range(1, n_slices)]
        try:
            work_on(0)
        finally:
            wait(futures)
        for future in futures:
            future.result()


def reader_of(spec: ArraySpec, of_files: "Callable[[ArraySpec], ArrayReader]") -> "ArrayReader | ColumnShardsReader":
    """Return the reader of an array, stored in full rows or in column shards.

    Args:
        spec: The array.
        of_files: Returns the reader of an array whose files hold full rows.
    """
    readers = [of_files(columns) for columns in spec.file_specs]
    return readers[0] if len(readers) == 1 else ColumnShardsReader(spec, readers)


class ColumnShardsReader:
    """Reads an array whose rows are cut into column shards, as the ranks of a tensor-parallel model write them.

    Methods are those of `ArrayReader`.

    Args:
        spec: The full array.
        readers: One reader for each range of columns, in order.
    """

    def __init__(self, spec: ArraySpec, readers: Sequence[ArrayReader]) -> None:
        self._width = spec.file_specs[0].row_shape[0]
        self._readers = readers

    def read(self, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` (not included), (rows, *row shape), in storage dtype."""
        return np.concatenate([reader.read(start, stop) for reader in self._readers], axis=1)

    def read_into(self, out: Array, start: int, stop: int) -> None:
        """Read rows `start` to `stop` (not included) into `out`, of storage dtype."""
        for i, reader in enumerate(self._readers):
            out[:, i * self._width : (i + 1) * self._width] = reader.read(start, stop)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Return the given rows, in the given order, (rows, *row shape), in storage dtype."""
        return np.concatenate([reader.take(rows) for reader in self._readers], axis=1)

    def ahead(self, pieces: Iterable[RowNumbers | range], most_bytes: int) -> Iterator[RowNumbers | range]:
        """Yield `pieces` of rows that will be read one after the other; see `ArrayReader.ahead`."""
        for reader in self._readers:
            pieces = reader.ahead(pieces, most_bytes // len(self._readers))
        yield from pieces


@lru_cache(maxsize=1)
def _threads_of(pid: int) -> ThreadPoolExecutor:
    """Return the thread pool of all readers of process `pid`; a forked child needs its own, for it has no threads."""
    return ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix=f"residua-reader-{pid}")


def _reopen(root: Path, spec: ArraySpec, n_rows: int, check: Check, threads: int) -> ArrayReader:
    return ArrayReader(root, spec, n_rows, check=check, threads=threads)


def _groups(keys: RowNumbers) -> Iterator[tuple[int, RowNumbers]]:
    """Yield each key with its places in `keys`, keys ascending."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    stops = [*starts[1:].tolist(), len(order)]
    for key, start, stop in zip(ordered[starts].tolist(), starts.tolist(), stops, strict=True):
        yield key, order[start:stop]


def _spans(start: int, stop: int, height: int) -> Iterator[_Span]:
    """Yield rows `start` to `stop`, cut at multiples of `height`."""
    row = start
    while row < stop:
        block, first = divmod(row, height)
        last = min(height, first + stop - row)
        yield _Span(block, first, last, row - start)
        row += last - first
