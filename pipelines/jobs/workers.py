"""What the workers of a capture do once, what each does, and what they tell each other.

Worker 0 makes the plan and the archive; the others wait for it, open the archive, and check that their own model and
settings give the same plan. All take runs of shards until every shard is committed. Then worker 0 seals the archive,
and nobody returns before that.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch._C._distributed_c10d import PrefixStore

from residua.capture.layout.process_layout import ProcessLayout, process_layout_of, spans_processes
from residua.capture.recording.record import RecordStats, total
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.work_queue import LocalQueue, SharedQueue, WorkQueue
from residua.capture.sites.site import SiteInfo
from residua.pipelines.jobs.rendezvous import meeting
from residua.pipelines.jobs.replicas import replica_group
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import CaptureError
from residua.store.examples.schedule import Schedule
from residua.store.format.commits import committed_shards

_LOOK_SECONDS = 1.0
_LEAST_WORKERS = 2  # replicas that the shards are cut for: more may join


@dataclass(frozen=True, kw_only=True)
class WorkerFigures:
    """What one worker did.

    Attributes:
        worker: Its number.
        host: Name of its machine.
        pid: Number of its process there.
        stats: Its figures.
    """

    worker: int
    host: str
    pid: int
    stats: RecordStats


class Workers(Protocol):
    """This worker and the others."""

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and every other one `check` after that; return what `make` returned."""
        ...

    def replica_group(self, settings: CaptureSettings) -> AbstractContextManager[None]:
        """Make the process group of this worker's replica; see `residua.pipelines.jobs.replicas`."""
        ...

    def part(self, model: nn.Module, sites: Mapping[str, SiteInfo]) -> ProcessLayout | None:
        """Return what this worker has of a model that several hold together; None if it has all of it."""
        ...

    def work(self, archive: Path, schedule: Schedule) -> WorkQueue:
        """Return the shards that this worker is to do."""
        ...

    def so_far(self, stats: RecordStats) -> RecordStats:
        """Tell the others this worker's figures; return those of all, on worker 0."""
        ...

    def finish(self, stats: RecordStats, archive: Path, n_shards: int, seal: Callable[[], None]) -> list[WorkerFigures]:
        """Wait until every shard is committed, let worker 0 call `seal`, and return what each worker did."""
        ...


class Alone:
    """One worker that does everything."""

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:  # noqa: ARG002  # nobody else has to check
        """Return what `make` returns."""
        return make()

    def replica_group(self, settings: CaptureSettings) -> AbstractContextManager[None]:
        """See `Workers`."""
        return replica_group(settings, None)

    def part(self, model: nn.Module, sites: Mapping[str, SiteInfo]) -> ProcessLayout | None:  # noqa: ARG002  # nobody shares it
        """Return None."""
        return None

    def work(self, archive: Path, schedule: Schedule) -> WorkQueue:  # noqa: ARG002  # it does not look at the archive
        """Return all shards."""
        return LocalQueue(schedule.n_shards)

    def so_far(self, stats: RecordStats) -> RecordStats:
        """Return `stats`."""
        return stats

    def finish(self, stats: RecordStats, archive: Path, n_shards: int, seal: Callable[[], None]) -> list[WorkerFigures]:  # noqa: ARG002  # as above
        """Seal at once."""
        seal()
        return [WorkerFigures(worker=0, host=socket.gethostname(), pid=os.getpid(), stats=stats)]


class Together:
    """One worker among several.

    Args:
        membership: The others.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._others: list[RecordStats] = []
        self._next_look = 0.0
        self._n_replicas = membership.n_launched

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """See `Workers`."""
        message = self._membership.once("plan", lambda: {**make(), "n_replicas": self._n_replicas})
        self._n_replicas = message["n_replicas"]
        if self._membership.number:
            check()
        return message

    def replica_group(self, settings: CaptureSettings) -> AbstractContextManager[None]:
        """See `Workers`."""
        return replica_group(settings, self._membership)

    def part(self, model: nn.Module, sites: Mapping[str, SiteInfo]) -> ProcessLayout | None:
        """See `Workers`."""
        if not spans_processes(model):
            return None
        part = process_layout_of(model, sites, self._membership)
        self._n_replicas = max(1, self._membership.n_launched // len(part.worker_group.numbers))
        return part

    def work(self, archive: Path, schedule: Schedule) -> WorkQueue:
        """See `Workers`."""
        runs = schedule.runs(max(_LEAST_WORKERS, self._n_replicas))
        return SharedQueue(self._membership, runs, partial(committed_shards, archive))

    def so_far(self, stats: RecordStats) -> RecordStats:
        """See `Workers`."""
        self._membership.report(stats=asdict(stats))
        if self._membership.number:
            return stats
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            told = [
                figures for figures in self._membership.all_statuses() if figures["worker"] != self._membership.number
            ]
            self._others = [RecordStats(**figures["stats"]) for figures in told if "stats" in figures]
        return total([stats, *self._others])

    def finish(self, stats: RecordStats, archive: Path, n_shards: int, seal: Callable[[], None]) -> list[WorkerFigures]:
        """See `Workers`.

        Raises:
            CaptureError: Shards are missing because a worker is gone, or worker 0 is.
        """
        self._membership.report(stats=asdict(stats))
        return _figures(self._membership.finish(partial(self._close, archive, n_shards, seal))["workers"])

    def _close(self, archive: Path, n_shards: int, seal: Callable[[], None]) -> Mapping[str, Any]:
        missing = n_shards - len(committed_shards(archive))
        if missing:
            raise CaptureError(
                f"{missing} shards are missing because {self._membership.unfinished()} is gone. What was committed is "
                "safe; run the same command again to go on."
            )
        seal()
        return {"workers": self._membership.all_statuses()}


def _figures(everyone: Sequence[Mapping[str, Any]]) -> list[WorkerFigures]:
    """Return the figures of all that told any; of a worker that died, those that it told last."""
    return [
        WorkerFigures(worker=f["worker"], host=f["host"], pid=f["pid"], stats=RecordStats(**f["stats"]))
        for f in everyone
        if "stats" in f
    ]


@contextmanager
def workers_of(out: Path, *, join: bool) -> Iterator[Workers]:
    """Yield this worker and the others that capture `out`; see `meeting`."""
    with meeting(out, join=join) as membership:
        if membership is None:
            yield Alone()
        else:
            with membership:
                yield Together(membership)


@contextmanager
def workers_of_launch(membership: Membership | None, job: str) -> Iterator[Workers]:
    """Yield this worker and the others for a capture that is part of their job; it has a worker group of its own.

    Args:
        membership: Those that were launched together, as they do the whole job; None for one process alone.
        job: A name for this part of it.
    """
    if membership is None or membership.launch is None:
        yield Alone()
        return
    store, rank, n_launched = membership.launch
    with Membership(PrefixStore(job, store), rank, n_launched, launch=membership.launch) as own:
        yield Together(own)
