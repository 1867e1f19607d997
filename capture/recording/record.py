"""The story of a capture, top to bottom: run the batches that are missing, and store each row where the plan says.

The plan, the example table and the archive exist, and the archive holds what earlier runs committed. `record` runs the
model over the remaining batches of the schedule. Taps copy the rows of each site to host buffers, one buffer per shard.
A full buffer goes to the writer, which encodes, writes and commits the shard in the background.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import nn

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.forward.batches import BatchRunner
from residua.capture.forward.example_inputs import InputSource
from residua.capture.layout.local_shards import LocalShards
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.recording.row_writer import RowWriter
from residua.capture.recording.stats import RecordStats
from residua.capture.replay.captured import CapturedReplay
from residua.capture.runtime.collectives import in_step
from residua.capture.runtime.devices import runs_on_cuda
from residua.capture.runtime.sharded import without_gradients
from residua.capture.scheduling.work_queue import Run, WorkQueue, runs_of
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.reading import Taps
from residua.store.base.freed_memory import return_freed_memory
from residua.store.examples.growing import DatasetEnd
from residua.store.examples.schedule import Batch, GrowingSchedule, Schedule
from residua.store.examples.table import ExampleTable
from residua.store.format.commits import committed_shards
from residua.store.format.plan import Plan
from residua.store.storage.destination import Destination, destination_of

_IDLE_SECONDS = 0.02


def record(
    model: nn.Module,
    archive: Path | Destination,
    plan: Plan,
    *,
    process_layout: ProcessLayout | None = None,
    replaying: CapturedReplay | None = None,
    inputs: InputSource | None = None,
    work: Callable[[Schedule], WorkQueue] | None = None,
    agree: Callable[[bool], bool] | None = None,
    most_rows: int | None = None,
    threads: int = 1,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
) -> RecordStats:
    """Capture the shards of `archive` that the work queue gives to this worker and that have no commit record.

    Args:
        model: The model that the plan was made for, on its device, in evaluation mode.
        archive: Folder of the archive, or where else it is written.
        plan: Its plan.
        process_layout: What this process holds of a model that several processes share; all of them call `record`.
        replaying: Puts stored rows and edits into the model; the capture stores what follows from them.
        inputs: Makes what examples have beside tokens, such as pixels.
        work: Makes the work queue for the plan's schedule; every shard in one run unless given. In a worker group only
            the leader's queue counts.
        agree: For models whose forward pass is a collective of all workers. Called before each batch with whether
            this worker has one; returns whether any worker has. A worker without a batch runs a few tokens instead.
        most_rows: Most rows of an example, for a plan whose number of rows is open: its examples may still be read.
            Unless given, the most that an example has.
        threads: Encoder threads.
        on_batch: Called with the figures so far after every batch, and regularly while there is none.

    Returns:
        The figures of this run.

    Raises:
        CaptureError: A site did not fire, a shard could not be written, or another process of the worker group is
            gone; the cause is chained.
    """
    # What is to be captured here: the batches of the plan, and the sites that this process holds.
    archive = destination_of(archive)
    table = ExampleTable(archive.path / "examples")
    schedule = _schedule(archive, plan, table)
    sites = resolve_sites(model, [site.name for site in plan.sites]) if process_layout is None else process_layout.sites
    shards = LocalShards(sites, None if process_layout is None else process_layout.group)

    # The way of a row: model, tap, sink (a host buffer here or on another rank), writer, disk.
    rows = RowWriter(
        archive,
        plan,
        process_layout=process_layout,
        shards=shards,
        most_rows=int(table.index().n_rows.max(initial=0)) if most_rows is None else most_rows,
        pinned=runs_on_cuda(model),
        threads=threads,
    )
    runner = BatchRunner(
        model,
        plan,
        table,
        rows.filler if process_layout is None else rows.exchange,
        sites=sites,
        process_layout=process_layout,
        changed=() if replaying is None else replaying.changed,
        inputs=inputs,
    )
    taps = Taps(model, sites, runner.put)
    stats = partial(_stats, runner, rows, time.perf_counter())

    # A replay attaches the taps itself, around each batch, so that they read what its edits have left.
    with rows, without_gradients(model), taps.attached() if replaying is None else nullcontext():
        queue = schedule.intervals() if work is None else work(schedule)
        runs = runs_of(queue, partial(committed_shards, archive))
        if process_layout is not None:
            runs = process_layout.worker_group.in_lockstep(runs, waits=agree is None)
        batches = _batches(runs, schedule, rows.filler, replaying)
        around = None if replaying is None else partial(replaying.reading, taps)
        for batch in batches if agree is None else in_step(batches, agree):
            if batch is None and agree is None:  # another worker has the last shards, and may die
                rows.writer.raise_failure()
                time.sleep(_IDLE_SECONDS)
            else:
                for is_of_batch in runner.run(batch, around):
                    if is_of_batch or replaying is None:
                        taps.end_forward()
                    rows.filler.finish()
            rows.publish()
            return_freed_memory()
            on_batch(stats())
    return stats()


def _schedule(archive: Destination, plan: Plan, table: ExampleTable) -> Schedule:
    sizes = {"rows_per_shard": plan.rows_per_shard, "batch_tokens": plan.batch_tokens}
    if plan.n_rows is None:
        return GrowingSchedule(table, DatasetEnd(archive), **sizes)
    return Schedule(table.index(), **sizes)


def _batches(
    runs: Iterator[Run | None], schedule: Schedule, filler: ShardFiller, replaying: CapturedReplay | None
) -> Iterator[Batch | None]:
    """Yield the batches of run after run, without committed shards; None while no run can be had, but one may come."""
    for run in runs:
        if run is None:
            yield None
        else:
            filler.n_rows = schedule.n_rows if schedule.is_whole else None
            filler.keep_only(set(run.shards) - run.committed)
            batches = schedule.work(run.committed, run.shards)
            yield from batches if replaying is None else replaying.prefetching(batches)


def _stats(runner: BatchRunner, rows: RowWriter, started: float) -> RecordStats:
    return RecordStats(
        rows=runner.n_rows,
        n_tokens=runner.n_tokens,
        committed_rows=rows.writer.n_rows,
        logical_bytes=rows.writer.logical_bytes,
        stored_bytes=rows.writer.stored_bytes,
        n_nonfinite=dict(rows.writer.n_nonfinite),
        offloaded_bytes=rows.filler.n_bytes,
        sent_bytes=rows.exchange.sent_bytes,
        stall_seconds=rows.filler.stall_seconds,
        forward_seconds=runner.forward_seconds,
        seconds=time.perf_counter() - started,
    )
