"""Reads rows of one array at an address: chunks come by ranges of bytes, ahead of where they are decoded.

The packed index says where each chunk stands, how long it is, and its crc32c. Chunks that lie near each other in one
shard share a request. Many requests are under way at once, and a few threads decode chunks as they arrive. What is
probably read next is fetched ahead: the rows after those of a read that goes on where the last one stopped, and what a
caller says (`Following`).

Each chunk is compared with the index when it arrives. One that differs is asked for once more; if it differs again,
that is an error that names object, chunk and rows.
"""

import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import DamagedArchiveError, NotCapturedError
from residua.store.encoding.codecs import check_chunk, decode_chunk
from residua.store.encoding.shard import ChunkTable, chunk_table_problem, describe_chunk, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.format.commits import Commit
from residua.store.format.plan import Plan
from residua.store.read.rows_in_shards import FEW_CHUNKS, Array, ArrayReader, Check, Following, Job, decoding_threads
from residua.store.storage.crc import CRC_BYTES
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.objects import ObjectFolder

JOIN_GAP_BYTES = 256 * 2**10
"""Chunks of one shard that are this near share a request: a request costs as much as so many bytes."""

REQUEST_BYTES = 4 * 2**20
"""A longer run of chunks takes several requests, which are under way at once."""

_WINDOW_BYTES = 64 * 2**20  # of one call that are under way; as much again is fetched ahead
_N_REQUESTS = 16
_HERE = Path()

PACK = "finish its capture; or run residua pack on it in its bucket, or on its folder, and copy it there again"

Bytes = npt.NDArray[np.uint8]
_Arriving: TypeAlias = Future[dict[int, Bytes]]


class _Request(NamedTuple):
    """One request: a shard, its chunks, where each begins and ends in the object, and its crc32c."""

    shard: int
    chunks: list[int]
    starts: list[int]
    stops: list[int]
    crcs: list[int]

    @property
    def n_bytes(self) -> int:
        """Bytes from the first chunk to the last."""
        return self.stops[-1] - self.starts[0]

    def of(self, numbers: Container[int]) -> "_Request":
        """Return a request for some of the chunks."""
        columns = zip(self.chunks, self.starts, self.stops, self.crcs, strict=True)
        kept = zip(*(column for column in columns if column[0] in numbers), strict=True)
        return _Request(self.shard, *map(list, kept))


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
        held_bytes: Bytes fetched ahead for all readers of the archive; what is not used for longest goes first.
    """

    def __init__(
        self,
        folder: ObjectFolder,
        index: ChunkTables,
        cache: DiskCache | None = None,
        join_gap_bytes: int = JOIN_GAP_BYTES,
        request_bytes: int = REQUEST_BYTES,
        held_bytes: int = 256 * 2**20,
    ) -> None:
        self.folder = folder
        self.held_bytes = held_bytes
        self.index = index
        self.request_bytes = request_bytes
        self._cache = cache
        self._join_gap_bytes = join_gap_bytes
        self._held: OrderedDict[tuple[str, int], tuple[_Arriving, int]] = OrderedDict()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (
            self.folder,
            self.index,
            self._cache,
            self._join_gap_bytes,
            self.request_bytes,
            self.held_bytes,
        )

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
                    jobs.append((self._begin(spec, n_rows, request), request.n_bytes))
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
        while sum(size for _, size in list(held.values())) > self.held_bytes:
            held.popitem(last=False)

    def _take(self, spec: ArraySpec, number: int) -> _Arriving | None:
        if self._pid != os.getpid():  # in a forked child nothing that its parent asked for will arrive
            self._held.clear()
            self._pid = os.getpid()
        job, _ = self._held.pop((spec.key, number), (None, 0))
        return job

    def _begin(self, spec: ArraySpec, n_rows: int, request: _Request) -> _Arriving:
        return _requests(os.getpid()).submit(self._get, spec, n_rows, request)

    def stored_bytes(self, spec: ArraySpec, numbers: Sequence[int]) -> list[int]:
        """Return the stored size of each of some chunks, numbered across all shards."""
        found: list[int] = []
        for shard, of_shard in groupby(numbers, lambda number: number // spec.chunks_per_shard):
            table = self.index.chunk_table(spec.key, shard)
            found += table[[number % spec.chunks_per_shard for number in of_shard], 0].tolist()
        return found

    def _cached(self, spec: ArraySpec, request: _Request) -> dict[int, Bytes]:
        found: dict[int, Bytes] = {}
        if self._cache is None:
            return found
        for number, start, stop, crc in zip(request.chunks, request.starts, request.stops, request.crcs, strict=True):
            key = self._key(spec, number)
            data = self._cache.get(key)
            if data is None:
                continue
            stored = np.frombuffer(data, np.uint8)
            if chunk_problem(stored, stop - start, crc):
                self._cache.drop(key)
            else:
                found[number] = stored
        return found

    def _key(self, spec: ArraySpec, number: int) -> str:
        return f"{self.index.digest}/{spec.key}/{number}"

    def _requests(self, spec: ArraySpec, numbers: Sequence[int]) -> Iterator[_Request]:
        """Yield requests for chunks: near ones of a shard together, up to the size of a request."""
        for shard, of_shard in groupby(numbers, lambda number: number // spec.chunks_per_shard):
            chunks = list(of_shard)
            table = self.index.chunk_table(spec.key, shard)
            at = np.array(chunks) - shard * spec.chunks_per_shard
            stops = np.cumsum(table[:, 0], dtype=np.int64)[at]
            starts = stops - table[at, 0]
            places = chunks, starts.tolist(), stops.tolist(), table[at, 1].tolist()
            first = 0
            for after in range(1, len(chunks) + 1):
                is_last = after == len(chunks)
                if (
                    is_last
                    or starts[after] - stops[after - 1] > self._join_gap_bytes
                    or stops[after] - starts[first] > self.request_bytes
                ):
                    yield _Request(shard, *(column[first:after] for column in places))
                    first = after

    def _get(self, spec: ArraySpec, n_rows: int, request: _Request) -> dict[int, Bytes]:
        """Return the chunks of one request: from the cache if they are there, and else over the network."""
        found = self._cached(spec, request)
        requests = [request]
        if found:
            requests = list(self._requests(spec, [number for number in request.chunks if number not in found]))
        for each in requests:
            found |= self._arrived(spec, n_rows, each)
        return found

    def _arrived(self, spec: ArraySpec, n_rows: int, request: _Request) -> dict[int, Bytes]:
        name = shard_path(_HERE, spec, request.shard).as_posix()
        chunks, altered = self._ask(name, request)
        for number in altered:
            again, problems = self._ask(name, request.of({number}))
            if problem := problems.get(number):
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

    def _ask(self, name: str, request: _Request) -> tuple[dict[int, Bytes], dict[int, str]]:
        """Return the chunks as they came, and what is wrong with those that differ from the index."""
        first = request.starts[0]
        try:
            data = self.folder.read_range(name, first, request.stops[-1])
        except FileNotFoundError:
            raise DamagedArchiveError(
                f"{self.folder}/{name} is missing, and the archive's index names it: copy the archive there again"
            ) from None
        chunks: dict[int, Bytes] = {}
        problems: dict[int, str] = {}
        for number, start, stop, crc in zip(request.chunks, request.starts, request.stops, request.crcs, strict=True):
            chunks[number] = data[start - first : stop - first]
            if problem := chunk_problem(chunks[number], stop - start, crc):
                problems[number] = problem
        return chunks, problems


def chunk_problem(stored: Bytes, n_bytes: int, crc: int) -> str:
    """Return how a stored chunk differs from what is recorded of it; empty if it does not."""
    if len(stored) != n_bytes or int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little") != crc:
        return "its size or its crc32c is not the one that the archive's index or record has"
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

    def _run(self, work: Callable[[Job], None], jobs: Sequence[Job], following: Following | None) -> None:
        """Do all jobs, each in a thread that decodes as soon as its chunk is there."""
        job_of = dict(sorted((job[0], job) for job in jobs))
        numbers = list(job_of)
        if not numbers:
            return
        then = self._next_chunks(numbers) if following is None else self._first_chunks(following)

        def decode(part: Sequence[int]) -> None:
            for number in part:
                work(job_of[number])
                self._held.pop(number, None)

        arriving = self._arriving(numbers, then)
        try:
            if self._threads == 1 or len(numbers) <= FEW_CHUNKS:
                for part in arriving:
                    decode(part)
            else:
                self._decode_in_threads(decode, arriving)
        finally:
            for number in numbers:
                self._held.pop(number, None)

    def _arriving(self, numbers: Sequence[int], then: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of some chunks at a time that have arrived and are held: for each thread as many."""
        spec, n_rows = self._spec, self._n_rows
        for arrived in self._source.stream(spec, n_rows, numbers, then=then, window_bytes=self._window_bytes):
            self._held.update(arrived)
            found = list(arrived)
            n_each = max(FEW_CHUNKS, -(-len(found) // self._threads))
            yield from (found[i : i + n_each] for i in range(0, len(found), n_each))

    def _decode_in_threads(self, decode: Callable[[list[int]], None], arriving: Iterator[list[int]]) -> None:
        decoding: deque[Future[None]] = deque()
        try:
            for part in arriving:
                decoding.append(decoding_threads().submit(decode, part))
                if len(decoding) > self._threads:
                    decoding.popleft().result()
            for each in decoding:
                each.result()
        finally:
            wait(decoding)

    def _next_chunks(self, numbers: list[int]) -> list[int]:
        """Return the chunks to fetch ahead: as many as are read now, if all are read in order."""
        first, last = numbers[0], numbers[-1]
        goes_on = first in (self._last, self._last + 1)
        self._last = last
        if last - first + 1 != len(numbers) or not (goes_on or first == 0):
            return []
        sizes = self._source.stored_bytes(self._spec, numbers)
        if not (goes_on or sum(sizes) > self._source.request_bytes):
            return []
        n_chunks = -(-self._n_rows // self._spec.rows_per_chunk)
        n_ahead = min(len(numbers), max(1, self._window_bytes // max(sizes)))
        return list(range(last + 1, min(last + 1 + n_ahead, n_chunks)))

    def _first_chunks(self, following: Following) -> list[int]:
        """Return the chunks of the first pieces of `following`, up to its number of bytes."""
        numbers: dict[int, None] = {}
        n_bytes, height = 0, self._spec.rows_per_chunk
        for rows in following.pieces:
            if isinstance(rows, range):
                of_rows = range(rows.start // height, -(-rows.stop // height))
            else:
                of_rows = np.unique(rows // height).tolist()
            new = [number for number in of_rows if number not in numbers]
            for number, size in zip(new, self._source.stored_bytes(self._spec, new), strict=True):
                if n_bytes + size > following.most_bytes:
                    return sorted(numbers)
                numbers[number] = None
                n_bytes += size
        return sorted(numbers)


@lru_cache(maxsize=1)
def _requests(pid: int) -> ThreadPoolExecutor:
    """Return the threads in which requests of process `pid` wait for their answers; a forked child has none of them."""
    return ThreadPoolExecutor(_N_REQUESTS, thread_name_prefix=f"residua-requests-{pid}")


def _reopen(
    source: RemoteChunks, spec: ArraySpec, n_rows: int, check: Check, threads: int, window_bytes: int
) -> RemoteReader:
    return RemoteReader(source, spec, n_rows, check=check, threads=threads, window_bytes=window_bytes)
