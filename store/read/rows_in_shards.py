"""Reads rows of one array, by range or by list, from memory-mapped shard files.

Arrays stored raw are read as strided views of the files, with one gather for each shard. Compressed chunks are decoded
into place, each once per call, by a few threads. A chunk's crc32c is compared when the chunk is used first, so an
altered bit is an error that names file and chunk, and never a wrong number.

Several threads may use a reader at once. It survives a fork, and pickles as its path and settings.
"""

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.base.untrusted import require_there
from residua.store.encoding.codecs import PRESETS, decode_chunk
from residua.store.encoding.spec import ArraySpec
from residua.store.read.mapped import OPEN_SHARDS, MappedShard, OpenShards, cpu_threads

FEW_CHUNKS = 3
"""Chunks that are decoded faster without waking a thread for each."""

_STEP_BYTES = 16 * 2**20  # of rows that are read into further memory first
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


class Following(NamedTuple):
    """What is read next: pieces of rows, and the most stored bytes of them to fetch meanwhile from an address."""

    pieces: Sequence[RowNumbers | range]
    most_bytes: int


class _Part(NamedTuple):
    """Rows of a chunk, counted from its first, and their places in the output; both ranges, or both arrays."""

    rows: slice | RowNumbers
    places: slice | RowNumbers


Job: TypeAlias = tuple[int, list[_Part]]
"""A chunk, numbered across all shards, and what to copy from it."""


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
        self.fill(out, [range(start, stop)])

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Array:
        """Return rows in the given order, repeats allowed: (rows, *row shape) in storage dtype.

        Raises:
            IndexError: The array has no such row.
            DamagedArchiveError: A shard file is missing or altered; the message names it.
            UnsafeArchiveError: The index of a shard file is forged.
        """
        wanted = self._check_rows(rows)
        out = np.empty((len(wanted), *self._spec.row_shape), self._spec.storage_dtype)
        self.fill(out, [wanted])
        return out

    def fill(self, out: Array, pieces: Sequence[RowNumbers | range], following: Following | None = None) -> None:
        """Read pieces of rows, one after the other, into `out`; each chunk is decoded once. Raises as `take` does.

        Args:
            out: C-contiguous (rows of all pieces, *row shape) in storage dtype.
            pieces: Numbers of rows that the array has.
            following: What will be read next, and is fetched meanwhile at an address.
        """
        items, at = self._as_items(out), 0
        chunks: dict[int, list[_Part]] = defaultdict(list)
        for rows in filter(len, pieces):
            if not self._is_raw:
                for chunk, part in self._parts(rows, at):
                    chunks[chunk].append(part)
            elif isinstance(rows, range):
                for span in _spans(rows.start, rows.stop, self._spec.rows_per_shard):
                    self._copy_raw(span, out[at:])
            else:
                self._gather_raw(rows, items[at : at + len(rows)])
            at += len(rows)
        self._run(lambda job: self._decode(job, out, items), list(chunks.items()), following)

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

    def _parts(self, rows: RowNumbers | range, at: int) -> Iterator[tuple[int, _Part]]:
        """Yield chunks, and what of `rows` is in each; the first row's place in the output is `at`."""
        height = self._spec.rows_per_chunk
        if isinstance(rows, range):
            for chunk, first, last, begin in _spans(rows.start, rows.stop, height):
                yield chunk, _Part(slice(first, last), slice(at + begin, at + begin + last - first))
        else:
            chunks, local = np.divmod(rows, height)
            for chunk, places in _groups(chunks):
                yield chunk, _Part(local[places], places + at)

    def _decode(self, job: Job, out: Array, items: npt.NDArray[np.void]) -> None:
        """Decode a chunk, and copy its rows into `out`, of which `items` is a view."""
        chunk, parts = job
        whole = slice(0, self._spec.rows_per_chunk)
        if len(parts) == 1 and isinstance(parts[0].rows, slice) and parts[0].rows == whole:
            self._decode_chunk(chunk, out[parts[0].places])
            return
        values = self._as_items(self._new_chunk(chunk))
        for rows, places in parts:
            items[places] = values[rows]

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

    def _run(self, work: Callable[[Job], None], jobs: Sequence[Job], following: Following | None) -> None:  # noqa: ARG002
        """Do all jobs, in this thread and in others. Return when every thread has finished."""
        n_slices = min(self._threads, len(jobs)) if len(jobs) > FEW_CHUNKS else 1

        def work_on(start: int) -> None:
            for job in jobs[start::n_slices]:
                work(job)

        futures = [decoding_threads().submit(work_on, i) for i in range(1, n_slices)]
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
        self._specs = spec.file_specs
        self._width = self._specs[0].row_shape[0]
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

    def fill(self, out: Array, pieces: Sequence[RowNumbers | range], following: Following | None = None) -> None:
        """Read pieces of rows, one after the other, into `out`; see `ArrayReader.fill`."""
        filled = [
            Filled(reader.fill, spec.row_shape, spec.storage_dtype)
            for spec, reader in zip(self._specs, self._readers, strict=True)
        ]
        for rows, parts in in_steps(filled, pieces, following, self._specs[0]):
            for i, part in enumerate(parts):
                out[rows, i * self._width : (i + 1) * self._width] = part


class Filled(NamedTuple):
    """One of several arrays that hold the parts of each row: what fills an array with its rows, and what these are."""

    fill: Callable[[Array, Sequence[RowNumbers | range], Following | None], None]
    row_shape: tuple[int, ...]
    dtype: npt.DTypeLike

    def part(self, pieces: Sequence[RowNumbers | range], following: Following) -> Array:
        """Return its part of some rows."""
        found: Array = np.empty((sum(map(len, pieces)), *self.row_shape), self.dtype)
        self.fill(found, pieces, following)
        return found


def in_steps(
    arrays: Sequence[Filled], pieces: Sequence[RowNumbers | range], following: Following | None, spec: ArraySpec
) -> Iterator[tuple[slice, Iterator[Array]]]:
    """Read rows that are put together from several arrays, some MiB at a time.

    Args:
        arrays: The arrays.
        pieces: Numbers of rows.
        following: What follows after them.
        spec: One of the arrays. Ranges are cut where its chunks begin.

    Yields:
        Places of rows in the output, and the part of each array, to be taken before the next step.
    """
    at = 0
    for step, later in _steps(pieces, following, spec, share=len(arrays)):
        n_rows = sum(map(len, step))
        yield slice(at, at + n_rows), map(partial(Filled.part, pieces=step, following=later), arrays)
        at += n_rows


def _steps(
    pieces: Sequence[RowNumbers | range], following: Following | None, spec: ArraySpec, *, share: int
) -> Iterator[tuple[list[RowNumbers | range], Following]]:
    """Cut pieces of rows into steps of some MiB, and say what follows after each: for rows that need further memory.

    Args:
        pieces: Numbers of rows.
        following: What follows after them.
        spec: One of the arrays that they are read from. Ranges are cut where its chunks begin.
        share: Number of arrays that share what is fetched ahead.
    """
    chunks = max(1, _STEP_BYTES // spec.chunk_bytes) * spec.rows_per_chunk
    cut: list[RowNumbers | range] = []
    for rows in pieces:
        spans = _spans(rows.start, rows.stop, chunks) if isinstance(rows, range) else ()
        cut += [rows[span.at : span.at + span.last - span.first] for span in spans] or [rows]
    later, most_bytes = following or ((), _STEP_BYTES)
    begin = 0
    while begin < len(cut):
        end, n_rows = begin, 0
        while end < len(cut) and (end == begin or n_rows + len(cut[end]) <= chunks):
            n_rows += len(cut[end])
            end += 1
        yield cut[begin:end], Following([*cut[end:], *later], most_bytes // share)
        begin = end


def decoding_threads() -> ThreadPoolExecutor:
    """Return the thread pool of all readers of this process."""
    return _threads_of(os.getpid())


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
