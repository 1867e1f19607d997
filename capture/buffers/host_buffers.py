"""Stages: host memory in which shards fill, and the copies into it.

A stage holds one shard of every site, in the dtype that is stored. Hooks copy rows straight to where they will lie
in the shard, so nothing is copied twice and nothing is gathered later. The number of stages is fixed: when a batch
needs one and all are being filled or written, it waits. That is the only back-pressure, and it is counted.

On a CPU the copy is made at once, because later in-place operations may change the tensor. On CUDA it is queued;
`offload` owns the order of what happens then, and a stage's `landing` says when its copies are done.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.buffers.offload import Landing, Offload, StagePool
from residua.capture.buffers.row_index import BatchRows, Placement
from residua.capture.runtime.streams import CudaStreams, page_locked
from residua.capture.scheduling.ownership import Ownership
from residua.store.base.errors import CaptureError
from residua.store.encoding.shard import ShardMemory
from residua.store.format.plan import ROW_COLUMNS, Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter

_DEVICE_BYTES = 256 * 1024 * 1024  # of gathered rows on a device that wait for their copy


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a stored data type name."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a torch dtype")
    return dtype


class Stage:
    """Memory for one shard of every site that this process stores.

    Attributes:
        blocks: Per site its rows, in blocks of equal height one after the other, each (rows, *row shape).
        columns: What each row is.
        n_filled: Rows that were announced.
        landing: The copies from devices that are under way.
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
        with torch.inference_mode(mode=False):  # or rows that come outside of it could not be copied in
            stored = plan.sites if sites is None else sites
            self.blocks = {site.name: self._allocate(plan, site, n_rows, pinned) for site in stored}
        columns = ROW_COLUMNS if has_columns else {}
        self.columns = {name: np.zeros(n_rows, dtype) for name, dtype in columns.items()}
        self.n_filled = 0
        self.landing = Landing()

    def _allocate(self, plan: Plan, site: SitePlan, n_rows: int, pinned: bool) -> list[torch.Tensor]:
        dtype = torch_dtype(site.dtype)
        if pinned:
            return [_as_tensor(page_locked(n_rows * site.row_bytes), dtype, site.row_shape)]
        spec = site.arrays(plan.rows_per_shard)[0]
        if not ShardMemory.suits(spec):
            # unlike torch, numpy asks the system for large pages, and so for far fewer of them
            return [_as_tensor(np.empty(n_rows * site.row_bytes, np.uint8), dtype, site.row_shape)]
        memory = self._memory[site.name] = ShardMemory(spec, n_rows)
        return [_as_tensor(chunk, dtype, site.row_shape) for chunk in memory.chunks]

    def filled(self, site: str, block: int, n_rows: int) -> None:
        """Take note that `n_rows` rows were just copied to block number `block` of `site`."""
        if site in self._memory:
            self._memory[site].filled(block, n_rows)

    def rows(self, site: str, n_rows: int) -> npt.NDArray[np.generic] | ShardMemory:
        """Return the first `n_rows` rows of `site` in storage dtype, without a copy."""
        if site in self._memory:
            return self._memory[site].first(n_rows)
        buffer = self.blocks[site][0][:n_rows]
        if buffer.dtype == torch.bfloat16:
            return buffer.view(torch.int16).numpy().view("<u2")
        return buffer.numpy()


def _as_tensor(memory: npt.NDArray[np.generic], dtype: torch.dtype, row_shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(memory.reshape(-1).view(np.uint8)).view(dtype).view(-1, *row_shape)


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


class Staging:
    """Takes the rows of batches and hands full shards to the writer.

    Args:
        plan: What is stored.
        writer: Where full shards go.
        n_stages: How many shards are in memory at once.
        most_stages: To how many that may grow for a batch that reaches into more; `n_stages` unless given.
        pinned: Whether the memory is page-locked, for copies from a CUDA device.
        ownership: What this process stores of each shard; everything unless given.

    Attributes:
        n_bytes: Bytes of the rows that were copied into stages.
    """

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        *,
        n_stages: int,
        pinned: bool,
        most_stages: int = 0,
        ownership: Ownership | None = None,
    ) -> None:
        self._height = plan.rows_per_shard if plan.n_rows is None else max(1, min(plan.rows_per_shard, plan.n_rows))
        self._pinned = pinned
        self._ownership = Ownership(plan.sites) if ownership is None else ownership
        self.n_bytes = 0
        self._plan = plan
        self._writer = writer
        self._only: Container[int] | None = None
        self._n_stages = n_stages
        self._most_stages = max(n_stages, most_stages)
        n_per_lot = -(-n_stages // self._ownership.n_lots)  # shards that are open at once follow one another
        self._pools = [
            StagePool(self._new_stage(lot) for _ in range(n_per_lot)) for lot in range(self._ownership.n_lots)
        ]
        self._open: dict[int, Stage] = {}
        self._offload = Offload(_DEVICE_BYTES)
        self._streams: dict[torch.device, CudaStreams] = {}
        self._batch: BatchRows | None = None
        self._placements: list[tuple[int, Stage, Placement]] = []

    def _new_stage(self, lot: int) -> Stage:
        sites, has_columns = self._ownership.sites(lot), self._ownership.has_columns
        return Stage(self._plan, self._height, pinned=self._pinned, sites=sites, has_columns=has_columns)

    def keep_only(self, shards: Container[int]) -> None:
        """From now on keep rows of `shards` only; those of others are committed, or some other worker's.

        Raises:
            RuntimeError: A shard is filling still.
        """
        if self._open:
            raise RuntimeError(f"the shards {self.open_shards} are not full")
        self._only = shards

    def begin(self, batch: BatchRows) -> None:
        """Find a place for the rows of `batch`; waits while no stage is free.

        Raises:
            CaptureError: The batch before was not finished, this one reaches too far, or the writer failed.
        """
        self._refuse_unfinished()
        self._batch = batch
        self._placements = []
        height = self._plan.rows_per_shard
        wanted = [part for part in batch.per_shard(height) if self._only is None or part[0] in self._only]
        self._make_room(len(batch.row), {shard for shard, _ in wanted})
        for shard, picked in wanted:
            stage = self._open.get(shard) or self._acquire(shard)
            target = batch.row[picked] - shard * height
            for name, column in stage.columns.items():
                column[target] = getattr(batch, name)[picked]
            stage.n_filled += len(picked)
            self._placements.append((shard, stage, Placement(batch.source[picked], target)))

    def _refuse_unfinished(self) -> None:
        """Raise if rows of a batch were counted but not all copied: they would be whatever the memory held."""
        if self._batch is not None:
            raise CaptureError(
                f"a call of the model ended before its {len(self._batch.row):,} rows were copied, so they are missing. "
                "What was committed before is safe; remove the cause and capture again."
            )

    def _make_room(self, n_rows: int, shards: set[int]) -> None:
        """Add stages for a batch that fills more shards than there are, or raise: waiting would be for ever."""
        needed = len(shards | self._open.keys())
        while self._n_stages < min(needed, self._most_stages):
            self._n_stages += 1
            for lot, pool in enumerate(self._pools):
                pool.release(self._new_stage(lot))
        if needed > self._n_stages:
            raise CaptureError(
                f"a batch of {n_rows:,} rows reaches into {len(shards)} shards of "
                f"{self._plan.rows_per_shard:,} rows, but there is memory for {self._n_stages} at once: "
                "use smaller batches, or taller shards (rows_per_shard)."
            )

    def put(self, site: str, tensor: torch.Tensor) -> None:
        """Copy the wanted rows of `tensor` (B, T, *row) of `site` to their stages, where they are this process's."""
        if self._batch is None:
            raise RuntimeError(f"rows of {site} came before their batch was announced")
        pattern = site.startswith("pattern.")
        flat = tensor if pattern else tensor.flatten(0, 1)
        for _, stage, placement in self._placements:
            blocks = stage.blocks.get(site)
            if blocks is None:
                continue
            self.n_bytes += len(placement.source) * blocks[0][0].nbytes
            for block, part in placement.per_block(len(blocks[0])):
                if tensor.is_cuda:
                    self._send(flat, part, blocks[block], self._batch, stage.landing, pattern=pattern)
                    continue
                if pattern:
                    part.copy_pattern(flat, blocks[block], self._batch)
                else:
                    part.copy(flat, blocks[block])
                stage.filled(site, block, len(part.target))

    def placements(self) -> Iterator[tuple[int, Placement]]:
        """Yield each shard that wants rows of the batch under way, with the places of these."""
        for shard, _, placement in self._placements:
            yield shard, placement

    def put_rows(self, site: str, shard: int, rows: torch.Tensor) -> None:
        """Copy whole rows of `site`, all that the batch has for `shard`, in the order of their placement.

        Args:
            site: A site that this process stores of `shard`.
            shard: One of `placements`.
            rows: (rows, *row), of the stored dtype, and nobody else's.
        """
        stage, placement = next((stage, at) for number, stage, at in self._placements if number == shard)
        blocks = stage.blocks[site]
        self.n_bytes += rows.nbytes
        start = 0
        for block, part in placement.per_block(len(blocks[0])):
            piece = rows[start : start + len(part.target)]
            start += len(part.target)
            if rows.is_cuda:
                self._offload.send(
                    self._streams_of(rows.device),
                    partial(_same, piece),
                    partial(part.scatter, buffer=blocks[block]),
                    n_bytes=piece.nbytes,
                    landing=stage.landing,
                )
            else:
                part.scatter(piece, blocks[block])
                stage.filled(site, block, len(part.target))

    def _send(
        self,
        flat: torch.Tensor,
        placement: Placement,
        buffer: torch.Tensor,
        batch: BatchRows,
        landing: Landing,
        *,
        pattern: bool,
    ) -> None:
        """Queue a copy from a device."""
        if pattern:
            gather = partial(placement.gather_pattern, flat, buffer, batch)
        else:
            gather = partial(placement.gather, flat, buffer.dtype)
        self._offload.send(
            self._streams_of(flat.device),
            gather,
            partial(placement.scatter, buffer=buffer),
            n_bytes=len(placement.source) * buffer[0].nbytes,
            landing=landing,
        )

    def _streams_of(self, device: torch.device) -> CudaStreams:
        if device not in self._streams:
            self._streams[device] = CudaStreams(device)
        return self._streams[device]

    def finish(self, before: Callable[[], dict[str, str]] = dict) -> None:
        """Close the batch: every site's rows were put; full shards go to the writer.

        Args:
            before: Called before a shard is handed over; makes its example parts durable and returns their SHA-256.
        """
        self._batch = None
        self._placements = []
        for shard in sorted(self._open):
            if self._open[shard].n_filled == self._rows_in(shard):
                self.hand_over(shard, before())

    def hand_over(self, shard: int, examples: dict[str, str]) -> None:
        """Give the filled rows of `shard` to the writer.

        Raises:
            CaptureError: A batch was not finished, or the writer failed.
        """
        self._refuse_unfinished()
        stage = self._open.pop(shard)
        n_rows = stage.n_filled
        release = partial(self._pools[self._ownership.lot(shard)].release, stage)
        if not stage.blocks and not stage.columns:
            release()
            return
        self._writer.submit(
            FilledShard(
                index=shard,
                first_row=shard * self._plan.rows_per_shard,
                sites={site: stage.rows(site, n_rows) for site in stage.blocks},
                columns={name: column[:n_rows] for name, column in stage.columns.items()},
                column_shard=self._ownership.column_shard,
                examples=examples,
                ready=stage.landing.wait,
                release=release,
            )
        )

    @property
    def stall_seconds(self) -> float:
        """Time that the model waited for a free stage, or for room on its device."""
        return sum(pool.wait_seconds for pool in self._pools) + self._offload.wait_seconds

    @property
    def open_shards(self) -> tuple[int, ...]:
        """Shards that are filling."""
        return tuple(sorted(self._open))

    def _rows_in(self, shard: int) -> int:
        height = self._plan.rows_per_shard
        return height if self._plan.n_rows is None else min(height, self._plan.n_rows - shard * height)

    def _acquire(self, shard: int) -> Stage:
        stage = self._pools[self._ownership.lot(shard)].acquire()
        self._writer.raise_failure()
        stage.n_filled = 0
        self._open[shard] = stage
        return stage
