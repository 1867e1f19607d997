"""Moving rows of a replica that several ranks hold together to the one rank that stores them.

Where every rank has the full tensor, the rank that stores it copies it and no other rank does. Where the tensor is
split, one `Exchange` brings full rows to the rank that stores them. Partial sums are reduced first.

Legend: `B` examples in the batch, `T` padded positions.
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.capture.buffers.host_buffers import ShardFiller, torch_dtype
from residua.capture.buffers.row_index import FIRST_ROW_AXIS, BatchRows, Indices, RowIndex, by_position, may_overflow
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards
from residua.capture.runtime.collectives import Exchange, on_rank
from residua.capture.scheduling.sites_per_rank import Ownership
from residua.store.base.errors import CaptureError
from residua.store.base.naming import named
from residua.store.format.plan import Plan
from residua.store.format.site_names import is_pattern


class RowExchange:
    """The `RowSink` of a split model: takes what this rank has of each site.

    Args:
        plan: What is stored.
        filler: Takes the rows that this rank stores.
        ownership: Which rank stores what.
        shards: Finds out how the sites lie.
        group: The ranks over which activations may be split; None where this rank has full ones.
    """

    def __init__(
        self, plan: Plan, filler: ShardFiller, ownership: Ownership, shards: LocalShards, group: ProcessGroup | None
    ) -> None:
        self._plan = plan
        self._filler = filler
        self._ownership = ownership
        self._exchange = None if group is None else Exchange(group)
        self._shards = shards
        self._batch: BatchRows | None = None

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to others."""
        return 0 if self._exchange is None else self._exchange.sent_bytes

    def begin(self, batch: BatchRows) -> None:
        """Announce the rows of the next forward pass."""
        self._batch = batch
        self._filler.begin(batch)

    def put(self, site: str, tensor: Tensor) -> None:
        """Take what this rank has of one site's tensor; all ranks of the group call this at the same time."""
        self.put_shard(site, *self._shards.of(site, tensor, self._announced(site).shape))

    def put_shard(self, site: str, local: Tensor, layout: Layout) -> None:
        """Take this rank's shard of one site's tensor, whose layout is known.

        Raises:
            CaptureError: The layout is not the one in which the archive stores the site.
        """
        batch, stored = self._announced(site), self._plan.site(site)
        if stored.column_shards > 1 and layout != Layout(
            FIRST_ROW_AXIS, (stored.one_column_shard.row_shape[0],) * stored.column_shards
        ):
            raise CaptureError(
                f"Site {site!r}{on_rank()} is stored in {stored.column_shards} column shards, and its layout here is "
                f"another: {layout}. Capture it without {named('gather', False)}."
            )
        if stored.column_shards > 1 or layout.dim is None:
            self._filler.put(site, by_position(site, local, *batch.shape))
        elif self._exchange is not None:
            self._move(site, local, layout, batch, self._exchange)

    def _announced(self, site: str) -> BatchRows:
        if self._batch is None:
            raise RuntimeError(f"rows of {site} came before their batch was announced")
        return self._batch

    def _move(self, site: str, local: Tensor, layout: Layout, batch: BatchRows, exchange: Exchange) -> None:
        """Send this rank's shard of every row to the rank that stores the row, and store the rows that arrive."""
        dtype, rank = torch_dtype(self._plan.site(site).dtype), exchange.rank
        places = list(self._filler.row_indexes())
        if not places:
            return
        to = [self._ownership.owner(site, shard) for shard, _ in places]
        if may_overflow(local.dtype, dtype):
            dtype = local.dtype  # so that the rank that stores the rows casts them, and counts what overflows
        outgoing = [self._picked(site, local, layout, at, batch, rank).to(dtype) for _, at in places]
        row = tuple(outgoing[0].shape[1:])
        mine = [(shard, at) for (shard, at), owner in zip(places, to, strict=True) if owner == rank]
        incoming = {
            source: [_shape_from(source, row, layout, at, batch) for _, at in mine]
            for source in range(exchange.n_ranks)
        }
        arrived = exchange(outgoing, to, incoming)
        for i, (shard, at) in enumerate(mine):
            shards = [arrived[source][i] for source in range(exchange.n_ranks)]
            rows = _joined(shards, layout, at, batch)
            self._filler.put_rows(site, shard, _widened(site, rows, self._plan.site(site).row_shape))

    def _picked(self, site: str, local: Tensor, layout: Layout, at: RowIndex, batch: BatchRows, rank: int) -> Tensor:
        """Return what this rank has of the rows of one shard, (rows, *row)."""
        dim = layout.dim or 0
        if is_pattern(site):
            if dim < FIRST_ROW_AXIS:
                raise CaptureError(
                    f"Site {site!r}{on_rank()} is split by query or example, so its keys cannot be placed: choose "
                    "another site."
                )
            n_keys = min(local.shape[-1], self._plan.site(site).row_shape[-1])  # padding may add keys; no row has more
            template = local.new_empty((0, *local.shape[FIRST_ROW_AXIS:-1], n_keys), device="cpu")
            return at.gather_pattern(local, template, batch, batch.keys_of(site))
        if dim >= FIRST_ROW_AXIS:
            return at.gather(local.flatten(0, 1), local.dtype)
        examples, positions = np.divmod(at.source[_rows_held_by(rank, layout, at, batch)], batch.n_positions)
        start = sum(layout.sizes[:rank])
        examples, positions = (examples - start, positions) if dim == 0 else (examples, positions - start)
        index = torch.from_numpy(examples * local.shape[1] + positions).to(local.device)
        return local.flatten(0, 1).index_select(0, index)


def _rows_held_by(rank: int, layout: Layout, at: RowIndex, batch: BatchRows) -> Indices:
    """Return the rows of a row index of which a rank has something."""
    everything = np.arange(len(at.source))
    if layout.dim is None or layout.dim >= FIRST_ROW_AXIS:
        return everything
    along = np.divmod(at.source, batch.n_positions)[layout.dim]
    start = sum(layout.sizes[:rank])
    return everything[(along >= start) & (along < start + layout.sizes[rank])]


def _shape_from(rank: int, row: tuple[int, ...], layout: Layout, at: RowIndex, batch: BatchRows) -> tuple[int, ...]:
    """Return the shape of what a rank sends of the rows of a row index."""
    n_rows = len(_rows_held_by(rank, layout, at, batch))
    if layout.dim is None or layout.dim < FIRST_ROW_AXIS:
        return (n_rows, *row)
    axis = layout.dim - FIRST_ROW_AXIS
    return (n_rows, *row[:axis], layout.sizes[rank], *row[axis + 1 :])


def _joined(shards: list[Tensor], layout: Layout, at: RowIndex, batch: BatchRows) -> Tensor:
    """Return full rows, made of what each rank had of them."""
    if layout.dim is None or layout.dim >= FIRST_ROW_AXIS:
        return torch.cat(shards, (layout.dim or 0) - FIRST_ROW_AXIS + 1)
    rows = shards[0].new_empty((len(at.source), *shards[0].shape[1:]))
    for rank, shard in enumerate(shards):
        rows[_rows_held_by(rank, layout, at, batch)] = shard
    return rows


def _widened(site: str, rows: Tensor, row_shape: tuple[int, ...]) -> Tensor:
    """Pad the keys of patterns with zeros, up to the longest example."""
    if not is_pattern(site) or tuple(rows.shape[1:]) == row_shape:
        return rows.view(len(rows), *row_shape)  # a scalar per position is a row of width 1
    wide = rows.new_zeros((len(rows), *row_shape))
    wide[..., : rows.shape[-1]] = rows
    return wide
