"""The story of a capture, top to bottom: run the batches that are missing, put every row where the plan says.

The plan and the example table are made; the archive exists and holds what earlier runs committed. What is left is
to run the model over the schedule's batches, let the taps copy each site's rows into stages, and let the writer
encode, write and commit each shard as it fills.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from residua.capture.batches import BatchRunner
from residua.capture.staging import Staging
from residua.capture.taps import reading
from residua.store.commits import Commit
from residua.store.examples import ExampleTable
from residua.store.plan import Plan
from residua.store.schedule import Schedule
from residua.store.sizes import n_stages
from residua.store.writer import ShardWriter


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
    stall_seconds: float
    forward_seconds: float
    seconds: float


def record(
    model: nn.Module,
    archive: Path,
    plan: Plan,
    *,
    committed: Mapping[int, Commit],
    threads: int = 1,
    on_batch: Callable[[RecordStats], None] = lambda _: None,
) -> RecordStats:
    """Capture every shard of `archive` that is not in `committed`.

    Args:
        model: The model that the plan was made for, on its device, in evaluation mode.
        archive: Folder of the archive.
        plan: Its plan.
        committed: The commits that it has.
        threads: Encoder threads.
        on_batch: Called after every batch.

    Returns:
        The figures of this run.

    Raises:
        CaptureError: A site did not fire, or a shard could not be written; the cause is chained.
    """
    table = ExampleTable(archive / "examples")
    index = table.index()
    schedule = Schedule(index, rows_per_shard=plan.rows_per_shard, batch_tokens=plan.batch_tokens)
    with ShardWriter(archive, plan, threads=threads) as writer:
        staging = Staging(
            plan,
            writer,
            n_stages=n_stages(int(index.n_rows.max(initial=0)), plan.rows_per_shard),
            pinned=any(parameter.is_cuda for parameter in model.parameters()),
            committed=committed,
        )
        runner = BatchRunner(model, plan, table, staging)
        clock = _Clock(runner, staging, writer)
        with torch.inference_mode(), reading(model, [site.name for site in plan.sites], runner.put) as taps:
            for batch in schedule.work(committed):
                runner.run(batch)
                taps.end_forward()
                staging.finish()
                on_batch(clock.stats())
    return clock.stats()


class _Clock:
    """Reads the figures of a run off those who work for it."""

    def __init__(self, runner: BatchRunner, staging: Staging, writer: ShardWriter) -> None:
        self._runner = runner
        self._staging = staging
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
            stall_seconds=self._staging.stall_seconds,
            forward_seconds=self._runner.forward_seconds,
            seconds=time.perf_counter() - self._started,
        )
