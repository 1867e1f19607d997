"""The way of rows from the model to the disk: host buffers, exchange between ranks, shard writer, commit records.

`record` and `Recorder` both put their rows into a `RowWriter`. Where several processes hold the model together, each
has its own; each stores its own files of every shard, and the leader of the worker group publishes the commit records.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.layout.local_shards import LocalShards
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.layout.row_exchange import RowExchange
from residua.capture.scheduling.sites_per_rank import Ownership
from residua.capture.scheduling.worker_group import GroupCommits
from residua.store.format.plan import Plan, n_open_shards
from residua.store.format.writer import ShardWriter
from residua.store.storage.destination import Destination


class RowWriter:
    """Takes the rows of batches; writes and commits each shard that fills up.

    A context: leaving it waits for every shard that was handed to the writer.

    Args:
        archive: Folder of the archive, or where else it is written.
        plan: What is stored.
        process_layout: What this process holds of a model that several processes share; None if it has all of it.
        shards: Finds out how the sites lie over those processes.
        most_rows: Rows of the longest example, or of the first call: shards that they reach are open at once.
        host_memory: Memory to which the host buffers may grow where a batch reaches into more shards, in bytes.
        pinned: Whether the host buffers are page-locked, for copies from a CUDA device.
        threads: Encoder threads.

    Attributes:
        filler: Takes full tensors, and copies the rows that this process stores to host buffers.
        exchange: Takes what this process has of a tensor, and sends rows to the ranks that store them.
        writer: The shard writer.
    """

    def __init__(
        self,
        archive: Path | Destination,
        plan: Plan,
        *,
        process_layout: ProcessLayout | None,
        shards: LocalShards,
        most_rows: int,
        host_memory: int = 0,
        pinned: bool,
        threads: int,
    ) -> None:
        ownership = Ownership(plan.sites) if process_layout is None else process_layout.ownership(plan)
        group = None if process_layout is None else process_layout.group
        self._commits = None if process_layout is None else GroupCommits(process_layout.worker_group, plan)
        report = None if self._commits is None else self._commits.report
        self.writer = ShardWriter(archive, plan, threads=threads, report=report)
        self.filler = ShardFiller(
            plan,
            self.writer,
            n_buffers=n_open_shards(most_rows, plan.rows_per_shard),
            max_buffers=host_memory // (plan.rows_per_shard * sum(site.row_bytes for site in plan.sites)),
            pinned=pinned,
            ownership=ownership,
        )
        self.exchange = RowExchange(plan, self.filler, ownership, shards, group)

    def publish(self) -> None:
        """Publish the commit records of shards of which every process has written its files."""
        if self._commits is not None:
            self._commits.publish(self.writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after_error = True
        try:
            self.writer.__exit__(kind, error, trace)
            after_error = error is not None
        finally:
            if self._commits is not None:
                self._commits.finish(self.writer, after_error=after_error)
