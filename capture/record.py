"""The story of a capture, top to bottom: run the batches that are missing, put every row where the plan says.

The plan and the example table are made; the archive exists and holds what earlier runs committed. What is left is
to run the model over the schedule's batches, let the taps copy each site's rows into stages, and let the writer
encode, write and commit each shard as it fills.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from residua.capture.inputs import forward_kwargs, padded_batch
from residua.capture.rows import ExampleRows, batch_rows, by_position
from residua.capture.staging import Staging
from residua.capture.taps import reading
from residua.store.commits import Commit
from residua.store.examples import ExampleTable
from residua.store.plan import Plan
from residua.store.schedule import Batch, Schedule
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
    sites = [site.name for site in plan.sites]
    with ShardWriter(archive, plan, threads=threads) as writer:
        staging = Staging(
            plan,
            writer,
            n_stages=n_stages(int(index.n_rows.max(initial=0)), plan.rows_per_shard),
            pinned=any(parameter.is_cuda for parameter in model.parameters()),
            committed=committed,
        )
        run = _Run(model, plan, table, staging, writer)
        with torch.inference_mode(), reading(model, sites, run.put) as taps:
            for batch in schedule.work(committed):
                run.batch(batch)
                taps.end_forward()
                staging.finish()
                on_batch(run.stats())
    return run.stats()


class _Run:
    """One run over the schedule: the current batch and the totals."""

    def __init__(
        self, model: nn.Module, plan: Plan, table: ExampleTable, staging: Staging, writer: ShardWriter
    ) -> None:
        self._model = model
        self._plan = plan
        self._table = table
        self._index = table.index()
        self._staging = staging
        self._writer = writer
        self._device = next(model.parameters()).device
        self._shape = (0, 0)
        self._rows = 0
        self._n_tokens = 0
        self._forward_seconds = 0.0
        self._started = time.perf_counter()

    def batch(self, batch: Batch) -> None:
        """Run one batch through the model; the taps call `put` meanwhile."""
        examples = self._table.batch(batch.examples.tolist())
        tokens = [input_ids for input_ids, _ in examples]
        padded = padded_batch(tokens, side=self._plan.padding, device=self._device)
        n_examples, n_positions = padded.input_ids.shape
        self._shape = (n_examples, n_positions)
        rows = [
            ExampleRows(
                example=int(number),
                first_row=int(self._index.first_row[number]),
                input_ids=input_ids,
                positions=positions,
                padded=np.arange(len(input_ids), dtype=np.int64)
                + (n_positions - len(input_ids) if self._plan.padding == "left" else 0),
            )
            for number, (input_ids, positions) in zip(batch.examples, examples, strict=True)
        ]
        self._staging.begin(batch_rows(rows, n_positions))
        started = time.perf_counter()
        self._model(**forward_kwargs(self._model, padded.input_ids, padded.attention_mask))
        self._forward_seconds += time.perf_counter() - started
        self._rows += sum(len(example.positions) for example in rows)
        self._n_tokens += sum(len(example.input_ids) for example in rows)

    def put(self, site: str, tensor: torch.Tensor) -> None:
        """Take one site's tensor from its tap."""
        self._staging.put(site, by_position(site, tensor, *self._shape))

    def stats(self) -> RecordStats:
        """Return the figures so far."""
        writer = self._writer
        return RecordStats(
            rows=self._rows,
            n_tokens=self._n_tokens,
            committed_rows=writer.n_rows,
            logical_bytes=writer.logical_bytes,
            stored_bytes=writer.stored_bytes,
            n_nonfinite=dict(writer.n_nonfinite),
            stall_seconds=self._staging.stall_seconds,
            forward_seconds=self._forward_seconds,
            seconds=time.perf_counter() - self._started,
        )
