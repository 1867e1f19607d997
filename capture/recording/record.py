"""The story of a capture, top to bottom: run the batches that are missing, put every row where the plan says.

The plan and the example table are made; the archive exists and holds what earlier runs committed. What is left is
to run the model over the schedule's batches, let the taps copy each site's rows into host buffers, and let the writer
encode, write and commit each shard as it fills.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.forward.batches import BatchRunner
from residua.capture.layout.local_shards import LocalShards
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.layout.row_exchange import RowExchange
from residua.capture.replay.engine import CapturedReplay
from residua.capture.runtime.collectives import in_step
from residua.capture.runtime.devices import runs_on_cuda
from residua.capture.scheduling.ownership import Ownership
from residua.capture.scheduling.work_queue import LocalQueue, Run, WorkQueue, runs_of
from residua.capture.scheduling.worker_group import GroupCommits
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.reading import Taps
from residua.store.examples.schedule import Batch, Schedule
from residua.store.examples.table import ExampleTable
from residua.store.format.commits import committed_shards
from residua.store.format.plan import Plan, n_open_shards
from residua.store.format.writer import ShardWriter

_IDLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class RecordStats:
    """How a capture is going.

    Attributes:
        rows: Rows that this run has computed.
        n_tokens: Tokens that this run has computed, padding left out.
        committed_rows: Rows that this run has committed.
        logical_bytes: Bytes of the committed rows, as a reader gets them.
        stored_bytes: Bytes of the committed rows on disk.
        n_nonfinite: NaN and infinite values per array path.
        offloaded_bytes: Bytes of rows that were copied from the model to host memory.
        sent_bytes: Bytes of rows that were sent to other ranks, to be stored there.
        stall_seconds: Time that the model waited for the writer.
        forward_seconds: Time in the forward passes, copies included.
        seconds: Time since the run began.
    """

    rows: int
    n_tokens: int
    committed_rows: int
    logical_bytes: int
    stored_bytes: int
    n_nonfinite: Mapping[str, int]
    offloaded_bytes: int
    sent_bytes: int
    stall_seconds: float
    forward_seconds: float
    seconds: float


def total(all_stats: Sequence[RecordStats]) -> RecordStats:
    """Return the figures of several workers as those of one; the seconds are the longest run's."""
    n_nonfinite: dict[str, int] = {}
    for stats in all_stats:
        for path, count in stats.n_nonfinite.items():
            n_nonfinite[path] = n_nonfinite.get(path, 0) + count
    return RecordStats(
        rows=sum(stats.rows for stats in all_stats),
        n_tokens=sum(stats.n_tokens for stats in all_stats),
        committed_rows=sum(stats.committed_rows for stats in all_stats),
        logical_bytes=sum(stats.logical_bytes for stats in all_stats),
        stored_bytes=sum(stats.stored_bytes for stats in all_stats),
        n_nonfinite=n_nonfinite,
        offloaded_bytes=sum(stats.offloaded_bytes for stats in all_stats),
        sent_bytes=sum(stats.sent_bytes for stats in all_stats),
        stall_seconds=sum(stats.stall_seconds for stats in all_stats),
        forward_seconds=sum(stats.forward_seconds for stats in all_stats),
        seconds=max(stats.seconds for stats in all_stats),
    )


def record(
    model: nn.Module,
    archive: Path,
    plan: Plan,
    *,
    process_layout: ProcessLayout | None = None,
    replaying: CapturedReplay | None = None,
    work: Callable[[Schedule], WorkQueue] | None = None,
    agree: Callable[[bool], bool] | None = None,
    threads: int = 1,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
) -> RecordStats:
    """Capture the shards of `archive` that are handed out and have no commit.

    Args:
        model: The model that the plan was made for, on its device, in evaluation mode.
        archive: Folder of the archive.
        plan: Its plan.
        process_layout: What this process holds of a model that several processes share; all of them call `record`.
        replaying: Puts stored rows into the model and edits, batch by batch; what is captured is what follows.
        work: Makes the work queue for the plan's schedule; every shard in one run unless given. In a worker group only
            the leader's queue counts.
        agree: For models whose forward pass is a collective of all workers. Called before each batch with whether
            this worker has one; returns whether any has. Who has none runs a few tokens for the others' sake.
        threads: Encoder threads.
        on_batch: Called after every batch, and now and then while there is none.

    Returns:
        The figures of this run.

    Raises:
        CaptureError: A site did not fire, a shard could not be written, or another process of the worker group is
            gone; the cause is chained.
    """
    table = ExampleTable(archive / "examples")
    index = table.index()
    schedule = Schedule(index, rows_per_shard=plan.rows_per_shard, batch_tokens=plan.batch_tokens)
    ownership = Ownership(plan.sites) if process_layout is None else process_layout.ownership(plan)
    sites = resolve_sites(model, [site.name for site in plan.sites]) if process_layout is None else process_layout.sites
    commits = None if process_layout is None else GroupCommits(process_layout.worker_group, plan)
    with _writer(archive, plan, threads, commits) as writer:
        filler = ShardFiller(
            plan,
            writer,
            n_buffers=n_open_shards(int(index.n_rows.max(initial=0)), plan.rows_per_shard),
            pinned=runs_on_cuda(model),
            ownership=ownership,
        )
        sink = (
            filler
            if process_layout is None
            else RowExchange(plan, filler, ownership, LocalShards(sites, process_layout.group), process_layout.group)
        )
        changed = () if replaying is None else replaying.changed
        runner = BatchRunner(model, plan, table, sink, sites=sites, process_layout=process_layout, changed=changed)
        clock = _Clock(runner, filler, sink, writer)
        chosen = LocalQueue(schedule.n_shards) if work is None else work(schedule)
        runs = runs_of(chosen, partial(committed_shards, archive))
        if process_layout is not None:
            runs = process_layout.worker_group.in_lockstep(runs, waits=agree is None)
        batches = _batches(runs, schedule, filler, replaying)
        taps = Taps(model, sites, runner.put)
        with torch.inference_mode(), taps.attached() if replaying is None else nullcontext():
            for batch in batches if agree is None else in_step(batches, agree):
                if batch is not None or agree is not None:
                    around = None if replaying is None else partial(replaying.reading, taps)
                    for is_of_batch in runner.run(batch, around):
                        if is_of_batch or replaying is None:
                            taps.end_forward()
                        filler.finish()
                else:
                    writer.raise_failure()
                    time.sleep(_IDLE_SECONDS)
                if commits is not None:
                    commits.publish(writer)
                on_batch(clock.stats())
    return clock.stats()


@contextmanager
def _writer(archive: Path, plan: Plan, threads: int, commits: GroupCommits | None) -> Iterator[ShardWriter]:
    """Yield the writer; in the end, and after an error too, what is full is written and committed."""
    if commits is None:
        with ShardWriter(archive, plan, threads=threads) as writer:
            yield writer
        return
    after_error = True
    writer = ShardWriter(archive, plan, threads=threads, report=commits.report)
    try:
        with writer:
            yield writer
        after_error = False
    finally:
        commits.finish(writer, after_error=after_error)


def _batches(
    runs: Iterator[Run | None], schedule: Schedule, filler: ShardFiller, replaying: CapturedReplay | None
) -> Iterator[Batch | None]:
    """Yield the batches of run after run; None while no run can be had, though one may come."""
    for run in runs:
        if run is None:
            yield None
        else:
            filler.keep_only(set(run.shards) - run.committed)
            batches = schedule.work(run.committed, run.shards)
            yield from batches if replaying is None else replaying.prefetching(batches)


class _Clock:
    """Reads the figures of a run off those who work for it."""

    def __init__(
        self, runner: BatchRunner, filler: ShardFiller, sink: ShardFiller | RowExchange, writer: ShardWriter
    ) -> None:
        self._runner = runner
        self._filler = filler
        self._shared = None if isinstance(sink, ShardFiller) else sink
        self._writer = writer
        self._started = time.perf_counter()

    def stats(self) -> RecordStats:
        """Return the figures so far."""
        return RecordStats(
            rows=self._runner.n_rows,
            n_tokens=self._runner.n_tokens,
            committed_rows=self._writer.n_rows,
            logical_bytes=self._writer.logical_bytes,
            stored_bytes=self._writer.stored_bytes,
            n_nonfinite=dict(self._writer.n_nonfinite),
            offloaded_bytes=self._filler.n_bytes,
            sent_bytes=0 if self._shared is None else self._shared.sent_bytes,
            stall_seconds=self._filler.stall_seconds,
            forward_seconds=self._runner.forward_seconds,
            seconds=time.perf_counter() - self._started,
        )
