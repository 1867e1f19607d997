"""Reads rows of one array at an address: chunks come by ranges of bytes, ahead of where they are decoded.

The packed index says where each chunk stands, how long it is, and its crc32c. Chunks that lie near each other in one
shard share a request. Many requests are under way at once, and chunks are decoded as they arrive. What is probably read
next is fetched ahead: the rows after those of a read that goes on where the last one stopped, and what a caller says
(`RemoteReader.ahead`).

Each chunk is compared with the index when it arrives. One that differs is asked for once more; if it differs again,
that is an error that names object, chunk and rows.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError, NotCapturedError
from residua.store.encoding.codecs import check_chunk, decode_chunk
from residua.store.encoding.shard import ChunkTable, chunk_table_problem, describe_chunk, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.format.commits import Commit
from residua.store.format.plan import Plan
from residua.store.read.reader import Array, ArrayReader, Check, RowNumbers
from residua.store.storage.crc import CRC_BYTES
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.objects import ObjectFolder

JOIN_GAP_BYTES = 256 * 2**10
"""Chunks of one shard that are this near share a request: a request costs as much as so many bytes."""

REQUEST_BYTES = 4 * 2**20
"""A longer run of chunks takes several requests, which are under way at once."""

_WINDOW_BYTES = 64 * 2**20  # of one call that are under way; as much again is fetched ahead
_HELD_BYTES = 256 * 2**20  # fetched ahead for all readers of an archive; what is not used for longest goes first
_N_REQUESTS = 16
_HERE = Path()

PACK = "finish its capture, or run residua pack on it where it is a folder, and copy it there again"

Bytes = npt.NDArray[np.uint8]
_Arriving: TypeAlias = Future[dict[int, Bytes]]
T = TypeVar("T")


class _Request(NamedTuple):
    """One request: a shard, its chunks, and where each begins and ends in the object."""

    shard: int
    chunks: list[int]
    starts: list[int]
    stops: list[int]


class ChunkTables(Protocol):
    """What says where chunks stand: a packed index, or the records of an archive that is not finished."""

    @property
    def digest(self) -> str:
        """What tells these tables from others, in hex."""
        ...

    def chunk_table(self, key: str, shard: int) -> ChunkTable:
        """Return size and crc32c of every chunk of a shard file."""
        ...

    def __contains__(self, shard: object, /) -> bool:
        """Say whether there is such a shard."""
        ...


class RecordTables:
    """The chunk tables in the records of an archive that is not finished.

    Args:
        plan: The plan of the archive.
        commits: Its records.

    Attributes:
        digest: That of the plan.
    """

    def __init__(self, plan: Plan, commits: Mapping[int, Commit]) -> None:
        self.digest = plan.digest
        self._specs = {spec.key: spec for array in plan.arrays for spec in array.file_specs}
        self._commits = commits

    def __contains__(self, shard: object, /) -> bool:
        """Say whether a shard is captured."""
        return shard in self._commits

    def chunk_table(self, key: str, shard: int) -> ChunkTable:
        """Return size and crc32c of every chunk of a shard file.

        Raises:
            NotCapturedError: The record has none, as in archives of format 1.0.
            DamagedArchiveError: No shard file can have these chunks.
        """
        commit, spec = self._commits[shard], self._specs[key]
        table = commit.arrays[key].chunk_table
        if not len(table):
            raise NotCapturedError(f"the record of shard {shard} has no chunks: {PACK}")
        if problem := chunk_table_problem(table, spec, commit.rows[1] - commit.rows[0]):
            raise DamagedArchiveError(f"the record of shard {shard} says of {key}: {problem}")
        return table


class RemoteChunks:
    """The chunks of one archive at an address.

    Args:
        folder: The archive.
        index: Its packed index, or what takes its place while the archive is not finished.
        cache: Keeps chunks on the local disk; None: nothing is kept.
        join_gap_bytes: Chunks of one shard that are this near share a request.
        request_bytes: Bytes of one request, unless a chunk has more.
    """

    def __init__(
        self,
        folder: ObjectFolder,
        index: ChunkTables,
        cache: DiskCache | None = None,
        join_gap_bytes: int = JOIN_GAP_BYTES,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        self.folder = folder
        self.index = index
        self.request_bytes = request_bytes
        self._cache = cache
        self._join_gap_bytes = join_gap_bytes
        self._held: OrderedDict[tuple[str, int], tuple[_Arriving, int]] = OrderedDict()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.folder, self.index, self._cache, self._join_gap_bytes, self.request_bytes)

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
        found: dict[int, Bytes] = {}
        for chunks in self.stream(spec, n_rows, numbers):
            found |= chunks
        return found

    def stream(
        self,
        spec: ArraySpec,
        n_rows: int,
        numbers: Sequence[int],
        *,
        then: Sequence[int] = (),
        window_bytes: int = _WINDOW_BYTES,
    ) -> Iterator[dict[int, Bytes]]:
        """Yield the stored bytes of chunks as they arrive, those that were fetched ahead first; raises as `fetch`.

        Args:
            spec: The array.
            n_rows: Rows of the array.
            numbers: Numbers of chunks across all shards, ascending.
            then: Chunks to fetch ahead when all of `numbers` are under way.
            window_bytes: Bytes of `numbers` that are under way at once, and held until they are taken.
        """
        ahead: dict[_Arriving, list[int]] = defaultdict(list)
        missing = []
        for number in numbers:
            job = self._take(spec, number)
            ahead[job].append(number) if job else missing.append(number)
        requests = deque(self._requests(spec, missing))
        if len(requests) == 1 and not ahead and not then:
            yield self._get(spec, n_rows, requests.pop())
            return
        jobs: deque[tuple[_Arriving, int]] = deque()
        try:
            while requests or jobs or ahead:
                while requests and (not jobs or sum(size for _, size in jobs) < window_bytes):
                    request = requests.popleft()
                    jobs.append((self._begin(spec, n_rows, request), request.stops[-1] - request.starts[0]))
                if not requests and then:
                    self.expect(spec, n_rows, then)
                    then = ()
                if ahead:
                    job = next(iter(ahead))
                    chunks = job.result()
                    yield {number: chunks[number] for number in ahead.pop(job)}
                else:
                    yield jobs.popleft()[0].result()
        finally:
            for job, _ in jobs:
                job.cancel()

    def expect(self, spec: ArraySpec, n_rows: int, numbers: Sequence[int]) -> None:
        """Begin to fetch chunks that will be asked for; those that have waited for longest are given up for them."""
        held, height = self._held, spec.chunks_per_shard
        there = [number for number in numbers if number // height in self.index and (spec.key, number) not in held]
        for request in self._requests(spec, there):
            job = self._begin(spec, n_rows, request)
            for number, start, stop in zip(request.chunks, request.starts, request.stops, strict=True):
                held[spec.key, number] = job, stop - start
        while sum(size for _, size in list(held.values())) > _HELD_BYTES:
            held.popitem(last=False)

    def _take(self, spec: ArraySpec, number: int) -> _Arriving | None:
        job, _ = self._held.pop((spec.key, number), (None, 0))
        return job

    def _begin(self, spec: ArraySpec, n_rows: int, request: _Request) -> _Arriving:
        return _requests().submit(self._get, spec, n_rows, request)

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
            is_near = open_ is not None and open_.shard == shard and start - open_.stops[-1] <= self._join_gap_bytes
            if open_ is None or not is_near or stop - open_.starts[0] > self.request_bytes:
                if open_ is not None:
                    yield open_
                open_ = _Request(shard, [], [], [])
            open_.chunks.append(number)
            open_.starts.append(start)
            open_.stops.append(stop)
        if open_ is not None:
            yield open_

    def _get(self, spec: ArraySpec, n_rows: int, request: _Request) -> dict[int, Bytes]:
        """Return the chunks of one request: from the cache if they are there, and else over the network."""
        found = self._cached(spec, request.chunks)
        requests = [request]
        if found:
            requests = list(self._requests(spec, [number for number in request.chunks if number not in found]))
        for each in requests:
            found |= self._arrived(spec, n_rows, each)
        return found

    def _arrived(self, spec: ArraySpec, n_rows: int, request: _Request) -> dict[int, Bytes]:
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
            data = self.folder.read_range(name, first, request.stops[-1])
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
        window_bytes: Stored bytes of one call that are under way at once; as many again are fetched ahead.
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
        self._last = -2  # chunk of the last call

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
        """Do all jobs, as their chunks arrive."""
        jobs_of: dict[int, list[T]] = defaultdict(list)
        for job in jobs:
            jobs_of[int(job[0])].append(job)  # type: ignore[index]  # every job begins with the number of its chunk
        numbers = sorted(jobs_of)
        then = self._next_chunks(numbers) if numbers else []
        for arrived in self._source.stream(
            self._spec, self._n_rows, numbers, then=then, window_bytes=self._window_bytes
        ):
            self._held.update(arrived)
            try:
                super()._run(work, [job for number in arrived for job in jobs_of[number]])
            finally:
                for number in arrived:
                    self._held.pop(number, None)

    def _next_chunks(self, numbers: list[int]) -> list[int]:
        """Return the chunks to fetch ahead: as many as are read now, if all are read in order."""
        first, last = numbers[0], numbers[-1]
        goes_on = first in (self._last, self._last + 1)
        self._last = last
        sizes = [self._source.stored_bytes(self._spec, number) for number in numbers]
        if last - first + 1 != len(numbers) or not (
            goes_on or (first == 0 and sum(sizes) > self._source.request_bytes)
        ):
            return []
        n_chunks = -(-self._n_rows // self._spec.rows_per_chunk)
        n_ahead = min(len(numbers), max(1, self._window_bytes // max(sizes)))
        return list(range(last + 1, min(last + 1 + n_ahead, n_chunks)))

    def ahead(self, pieces: Iterable[RowNumbers | range], most_bytes: int) -> Iterator[RowNumbers | range]:
        """Yield `pieces`, and fetch the chunks of those that follow meanwhile, `most_bytes` of them at most."""
        left, waiting, n_bytes = iter(pieces), deque[tuple[RowNumbers | range, int]](), 0
        while True:
            if 2 * n_bytes <= most_bytes:
                numbers: set[int] = set()
                for rows in left:
                    of_rows = self._chunks_of(rows)
                    size = sum(self._source.stored_bytes(self._spec, number) for number in of_rows)
                    waiting.append((rows, size))
                    numbers |= of_rows
                    n_bytes += size
                    if n_bytes >= most_bytes:
                        break
                self._source.expect(self._spec, self._n_rows, sorted(numbers))
            if not waiting:
                return
            rows, size = waiting.popleft()
            n_bytes -= size
            yield rows

    def _chunks_of(self, rows: RowNumbers | range) -> set[int]:
        height = self._spec.rows_per_chunk
        if isinstance(rows, range):
            return set(range(rows.start // height, -(-rows.stop // height)))
        return set(np.unique(rows // height).tolist())


@lru_cache(maxsize=1)
def _requests() -> ThreadPoolExecutor:
    """Return the threads in which requests wait for their answers."""
    return ThreadPoolExecutor(_N_REQUESTS, thread_name_prefix="residua-requests")


def _reopen(
    source: RemoteChunks, spec: ArraySpec, n_rows: int, check: Check, threads: int, window_bytes: int
) -> RemoteReader:
    return RemoteReader(source, spec, n_rows, check=check, threads=threads, window_bytes=window_bytes)
