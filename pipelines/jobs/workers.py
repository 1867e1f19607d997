"""The workers of a job: what worker 0 does once, what each worker does, and what they report to each other.

In a capture, worker 0 makes the plan and the archive. The others wait for it, open the archive, and check that their
own model and settings give the same plan. All take runs of shards until every shard is committed. Then worker 0 seals
the archive, and no worker returns before that.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from residua.capture.hooks.site import SiteInfo
from residua.capture.layout.process_layout import ProcessLayout, process_layout_of, spans_processes
from residua.capture.recording.stats import RecordStats, total
from residua.capture.runtime.compat import PrefixStore
from residua.capture.scheduling.membership import START_SECONDS, Membership
from residua.capture.scheduling.work_queue import WorkQueue, shared_queue, unit_runs, units_left
from residua.pipelines.jobs.rendezvous import rendezvous
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import CaptureError, PlanError
from residua.store.base.naming import named
from residua.store.examples.schedule import Schedule
from residua.store.format.commits import committed_shards, missing_shards
from residua.store.storage.destination import Destination

_LOOK_SECONDS = 1.0
_LEAST_WORKERS = 2  # replicas that the shards are cut for: more may join


@contextmanager
def working_together(
    out: Path | Destination | None, settings: CaptureSettings, *, job: str = ""
) -> Iterator[Membership | None]:
    """Yield this process's place among the workers of a job; None if it is alone.

    Args:
        out: Where the results go, which no other run may write meanwhile; None if nothing is written.
        settings: Whether other runs may join, and over how many processes a model that is loaded here is split.
        job: What tells the job from others of the launch, beside the folder; the same for every worker.

    Raises:
        ArchiveInUseError: Another run is writing `out`.
        CaptureError: The other workers do not appear.
        PlanError: The launched processes cannot be divided into groups of that many.
    """
    with rendezvous(out, join=settings.join, job=job) as membership, replica_group(settings, membership):
        yield membership


@contextmanager
def replica_group(settings: CaptureSettings, membership: Membership | None) -> Iterator[None]:
    """Make a process group for this process's replica, if a model that is loaded here is split over processes.

    Each replica is a process group of neighbouring ranks and knows of no other. So replicas do not wait for each other,
    and a replica whose process dies does not stop the others. A process that hangs holds the others of its replica for
    `START_SECONDS` at most.

    Args:
        settings: Over how many processes a replica is split; for one process no group is made.
        membership: The workers that were launched together.

    Raises:
        PlanError: The launched processes cannot be divided into groups of that many.
    """
    size = settings.tp * settings.pp
    if size == 1:
        yield
        return
    asked = named("tp", settings.tp) if settings.pp == 1 else f"{named('tp', settings.tp)} {named('pp', settings.pp)}"
    if dist.is_initialized():
        if dist.get_world_size() != size:
            raise PlanError(
                f"{asked} needs {size} processes, and this script has a process group of {dist.get_world_size()}: load "
                "and split the model in the script, and pass it instead of its name"
            )
        yield
        return
    launch = None if membership is None else membership.launch
    if launch is None or launch.n_launched % size:
        found = "this process is alone" if launch is None else f"{launch.n_launched} were launched together"
        raise PlanError(
            f"{asked} splits a model over {size} processes, and {found}: start a multiple of {size}, for example "
            f"with torchrun --nproc-per-node {size} -m residua ..."
        )
    replica, rank = divmod(launch.rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"group/{replica}", launch.store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=START_SECONDS),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan_once(
    membership: Membership | None, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]
) -> Mapping[str, Any]:
    """Let worker 0 call `make`, and every other worker `check` after that; return what `make` returned."""
    if membership is None:
        return make()
    message = membership.once("plan", make)
    if membership.number:
        check()
    return message


def missing_work(membership: Membership | None, what: str) -> CaptureError:
    """Return the error for work that is missing because workers ended early."""
    gone = "" if membership is None else membership.unfinished()
    return CaptureError(
        f"{what} are missing because {gone or 'a worker'} is gone. What was finished is safe; run the same command "
        "again to go on."
    )


class Progress:
    """How far the workers are: each reports its figures, and worker 0 looks at the others' once a second."""

    def __init__(self, membership: Membership | None) -> None:
        self._membership = membership
        self._next_look = 0.0
        self._others: list[Any] = []

    def others(self, mine: Any) -> list[Any]:
        """Report this worker's figures, as JSON values; return on worker 0 what the others reported."""
        if self._membership is None:
            return []
        self._membership.report(so_far=mine)
        if self._membership.number == 0 and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            others = (
                figures for figures in self._membership.all_statuses() if figures["worker"] != self._membership.number
            )
            self._others = [figures["so_far"] for figures in others if "so_far" in figures]
        return self._others


@dataclass(frozen=True, kw_only=True)
class WorkerFigures:
    """What one worker did.

    Attributes:
        worker: Its number.
        host: Name of its machine.
        pid: Process id on that machine.
        stats: Its figures.
    """

    worker: int
    host: str
    pid: int
    stats: RecordStats


class Workers:
    """This worker and the others of a capture.

    Args:
        membership: The workers; None if this one is alone.
    """

    def __init__(self, membership: Membership | None) -> None:
        self._membership = membership
        self._progress = Progress(membership)
        self._n_replicas = 1 if membership is None else membership.n_launched

    @property
    def is_alone(self) -> bool:
        """Whether there are no other workers, and none may join."""
        return self._membership is None

    def plan_once(self, make: Callable[[], Mapping[str, Any]], check: Callable[[], None]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and every other worker `check` after that; return what `make` returned."""
        message = plan_once(self._membership, lambda: {**make(), "n_replicas": self._n_replicas}, check)
        self._n_replicas = message["n_replicas"]
        return message

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Let worker 0 call `make`, and return its message on every worker."""
        return make() if self._membership is None else self._membership.once(name, make)

    def units(self, name: str, n: int, done: Callable[[], frozenset[int]]) -> Iterator[int | None]:
        """Yield the units of work that this worker is to do, until all are done; None while it has to wait.

        Args:
            name: Tells this work from other work of the same job.
            n: Number of units.
            done: Returns the units that are done, by any worker.
        """
        yield from units_left(unit_runs(self._membership, n, done, name=name))

    def process_layout(self, model: nn.Module, sites: Mapping[str, SiteInfo]) -> ProcessLayout | None:
        """Return what this worker holds of a model that several hold together; None if it holds the full model."""
        if self._membership is None or not spans_processes(model):
            return None
        layout = process_layout_of(model, sites, self._membership)
        self._n_replicas = max(1, self._membership.n_launched // len(layout.worker_group.numbers))
        return layout

    def work(self, archive: Path | Destination, schedule: Schedule) -> WorkQueue:
        """Return the shards that this worker is to do.

        Raises:
            CaptureError: While it is used: worker 0, which reads the dataset, is gone before its end.
        """
        if self._membership is None:
            return schedule.intervals()
        return shared_queue(
            self._membership, (), partial(committed_shards, archive), more=self._runs(schedule, self._membership)
        )

    def _runs(self, schedule: Schedule, membership: Membership) -> Iterator[Sequence[range] | None]:
        for shards in schedule.intervals():
            if shards is not None:
                yield schedule.runs(max(_LEAST_WORKERS, self._n_replicas), shards)
                continue
            if membership.number and membership.is_gone(0):
                raise CaptureError(membership.failure_reason(0))
            yield None

    def so_far(self, stats: RecordStats) -> RecordStats:
        """Report this worker's figures; return on worker 0 the figures of all workers, elsewhere `stats`."""
        others = [] if self._membership is None else self._progress.others(asdict(stats))
        return total([stats, *(RecordStats(**figures) for figures in others)]) if others else stats

    def finish(
        self, stats: RecordStats, archive: Path | Destination, n_shards: int, seal: Callable[[], None]
    ) -> list[WorkerFigures]:
        """Wait until every shard is committed, let worker 0 call `seal`, and return what each worker did.

        Raises:
            CaptureError: Shards are missing because a worker is gone, or worker 0 is gone.
        """
        if self._membership is None:
            seal()
            return [WorkerFigures(worker=0, host=socket.gethostname(), pid=os.getpid(), stats=stats)]
        membership = self._membership

        def close() -> Mapping[str, Any]:
            if missing := missing_shards(archive, n_shards):
                raise missing_work(membership, f"{len(missing)} shards")
            seal()
            return {"workers": membership.all_statuses()}

        membership.report(so_far=asdict(stats))
        return [
            WorkerFigures(worker=f["worker"], host=f["host"], pid=f["pid"], stats=RecordStats(**f["so_far"]))
            for f in membership.finish(close)["workers"]  # of a worker that died, the last figures that it reported
            if "so_far" in f
        ]


@contextmanager
def workers_of_step(membership: Membership | None, step: str) -> Iterator[Workers]:
    """Yield this worker and the others for a capture that is one step of their job.

    Args:
        membership: The workers of the job, launched together; None for one process alone.
        step: A name for the step.
    """
    if membership is None or membership.launch is None:
        yield Workers(None)
        return
    launch = membership.launch
    with Membership(PrefixStore(step, launch.store), launch.rank, launch.n_launched, launch=launch) as own:
        yield Workers(own)
