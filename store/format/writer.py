"""Writing shards: threads that encode, write durably and commit.

The promise is the order: every file of a shard is on the disk, and its folder synchronised, before the commit record
that names it is published. The arrays of a shard are encoded in parallel; the last one to finish publishes. The first
failure is kept and raised, with its cause, by the next call. A shard that failed has no record, so it does not exist.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import CaptureError
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.lossy import count_nonfinite
from residua.store.encoding.shard import ShardEncoder, ShardMemory, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import Commit, ShardFile, publish_commit
from residua.store.format.plan import Plan, SitePlan
from residua.store.storage.destination import Destination, destination_of

_HERE = Path()
Rows = npt.NDArray[np.generic]


def _nothing() -> None:
    """Do nothing: the rows are ready, and nobody needs their memory."""


@dataclass(frozen=True, kw_only=True)
class FilledShard:
    """A shard whose rows are all there.

    Attributes:
        index: Index of the shard along axis 0.
        first_row: Its first row.
        sites: By site name, its rows in storage dtype, (rows, *row shape), C-contiguous or in a `ShardMemory`; those
            that this process writes.
        columns: ``token``, ``position`` and ``example`` of the rows; empty where another process writes them.
        column_shard: Which column shard `sites` have, of sites whose rows are cut into several.
        overflowed: Called after `ready`; returns by site how many finite values were infinite once they were cast.
        examples: SHA-256 of Parquet files of examples made durable with this shard, by file name.
        ready: Called in a writer thread before the rows are read; waits for copies in progress.
        release: Called once the rows are no longer needed.
    """

    index: int
    first_row: int
    sites: Mapping[str, Rows | ShardMemory]
    columns: Mapping[str, Rows]
    column_shard: int = 0
    examples: Mapping[str, str] = field(default_factory=dict)
    overflowed: Callable[[], Mapping[str, int]] = dict
    ready: Callable[[], None] = _nothing
    release: Callable[[], None] = _nothing

    @property
    def n_rows(self) -> int:
        """Number of its rows."""
        return int(next(iter((*self.sites.values(), *self.columns.values()))).shape[0])


class ShardWriter:
    """Encodes, writes and commits shards in the background.

    A context: leaving it waits for all shards, then raises CaptureError if one could not be written. If another error
    ends the block, that error is raised, and a note on it names the failure.

    Args:
        root: Folder of the archive, or where else it is written; its metadata exists already.
        plan: The plan that the rows belong to.
        threads: Encoder threads.
        report: For shards that several writers share: called in a writer thread with the record of this writer's
            files, once they are on the disk. The process that collects all records of a shard then calls `publish`.

    Attributes:
        stored_bytes: Bytes written so far.
        logical_bytes: Bytes of the values in them.
        n_rows: Rows committed so far.
        n_nonfinite: NaN and infinite values written so far, by the array's `key`.
    """

    def __init__(
        self,
        root: Path | Destination,
        plan: Plan,
        *,
        threads: int = 1,
        report: Callable[[Commit], None] | None = None,
    ) -> None:
        self._out = destination_of(root)
        self._plan = plan
        self._report = report
        self._pool = ThreadPoolExecutor(self._out.writer_threads(threads), thread_name_prefix="residua-writer")
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self.stored_bytes = 0
        self.logical_bytes = 0
        self.n_rows = 0
        self.n_nonfinite: dict[str, int] = {}

    def submit(self, shard: FilledShard) -> None:
        """Queue a filled shard; return at once.

        Raises:
            CaptureError: An earlier shard could not be written; the cause is chained.
        """
        self.raise_failure()
        _ShardJob(self, shard, self._out, self._plan).start(self._pool)

    def raise_failure(self) -> None:
        """Raise CaptureError if a shard could not be written."""
        if self._failure is not None:
            raise CaptureError(
                f"a shard could not be written: {self._failure}. What was committed before is safe; "
                "remove the cause and run the same capture again to continue."
            ) from self._failure

    def failed(self, error: BaseException) -> None:
        """Keep the first failure for the caller."""
        with self._lock:
            self._failure = self._failure or error

    def written(self, commit: Commit, logical_bytes: int) -> None:
        """Commit the written files, or report them where writers share shards; add their bytes to the totals."""
        if self._report is None:
            if not self.publish(commit):
                return
        else:
            self._report(commit)
        with self._lock:
            self.logical_bytes += logical_bytes
            self.stored_bytes += sum(file.n_bytes for file in commit.arrays.values())
            for path, file in commit.arrays.items():
                self.n_nonfinite[path] = self.n_nonfinite.get(path, 0) + file.n_nonfinite

    def publish(self, commit: Commit) -> bool:
        """Commit a shard, all files of which are on the disk; say whether it was not committed before.

        Raises:
            FileExistsError: The shard has another record.
        """
        if not publish_commit(self._out, commit):  # another worker took this one for dead and wrote the same shard
            return False
        with self._lock:
            self.n_rows += commit.rows[1] - commit.rows[0]
        return True

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.raise_failure()
        elif self._failure is not None and error.__cause__ is not self._failure:
            error.add_note(f"A shard could not be written either: {self._failure}. What was committed before is safe.")


class _ShardJob:
    """The work on one shard: it commits after the last array, and always releases the rows."""

    def __init__(self, writer: ShardWriter, shard: FilledShard, out: Destination, plan: Plan) -> None:
        self._writer = writer
        self._shard = shard
        self._out = out
        self._plan = plan
        self._lock = threading.Lock()
        self._files: dict[str, ShardFile] = {}
        self._broken = False
        self._left = len(shard.sites) + len(shard.columns)

    def start(self, pool: ThreadPoolExecutor) -> None:
        for site in self._plan.sites:
            if site.name in self._shard.sites:
                pool.submit(self._run, partial(self._write_site, site))
        for spec in self._plan.row_arrays:
            rows = self._shard.columns.get(spec.path.removeprefix("rows/"))
            if rows is not None:
                pool.submit(self._run, partial(self._write, spec, rows))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            if not self._broken:
                self._shard.ready()
                self._check_place()
                work()
        except BaseException as error:  # noqa: BLE001  # thread boundary: the caller raises it, with its cause
            self._broken = True
            self._writer.failed(error)
        finally:
            self._one_done()

    def _check_place(self) -> None:
        """Raise if the archive was moved or removed: writing would start another, broken one in its place."""
        if not (self._out.path / ROOT).exists():
            raise FileNotFoundError(f"{self._out} was moved or removed while it was being written")

    def _one_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if not last:
            return
        try:
            if not self._broken:
                self._commit()
        except BaseException as error:  # noqa: BLE001  # thread boundary, as above
            self._writer.failed(error)
        finally:
            self._shard.release()

    def _commit(self) -> None:
        n_rows = self._shard.n_rows
        first = self._shard.first_row
        commit = Commit(
            plan=self._plan.digest,
            shard=self._shard.index,
            rows=(first, first + n_rows),
            arrays=dict(sorted(self._files.items())),
            examples=self._shard.examples,
        )
        sites = [site for site in self._plan.sites if site.name in self._shard.sites]
        row_bytes = sum(site.row_bytes // site.column_shards for site in sites)
        self._writer.written(commit, row_bytes * n_rows)

    def _write_site(self, site: SitePlan) -> None:
        rows = self._shard.sites[site.name]
        spec, *others = site.arrays(self._plan.rows_per_shard)
        spec = spec.file_specs[self._shard.column_shard if site.column_shards > 1 else 0]
        codec = PRESETS[site.codec]
        n_overflowed = self._shard.overflowed().get(site.name, 0)
        if isinstance(rows, ShardMemory) or codec.is_lossless:
            self._write(spec, rows, n_overflowed=n_overflowed)
            return
        arrays, squares, error_squares = codec.transform(rows, site.dtype)
        values, *more = arrays
        for other, array in zip(others, more, strict=True):
            self._write(other, array, 0)
        n_nonfinite = count_nonfinite(rows, site.dtype)
        self._write(
            spec,
            values,
            n_nonfinite,
            squares=squares,
            error_squares=error_squares,
            n_overflowed=n_overflowed,
            n_spoiled=codec.count_nonfinite(arrays, site.dtype) - n_nonfinite,
        )

    def _write(
        self,
        spec: ArraySpec,
        rows: Rows | ShardMemory,
        n_nonfinite: int | None = None,
        **losses: Any,
    ) -> None:
        encoded = ShardEncoder(rows, spec)
        self._out.write(shard_path(_HERE, spec, self._shard.index).as_posix(), encoded)
        file = ShardFile(
            n_bytes=encoded.n_bytes,
            digest=encoded.digest,
            n_nonfinite=encoded.n_nonfinite if n_nonfinite is None else n_nonfinite,
            chunks=encoded.chunks.tobytes(),
            **losses,
        )
        with self._lock:
            self._files[spec.key] = file
