"""Reads rows of one array at an address: chunks come by ranges of bytes, ahead of where they are decoded.

The packed index says where each chunk stands, how long it is, and its crc32c. Chunks that lie near each other in one
shard share a request. Many requests are under way at once, and those of the next rows start before the last ones are
decoded, so that the link is busy. Each chunk is compared with the index when it arrives. One that differs is asked for
once more; if it differs again, that is an error that names object, chunk and rows.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError
from residua.store.encoding.codecs import check_chunk, decode_chunk
from residua.store.encoding.shard import describe_chunk, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.read.reader import Array, ArrayReader, Check
from residua.store.sealing.packed_index import PackedIndex
from residua.store.storage.crc import CRC_BYTES
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.objects import JOIN_GAP_BYTES, ObjectFolder

_REQUEST_BYTES = 8 * 2**20  # a longer run of chunks takes several requests, which are under way at once
_WINDOW_BYTES = 64 * 2**20  # chunks that are fetched together; as much again is fetched ahead
_N_REQUESTS = 16
_HERE = Path()

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


class _Request(NamedTuple):
    """One request: a shard, its chunks, and where each begins and ends in the object."""

    shard: int
    chunks: list[int]
    starts: list[int]
    stops: list[int]


class RemoteChunks:
    """The chunks of one archive at an address.

    Args:
        folder: The archive.
        index: Its packed index.
        cache: Keeps chunks on the local disk; None: nothing is kept.
    """

    def __init__(self, folder: ObjectFolder, index: PackedIndex, cache: DiskCache | None = None) -> None:
        self.folder = folder
        self.index = index
        self._cache = cache

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.folder, self.index, self._cache)

    def fetch(self, spec: ArraySpec, n_rows: int, numbers: Sequence[int]) -> dict[int, Bytes]:
        """Return the stored bytes of chunks, crc32c included, each compared with the index.

        Args:
            spec: The array.
            n_rows: Rows of the array.
            numbers: Numbers of chunks across all shards, ascending.

        Raises:
            DamagedArchiveError: A chunk is not what the index says; the message names it.
            StorageError: The server does not give it.
        """
        found = self._cached(spec, numbers)
        requests = list(self._requests(spec, [number for number in numbers if number not in found]))
        jobs = [_requests_of(os.getpid()).submit(self._get, spec, n_rows, request) for request in requests[1:]]
        try:
            arrived = [self._get(spec, n_rows, request) for request in requests[:1]]
        finally:
            for job in jobs:
                job.exception()
        for chunks in [*arrived, *(job.result() for job in jobs)]:
            found |= chunks
        return found

    def stored_bytes(self, spec: ArraySpec, number: int) -> int:
        """Return the stored size of a chunk, numbered across all shards."""
        shard, chunk = divmod(number, spec.chunks_per_shard)
        return int(self.index.chunk_table(spec.key, shard)[chunk, 0])

    def _cached(self, spec: ArraySpec, numbers: Sequence[int]) -> dict[int, Bytes]:
        found: dict[int, Bytes] = {}
        for number in numbers if self._cache else ():
            key = self._key(spec, number)
            data = self._cache.get(key)  # type: ignore[union-attr]  # there is one
            if data is None:
                continue
            stored = np.frombuffer(data, np.uint8)
            if self._problem(spec, number, stored):
                self._cache.drop(key)  # type: ignore[union-attr]
            else:
                found[number] = stored
        return found

    def _key(self, spec: ArraySpec, number: int) -> str:
        return f"{self.index.digest}/{spec.key}/{number}"

    def _requests(self, spec: ArraySpec, numbers: Sequence[int]) -> Iterator[_Request]:
        """Yield requests for chunks: near ones of a shard together, up to the size of a request."""
        open_: _Request | None = None
        ends = np.empty(0, np.int64)
        for number in numbers:
            shard, chunk = divmod(number, spec.chunks_per_shard)
            if open_ is None or open_.shard != shard:
                ends = np.cumsum(self.index.chunk_table(spec.key, shard)[:, 0], dtype=np.int64)
            start, stop = int(ends[chunk - 1]) if chunk else 0, int(ends[chunk])
            is_near = open_ is not None and open_.shard == shard and start - open_.stops[-1] <= JOIN_GAP_BYTES
            if open_ is None or not is_near or stop - open_.starts[0] > _REQUEST_BYTES:
                if open_ is not None:
                    yield open_
                open_ = _Request(shard, [], [], [])
            open_.chunks.append(number)
            open_.starts.append(start)
            open_.stops.append(stop)
        if open_ is not None:
            yield open_

    def _get(self, spec: ArraySpec, n_rows: int, request: _Request) -> dict[int, Bytes]:
        name = shard_path(_HERE, spec, request.shard).as_posix()
        chunks = self._ask(name, request)
        for number in [number for number in chunks if self._problem(spec, number, chunks[number])]:
            at = request.chunks.index(number)
            again = self._ask(
                name, _Request(request.shard, [number], request.starts[at : at + 1], request.stops[at : at + 1])
            )
            if problem := self._problem(spec, number, again[number]):
                shard, chunk = divmod(number, spec.chunks_per_shard)
                where = describe_chunk(spec, chunk, shard_rows(spec, n_rows, shard), shard * spec.rows_per_shard)
                raise DamagedArchiveError(
                    f"{self.folder}/{name}: {where} is damaged: {problem}. It came twice like this: copy the archive "
                    "there again from where it came from"
                )
            chunks |= again
        if self._cache:
            for number, stored in chunks.items():
                self._cache.put(self._key(spec, number), stored.data)
        return chunks

    def _ask(self, name: str, request: _Request) -> dict[int, Bytes]:
        first = request.starts[0]
        try:
            [data] = self.folder.read_ranges(name, [first], [request.stops[-1]])
        except FileNotFoundError:
            raise DamagedArchiveError(
                f"{self.folder}/{name} is missing, and the archive's index names it: copy the archive there again"
            ) from None
        places = zip(request.chunks, request.starts, request.stops, strict=True)
        return {number: data[start - first : stop - first] for number, start, stop in places}

    def _problem(self, spec: ArraySpec, number: int, stored: Bytes) -> str:
        """Return how a chunk differs from what the index says; empty if it does not."""
        shard, chunk = divmod(number, spec.chunks_per_shard)
        size, crc = self.index.chunk_table(spec.key, shard)[chunk].tolist()
        if len(stored) != size or int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little") != crc:
            return "its size or its crc32c is not the one in the archive's index"
        try:
            check_chunk(stored)
        except ValueError as error:
            return str(error)
        return ""


class RemoteReader(ArrayReader):
    """Reads rows of one array at an address. Methods and errors are those of `ArrayReader`.

    Args:
        source: Where chunks come from.
        spec: The array.
        n_rows: Rows of the array.
        check: As for `ArrayReader`; what arrives over the network is always compared.
        threads: Threads that decode chunks.
        window_bytes: Stored bytes that are fetched together; as many again are fetched ahead.
    """

    def __init__(
        self,
        source: RemoteChunks,
        spec: ArraySpec,
        n_rows: int,
        *,
        check: Check = "once",
        threads: int | None = None,
        window_bytes: int = _WINDOW_BYTES,
    ) -> None:
        super().__init__(_HERE, spec, n_rows, check=check, threads=threads)
        self._is_raw = False  # such chunks are fetched and copied like any other
        self._source = source
        self._window_bytes = window_bytes
        self._held: dict[int, Bytes] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._source, self._spec, self._n_rows, self._check, self._threads, self._window_bytes)

    def _require(self, shard: int) -> None:
        """Nothing is known of a shard before it is asked for."""

    def _decode_chunk(self, number: int, out: Array) -> None:
        stored = self._held.get(number)
        if stored is None:  # another call of this reader has let go of it
            stored = self._fetch([number])[number]
        try:
            decode_chunk(stored, out, self._spec.preset, check=False)
        except ValueError as error:
            shard, chunk = divmod(number, self._spec.chunks_per_shard)
            name = shard_path(_HERE, self._spec, shard).as_posix()
            raise DamagedArchiveError(f"{self._source.folder}/{name}: chunk {chunk} is damaged: {error}") from error

    def _fetch(self, numbers: Sequence[int]) -> dict[int, Bytes]:
        return self._source.fetch(self._spec, self._n_rows, numbers)

    def _run(self, work: Callable[[T], None], jobs: Sequence[T]) -> None:
        """Do all jobs, window by window; the next window's chunks are on their way while one is decoded."""
        windows = list(self._windows(jobs))
        ahead: list[Future[dict[int, Bytes]]] = []
        try:
            for i, (numbers, these) in enumerate(windows):
                fetched = ahead.pop(0).result() if ahead else self._fetch(numbers)
                if i + 1 < len(windows):
                    ahead.append(_windows_of(os.getpid()).submit(self._fetch, windows[i + 1][0]))
                self._held.update(fetched)
                try:
                    super()._run(work, these)
                finally:
                    for number in fetched:
                        self._held.pop(number, None)
        finally:
            for future in ahead:
                future.exception()

    def _windows(self, jobs: Sequence[T]) -> Iterator[tuple[list[int], list[T]]]:
        """Yield jobs whose chunks are fetched together, and the numbers of these chunks."""
        numbers: list[int] = []
        these: list[T] = []
        n_bytes = 0
        for job in jobs:
            number = int(job[0])  # type: ignore[index]  # every job begins with the number of its chunk
            size = self._source.stored_bytes(self._spec, number)
            if these and n_bytes + size > self._window_bytes:
                yield numbers, these
                numbers, these, n_bytes = [], [], 0
            numbers.append(number)
            these.append(job)
            n_bytes += size
        if these:
            yield numbers, these


@lru_cache(maxsize=1)
def _requests_of(pid: int) -> ThreadPoolExecutor:
    """Return the threads in which requests of process `pid` wait for their answers."""
    return ThreadPoolExecutor(_N_REQUESTS, thread_name_prefix=f"residua-requests-{pid}")


@lru_cache(maxsize=1)
def _windows_of(pid: int) -> ThreadPoolExecutor:
    """Return the threads of process `pid` in which windows are fetched ahead."""
    return ThreadPoolExecutor(4, thread_name_prefix=f"residua-ahead-{pid}")


def _reopen(
    source: RemoteChunks, spec: ArraySpec, n_rows: int, check: Check, threads: int, window_bytes: int
) -> RemoteReader:
    return RemoteReader(source, spec, n_rows, check=check, threads=threads, window_bytes=window_bytes)
