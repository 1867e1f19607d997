"""Each shard: its files against their record, and its row columns against the example table.

Shards are shared by the threads of this process, or by the workers of a cluster, which open the archive where they run.
What is found comes back in the order of the shards.
"""

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from residua.store.base.errors import DamagedArchiveError, ResiduaError, UnsafeArchiveError
from residua.store.base.untrusted import check_inside
from residua.store.encoding.shard import check_shard, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.format.commits import FOLDER, Commit, record_name
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import INDEX

_STEP_BYTES = 16 * 2**20  # of chunks that a thread fetches together
_JOBS_PER_WORKER = 8  # of a cluster, so that all of them end at about the same time
_MOST_PER_JOB = 64

Job = TypeVar("Job")
Result = TypeVar("Result")


class Jobs(Protocol):
    """What runs jobs elsewhere: a cluster of `residua.analysis.connect`.

    Attributes:
        n_workers: Number of jobs that run at a time.
    """

    n_workers: int

    def map(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], *, label: str
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number and the result of each job as it completes, in any order."""
        ...


@dataclass
class ShardFindings:
    """What was found in one shard: problems as path and text, and counts of what is sound."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    n_files: int = 0
    n_chunks: int = 0
    n_bytes: int = 0


def check_shards(
    archive: Archive, shards: Sequence[int], *, examples: bool, threads: int, cluster: Jobs | None
) -> Iterator[ShardFindings]:
    """Yield what is found in each of `shards`, in their order.

    Args:
        archive: The archive.
        shards: Numbers of shards.
        examples: Whether the example table is sound, so that row columns can be compared with it.
        threads: Threads of this process that share them.
        cluster: Runs jobs that share them instead.
    """
    if cluster is not None:
        yield from _on_cluster(archive, shards, examples, cluster)
        return
    check = _check_of(archive, examples=examples)
    if threads == 1:
        yield from map(check.of, shards)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="residua-verify") as pool:
        waiting: deque[Future[ShardFindings]] = deque()
        ahead = iter(shards)
        try:
            for _ in shards:
                for shard in islice(ahead, 2 * threads - len(waiting)):
                    waiting.append(pool.submit(check.of, shard))
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Place:
    """The archive of one verification, for a worker: `run` tells it from what the worker opened for an earlier one."""

    place: str
    run: str
    examples: bool
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def _on_cluster(archive: Archive, shards: Sequence[int], examples: bool, cluster: Jobs) -> Iterator[ShardFindings]:
    place, options = str(archive.path.absolute()), {}
    if isinstance(archive, RemoteArchive):
        place, options = archive.place, {**archive.options, "cache": False}
    where = _Place(place, secrets.token_hex(8), examples, options)
    size = max(1, min(_MOST_PER_JOB, -(-len(shards) // (_JOBS_PER_WORKER * cluster.n_workers))))
    jobs = [(where, shards[start : start + size]) for start in range(0, len(shards), size)]
    found: dict[int, list[ShardFindings]] = {}
    following = 0
    for number, findings in cluster.map(_on_worker, jobs, label="verify"):
        found[number] = findings
        while following in found:
            yield from found.pop(following)
            following += 1


def _on_worker(job: tuple[_Place, Sequence[int]]) -> list[ShardFindings]:
    where, shards = job
    check = _opened(where)
    return [check.of(shard) for shard in shards]


@lru_cache(maxsize=1)
def _opened(where: _Place) -> "_ShardCheck":
    """Return the check of an archive that was opened in this process, once for all jobs of a verification."""
    kind = RemoteArchive if where.options else Archive
    return _check_of(kind(where.place, threads=1, **where.options), examples=where.examples)


def _check_of(archive: Archive, *, examples: bool) -> "_ShardCheck":
    if isinstance(archive, RemoteArchive):
        return _RemoteShardCheck(archive, examples=examples)
    return _ShardCheck(archive, examples=examples)


class _ShardCheck:
    """Checks shards of one archive; several threads may call `of`."""

    def __init__(self, archive: Archive, *, examples: bool) -> None:
        self._archive = archive
        self._root = archive.path
        self._commits = archive.commits
        self._specs = [spec for array in archive.arrays for spec in array.file_specs]
        compares = examples and all(spec in archive.arrays for spec in archive.plan.row_arrays)
        self._index = archive.example_table.index() if compares else None
        self._lock = threading.Lock()  # the example table is of one thread

    def of(self, shard: int) -> ShardFindings:
        """Check one shard."""
        try:
            commit = self._commits[shard]
        except (DamagedArchiveError, UnsafeArchiveError) as error:  # of an index, which is read in parts
            return ShardFindings([(INDEX, str(error))])
        found = ShardFindings()
        for spec in self._specs:
            self._file(spec, commit, found)
        if not found.problems:
            with self._lock:
                found.problems.extend(self._rows(*commit.rows, f"{FOLDER}/{record_name(shard)}"))
        return found

    def _file(self, spec: ArraySpec, commit: Commit, found: ShardFindings) -> None:
        path, name = shard_path(self._root, spec, commit.shard), _name(spec, commit.shard)
        n_rows = commit.rows[1] - commit.rows[0]
        try:
            check_inside(self._root, path)
            digest = check_shard(path, spec, n_rows, first_row=commit.rows[0])
            n_bytes = path.stat().st_size
        except (ResiduaError, OSError) as error:
            found.problems.append((name, str(error)))
            return
        if digest != commit.arrays[spec.key].digest:
            what = "the shard is sound, but not the one that was committed: restore it from a copy"
            found.problems.append((name, what))
            return
        found.n_files += 1
        found.n_bytes += n_bytes
        found.n_chunks += -(-n_rows // spec.rows_per_chunk)

    def _rows(self, first: int, stop: int, name: str) -> Iterator[tuple[str, str]]:
        """Compare the row columns with the example table; yield the record, and what is wrong."""
        index = self._index
        if index is None:
            return
        table, columns = self._archive.example_table, self._archive.rows
        if stop > index.total_rows:
            yield name, f"it covers rows {first:,} to {stop:,}, but the examples have {index.total_rows:,} rows"
            return
        example = np.searchsorted(index.first_row, np.arange(first, stop), side="right") - 1
        tokens, positions = [], []
        for number in np.unique(example).tolist():
            start, end = (int(row) for row in index.first_row[number : number + 2])
            at = table.positions(number)[max(first, start) - start : min(stop, end) - start]
            positions.append(at)
            tokens.append(table.tokens(number)[at])
        for column, values in (
            (columns.example, example),
            (columns.position, np.concatenate(positions)),
            (columns.token, np.concatenate(tokens)),
        ):
            if not np.array_equal(column[first:stop], values):
                yield name, f"{column.name} of rows {first:,} to {stop:,} contradicts the example table"


class _RemoteShardCheck(_ShardCheck):
    """Checks shards of an archive at an address: each chunk is compared with the index when it arrives."""

    def __init__(self, archive: RemoteArchive, *, examples: bool) -> None:
        super().__init__(archive, examples=examples)
        self._chunks = archive.chunks

    def _file(self, spec: ArraySpec, commit: Commit, found: ShardFindings) -> None:
        n_rows = commit.rows[1] - commit.rows[0]
        first, n_chunks = commit.shard * spec.chunks_per_shard, -(-n_rows // spec.rows_per_chunk)
        step = max(1, _STEP_BYTES // (spec.chunk_bytes + 1))
        for start in range(first, first + n_chunks, step):
            numbers = range(start, min(start + step, first + n_chunks))
            try:
                self._chunks.fetch(spec, self._archive.n_rows, numbers)
            except (ResiduaError, OSError) as error:
                found.problems.append((_name(spec, commit.shard), str(error)))
                return
        found.n_files += 1
        found.n_bytes += commit.arrays[spec.key].n_bytes
        found.n_chunks += n_chunks


def _name(spec: ArraySpec, shard: int) -> str:
    return shard_path(Path(), spec, shard).as_posix()
