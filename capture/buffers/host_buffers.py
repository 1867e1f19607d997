"""Host buffers: memory in which shards fill, and the copies of rows into it.

A host buffer holds one shard of every site that a process stores, in the stored dtype. `ShardFiller` copies each row
straight to the place where it lies in the shard, so nothing is copied twice and nothing is gathered later. The number
of host buffers is fixed: a batch that needs one waits while all are being filled or written. This is the only
back-pressure, and the time is counted.

From a CPU the copy is made at once, because later in-place operations may change the tensor. From a CUDA device it is
queued; `offload` owns the order of the operations, and `HostBuffer.pending` says when the copies are done.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.buffers.offload import BufferPool, Offload, PendingCopies
from residua.capture.buffers.row_index import BatchRows, RowIndex, may_overflow, n_overflowed, overflows
from residua.capture.runtime.streams import CudaStreams, page_locked
from residua.capture.scheduling.sites_per_rank import Ownership
from residua.store.base.errors import CaptureError
from residua.store.encoding.shard import ShardMemory
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.site_names import is_pattern
from residua.store.format.writer import FilledShard, ShardWriter

_DEVICE_BYTES = 256 * 1024 * 1024  # of gathered rows on a device that wait for their copy


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a stored data type."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a torch dtype")
    return dtype


class HostBuffer:
    """Memory for one shard of every site that this process stores.

    Args:
        plan: What is stored.
        n_rows: Number of rows that the buffer holds.
        pinned: Whether the memory is page-locked, for copies from a CUDA device.
        sites: The sites to make memory for; all of the plan's unless given.
        has_columns: Whether the buffer also holds the columns of the rows (token, position, example, ...).

    Attributes:
        blocks: For each site its rows, in consecutive blocks of equal height, each (rows, *row shape).
        columns: For each column of the rows its values.
        n_filled: Number of rows that batches have announced.
        pending: The copies from devices that are under way.
        overflowed: For each site the numbers of finite values that a cast made infinite: integers, or tensors of one
            integer that are valid once the pending copies are done.
    """

    def __init__(
        self,
        plan: Plan,
        n_rows: int,
        *,
        pinned: bool,
        sites: Sequence[SitePlan] | None = None,
        has_columns: bool = True,
    ) -> None:
        self._memory: dict[str, ShardMemory] = {}
        with torch.inference_mode(mode=False):  # rows computed outside inference mode cannot be copied to its tensors
            stored = plan.sites if sites is None else sites
            self.blocks = {site.name: self._allocate(plan, site, n_rows, pinned) for site in stored}
        columns = plan.row_columns if has_columns else {}
        self.columns = {name: np.zeros(n_rows, dtype) for name, dtype in columns.items()}
        self.n_filled = 0
        self.pending = PendingCopies()
        self.overflowed: dict[str, list[int | torch.Tensor]] = {}

    def _allocate(self, plan: Plan, site: SitePlan, n_rows: int, pinned: bool) -> list[torch.Tensor]:
        dtype = torch_dtype(site.dtype)
        if pinned:
            return [_as_tensor(page_locked(n_rows * site.row_bytes), dtype, site.row_shape)]
        spec = site.arrays(plan.rows_per_shard)[0]
        if not ShardMemory.suits(spec):
            # Unlike torch, numpy asks the system for large pages, and so for far fewer of them.
            return [_as_tensor(np.empty(n_rows * site.row_bytes, np.uint8), dtype, site.row_shape)]
        memory = self._memory[site.name] = ShardMemory(spec, n_rows)
        return [_as_tensor(chunk, dtype, site.row_shape) for chunk in memory.chunks]

    def filled(self, site: str, block: int, n_rows: int) -> None:
        """Note that `n_rows` rows were copied to block number `block` of `site`."""
        if site in self._memory:
            self._memory[site].filled(block, n_rows)

    def count_overflowed(
        self, site: str, computed: torch.dtype, stored: torch.dtype, count: Callable[[], int | torch.Tensor]
    ) -> None:
        """Add what `count` returns to the overflowed values of `site`, if a cast between the types can overflow."""
        if may_overflow(computed, stored):
            self.overflowed.setdefault(site, []).append(count())

    def rows(self, site: str, n_rows: int) -> npt.NDArray[np.generic] | ShardMemory:
        """Return the first `n_rows` rows of `site` in the stored dtype (bfloat16 as uint16 bits), without a copy."""
        if site in self._memory:
            return self._memory[site].first(n_rows)
        rows = self.blocks[site][0][:n_rows]
        if rows.dtype == torch.bfloat16:
            return rows.view(torch.int16).numpy().view("<u2")
        return rows.numpy()


def _as_tensor(memory: npt.NDArray[np.generic], dtype: torch.dtype, row_shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(memory.reshape(-1).view(np.uint8)).view(dtype).view(-1, *row_shape)


class ShardFiller:
    """Copies the rows of batches to host buffers, and hands full shards to the writer.

    Args:
        plan: What is stored.
        writer: The writer that gets full shards.
        n_buffers: Number of host buffers, and so of shards that are in memory at once.
        max_buffers: Number to which the host buffers may grow for a batch that reaches into more shards;
            `n_buffers` unless given.
        pinned: Whether the memory is page-locked, for copies from a CUDA device.
        ownership: What this process stores of each shard; everything unless given.

    Attributes:
        n_bytes: Bytes of the rows that were copied to host buffers.
        n_rows: Rows of the archive, which end the last shard; None while they are not known.
    """

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        *,
        n_buffers: int,
        pinned: bool,
        max_buffers: int = 0,
        ownership: Ownership | None = None,
    ) -> None:
        self._height = plan.rows_per_shard if plan.n_rows is None else max(1, min(plan.rows_per_shard, plan.n_rows))
        self._pinned = pinned
        self._ownership = Ownership(plan.sites) if ownership is None else ownership
        self.n_bytes = 0
        self.n_rows = plan.n_rows
        self._plan = plan
        self._writer = writer
        self._only: Container[int] | None = None
        self._n_buffers = n_buffers
        self._max_buffers = max(n_buffers, max_buffers)
        n_lots = self._ownership.n_lots
        n_per_lot = -(-n_buffers // n_lots)  # shards that are open at once are consecutive
        self._pools = [BufferPool(self._new_buffer(lot) for _ in range(n_per_lot)) for lot in range(n_lots)]
        self._open: dict[int, HostBuffer] = {}
        self._offload = Offload(_DEVICE_BYTES)
        self._streams: dict[torch.device, CudaStreams] = {}
        self._batch: BatchRows | None = None
        self._targets: list[tuple[int, HostBuffer, RowIndex]] = []

    def _new_buffer(self, lot: int) -> HostBuffer:
        sites, has_columns = self._ownership.sites(lot), self._ownership.has_columns
        return HostBuffer(self._plan, self._height, pinned=self._pinned, sites=sites, has_columns=has_columns)

    def keep_only(self, shards: Container[int]) -> None:
        """Keep only rows of `shards` from now on; other shards are committed, or another worker writes them.

        Raises:
            RuntimeError: A shard is still being filled.
        """
        if self._open:
            raise RuntimeError(f"the shards {self.open_shards} are not full")
        self._only = shards

    def begin(self, batch: BatchRows) -> None:
        """Find the places for the rows of `batch`; wait while no host buffer is free.

        Raises:
            CaptureError: The batch before was not finished, this one reaches into too many shards, or the writer
                failed.
        """
        self._refuse_unfinished()
        self._batch = batch
        self._targets = []
        height = self._plan.rows_per_shard
        wanted = [
            (shard, picked) for shard, picked in batch.per_shard(height) if self._only is None or shard in self._only
        ]
        self._make_room(len(batch.row), {shard for shard, _ in wanted})
        for shard, picked in wanted:
            buffer = self._open.get(shard) or self._acquire(shard)
            target = batch.row[picked] - shard * height
            for name, column in buffer.columns.items():
                column[target] = batch.column(name)[picked]
            buffer.n_filled += len(picked)
            self._targets.append((shard, buffer, RowIndex(batch.source[picked], target)))

    def _refuse_unfinished(self) -> None:
        """Raise if rows of a batch were announced but not all copied: they would hold whatever was in the memory."""
        if self._batch is not None:
            raise CaptureError(
                f"a call of the model ended before its {len(self._batch.row):,} rows were copied, so they are missing. "
                "What was committed before is safe; remove the cause and capture again."
            )

    def _make_room(self, n_rows: int, shards: set[int]) -> None:
        """Add host buffers for a batch that fills more shards than there are, or raise: it would wait forever."""
        needed = len(shards | self._open.keys())
        while self._n_buffers < min(needed, self._max_buffers):
            self._n_buffers += 1
            for lot, pool in enumerate(self._pools):
                pool.release(self._new_buffer(lot))
        if needed > self._n_buffers:
            raise CaptureError(
                f"a batch of {n_rows:,} rows reaches into {len(shards)} shards of "
                f"{self._plan.rows_per_shard:,} rows, but there is memory for {self._n_buffers} at once: "
                "use smaller batches, or taller shards (rows_per_shard)."
            )

    def put(self, site: str, tensor: torch.Tensor) -> None:
        """Copy the rows of `site` that this process stores to their host buffers.

        Args:
            site: Name of the site.
            tensor: (B, T, *row), in any dtype and on any device; it may change afterwards.
        """
        if self._batch is None:
            raise RuntimeError(f"rows of {site} came before their batch was announced")
        has_keys = is_pattern(site)
        keys = self._batch.keys_of(site) if has_keys else None
        flat = tensor if has_keys else tensor.flatten(0, 1)
        for _, buffer, row_index in self._targets:
            blocks = buffer.blocks.get(site)
            if blocks is None:
                continue
            self.n_bytes += len(row_index.source) * blocks[0][0].nbytes
            for number, in_block in row_index.per_block(len(blocks[0])):
                block = blocks[number]
                if tensor.is_cuda:
                    if has_keys:
                        gather = partial(in_block.gather_pattern, flat, block, self._batch, keys)
                    else:
                        gather = partial(in_block.gather, flat, flat.dtype)
                    self._send(site, tensor.device, gather, in_block, block, buffer)
                    continue
                if has_keys:
                    in_block.copy_pattern(flat, block, self._batch, keys)
                else:
                    in_block.copy(flat, block)
                    buffer.count_overflowed(site, flat.dtype, block.dtype, partial(in_block.overflowed, flat, block))
                buffer.filled(site, number, len(in_block.target))

    def row_indexes(self) -> Iterator[tuple[int, RowIndex]]:
        """Yield each shard that keeps rows of the current batch, with the index of these rows."""
        for shard, _, row_index in self._targets:
            yield shard, row_index

    def put_rows(self, site: str, shard: int, rows: torch.Tensor) -> None:
        """Copy all rows of `site` that the current batch has for `shard`.

        Args:
            site: A site that this process stores of `shard`.
            shard: One of the shards of `row_indexes`.
            rows: (rows, *row), in the order of the row index and in any dtype; nobody else changes it.
        """
        buffer, row_index = next((buffer, index) for number, buffer, index in self._targets if number == shard)
        blocks = buffer.blocks[site]
        self.n_bytes += len(rows) * blocks[0][0].nbytes
        start = 0
        for number, in_block in row_index.per_block(len(blocks[0])):
            piece = rows[start : start + len(in_block.target)]
            start += len(in_block.target)
            if rows.is_cuda:
                self._send(site, rows.device, partial(_same, piece), in_block, blocks[number], buffer)
            else:
                stored = piece.to(blocks[number].dtype)
                buffer.count_overflowed(site, piece.dtype, stored.dtype, partial(n_overflowed, piece, stored))
                in_block.scatter(stored, blocks[number])
                buffer.filled(site, number, len(in_block.target))

    def _send(
        self,
        site: str,
        device: torch.device,
        gather: Callable[[], torch.Tensor],
        in_block: RowIndex,
        block: torch.Tensor,
        buffer: HostBuffer,
    ) -> None:
        """Queue a copy of gathered rows from a device to a block, and that of the number of overflowed values."""
        if device not in self._streams:
            self._streams[device] = CudaStreams(device)
        found: torch.Tensor | None = None

        def cast() -> tuple[torch.Tensor, torch.Tensor | None]:
            rows = gather()
            stored = rows.to(block.dtype)
            return stored, overflows(rows, stored) if may_overflow(rows.dtype, block.dtype) else None

        def copy(cast_rows: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            nonlocal found
            rows, n = cast_rows
            in_block.scatter(rows, block)
            if n is not None:
                found = torch.empty((), dtype=torch.int64, pin_memory=True)
                found.copy_(n, non_blocking=True)

        self._offload.send(
            self._streams[device],
            cast,
            copy,
            n_bytes=len(in_block.source) * block[0].nbytes,
            pending=buffer.pending,
        )
        if found is not None:
            buffer.overflowed.setdefault(site, []).append(found)

    def finish(self, before: Callable[[], dict[str, str]] = dict) -> None:
        """End the batch, after `put` of every site; hand full shards to the writer.

        Args:
            before: Called before a shard is handed over; makes its example files durable and returns their SHA-256.
        """
        self._batch = None
        self._targets = []
        for shard in sorted(self._open):
            if self._open[shard].n_filled == self._rows_in(shard):
                self.hand_over(shard, before())

    def hand_over(self, shard: int, examples: dict[str, str]) -> None:
        """Give the filled rows of `shard` to the writer.

        Raises:
            CaptureError: A batch was not finished, or the writer failed.
        """
        self._refuse_unfinished()
        buffer = self._open.pop(shard)
        n_rows = buffer.n_filled
        release = partial(self._pools[self._ownership.lot(shard)].release, buffer)
        if not buffer.blocks and not buffer.columns:
            release()
            return
        self._writer.submit(
            FilledShard(
                index=shard,
                first_row=shard * self._plan.rows_per_shard,
                sites={site: buffer.rows(site, n_rows) for site in buffer.blocks},
                columns={name: column[:n_rows] for name, column in buffer.columns.items()},
                column_shard=self._ownership.column_shard,
                examples=examples,
                overflowed=partial(_sums, buffer.overflowed),
                ready=buffer.pending.wait,
                release=release,
            )
        )

    @property
    def stall_seconds(self) -> float:
        """Time that the model waited for a free host buffer, or for room on its device, in seconds."""
        return sum(pool.wait_seconds for pool in self._pools) + self._offload.wait_seconds

    @property
    def open_shards(self) -> tuple[int, ...]:
        """Shards that are being filled."""
        return tuple(sorted(self._open))

    def _rows_in(self, shard: int) -> int:
        height = self._plan.rows_per_shard
        return height if self.n_rows is None else min(height, self.n_rows - shard * height)

    def _acquire(self, shard: int) -> HostBuffer:
        buffer = self._pools[self._ownership.lot(shard)].acquire()
        self._writer.raise_failure()
        buffer.n_filled = 0
        buffer.overflowed = {}
        self._open[shard] = buffer
        return buffer


def _sums(numbers: Mapping[str, Sequence[int | torch.Tensor]]) -> dict[str, int]:
    return {site: sum(int(number) for number in found) for site, found in numbers.items()}


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows
