"""Where the rows of a replica go that several ranks hold together: to the one rank that stores them.

A tensor that every rank has is copied by the rank that stores it, and by no other. One that is split goes through one
`Exchange`, so that whole rows arrive where they are stored. Sums that are not yet added up are added up first.

Legend: `B` examples in the batch, `T` padded positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from residua.capture.buffers.host_buffers import Staging, torch_dtype
from residua.capture.buffers.row_index import FIRST_ROW_AXIS, BatchRows, Indices, Placement, by_position
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards
from residua.capture.runtime.collectives import Exchange, on_rank
from residua.capture.scheduling.ownership import Ownership
from residua.store.base.errors import CaptureError
from residua.store.format.plan import Plan


class _Piece(NamedTuple):
    """What one rank has of the rows of one shard: which of them, and how long their split axis is there."""

    rows: Indices
    size: int


class RowExchange:
    """Takes what this rank has of each site; the `RowSink` of a split model.

    Args:
        plan: What is stored.
        staging: Where this rank's share goes.
        ownership: Who stores what.
        parts: Finds out how the sites lie.
        group: The ranks over which activations may be split; None where this rank has whole ones.
    """

    def __init__(
        self, plan: Plan, staging: Staging, ownership: Ownership, parts: LocalShards, group: ProcessGroup | None
    ) -> None:
        self._plan = plan
        self._staging = staging
        self._ownership = ownership
        self._exchange = None if group is None else Exchange(group)
        self._parts = parts
        self._batch: BatchRows | None = None

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to others."""
        return 0 if self._exchange is None else self._exchange.sent_bytes

    def begin(self, batch: BatchRows) -> None:
        """Announce the rows of the next forward pass."""
        self._batch = batch
        self._staging.begin(batch)

    def put(self, site: str, tensor: Tensor) -> None:
        """Take what this rank has of one site's tensor; every rank of the group takes its own at the same time."""
        self.put_part(site, *self._parts.of(site, tensor, self._announced(site).shape))

    def put_part(self, site: str, local: Tensor, layout: Layout) -> None:
        """Take this rank's part of one site's tensor, of which it is known how the parts lie."""
        batch = self._announced(site)
        if self._plan.site(site).column_shards > 1:
            self._check_part(site, layout)
            self._staging.put(site, by_position(site, local, *batch.shape))
        elif layout.dim is None:
            self._staging.put(site, by_position(site, local, *batch.shape))
        elif self._exchange is not None:
            self._move(site, local, layout, batch, self._exchange)

    def _announced(self, site: str) -> BatchRows:
        if self._batch is None:
            raise RuntimeError(f"rows of {site} came before their batch was announced")
        return self._batch

    def _check_part(self, site: str, layout: Layout) -> None:
        stored = self._plan.site(site)
        if layout != Layout(FIRST_ROW_AXIS, (stored.part.row_shape[0],) * stored.column_shards):
            raise CaptureError(
                f"Site {site!r}{on_rank()} is stored in {stored.column_shards} parts of each row, and lies otherwise "
                f"here: {layout}. Capture it again without --no-gather."
            )

    def _move(self, site: str, local: Tensor, layout: Layout, batch: BatchRows, exchange: Exchange) -> None:
        """Send this rank's part of every row to who stores it, and store what arrives."""
        dtype, rank = torch_dtype(self._plan.site(site).dtype), exchange.rank
        places = list(self._staging.placements())
        if not places:
            return
        to = [self._ownership.owner(site, shard) for shard, _ in places]
        outgoing = [self._picked(site, local, layout, at, batch, rank).to(dtype) for _, at in places]
        row = tuple(outgoing[0].shape[1:])
        mine = [(shard, at) for (shard, at), owner in zip(places, to, strict=True) if owner == rank]
        incoming = {
            source: [self._shape(self._piece(layout, at, batch, source), row, layout) for _, at in mine]
            for source in range(exchange.n_ranks)
        }
        arrived = exchange(outgoing, to, incoming)
        for i, (shard, at) in enumerate(mine):
            parts = [arrived[source][i] for source in range(exchange.n_ranks)]
            rows = self._joined(parts, layout, at, batch)
            self._staging.put_rows(site, shard, _widened(site, rows, self._plan.site(site).row_shape))

    def _piece(self, layout: Layout, at: Placement, batch: BatchRows, rank: int) -> _Piece:
        """Return which rows of a placement a rank has something of, and how much."""
        everything = np.arange(len(at.source))
        if layout.dim is None or layout.dim >= FIRST_ROW_AXIS:
            return _Piece(everything, layout.sizes[rank])
        along = np.divmod(at.source, batch.n_positions)[layout.dim]
        start = sum(layout.sizes[:rank])
        inside = (along >= start) & (along < start + layout.sizes[rank])
        return _Piece(everything[inside], layout.sizes[rank])

    def _picked(self, site: str, local: Tensor, layout: Layout, at: Placement, batch: BatchRows, rank: int) -> Tensor:
        """Return what this rank has of the rows of one shard, (rows, *row)."""
        dim = layout.dim or 0
        if site.startswith("pattern."):
            if dim < FIRST_ROW_AXIS:
                raise CaptureError(f"Site {site!r}{on_rank()} is split by query or example: its keys cannot be placed.")
            n_keys = min(local.shape[-1], self._plan.site(site).row_shape[-1])  # none has more, whatever the padding
            template = local.new_empty((0, *local.shape[FIRST_ROW_AXIS:-1], n_keys), device="cpu")
            return at.gather_pattern(local, template, batch)
        if dim >= FIRST_ROW_AXIS:
            return at.gather(local.flatten(0, 1), local.dtype)
        examples, positions = np.divmod(at.source[self._piece(layout, at, batch, rank).rows], batch.n_positions)
        start = sum(layout.sizes[:rank])
        examples, positions = (examples - start, positions) if dim == 0 else (examples, positions - start)
        index = torch.from_numpy(examples * local.shape[1] + positions).to(local.device)
        return local.flatten(0, 1).index_select(0, index)

    def _shape(self, piece: _Piece, row: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        if layout.dim is None or layout.dim < FIRST_ROW_AXIS:
            return (len(piece.rows), *row)
        axis = layout.dim - FIRST_ROW_AXIS
        return (len(piece.rows), *row[:axis], piece.size, *row[axis + 1 :])

    def _joined(self, parts: list[Tensor], layout: Layout, at: Placement, batch: BatchRows) -> Tensor:
        """Return the whole rows of one shard out of what each rank had of them."""
        if layout.dim is None or layout.dim >= FIRST_ROW_AXIS:
            return torch.cat(parts, (layout.dim or 0) - FIRST_ROW_AXIS + 1)
        rows = parts[0].new_empty((len(at.source), *parts[0].shape[1:]))
        for source, part in enumerate(parts):
            rows[self._piece(layout, at, batch, source).rows] = part
        return rows


def _widened(site: str, rows: Tensor, row_shape: tuple[int, ...]) -> Tensor:
    """Fill the keys of patterns up with zeros, to those of the longest example."""
    if not site.startswith("pattern.") or tuple(rows.shape[1:]) == row_shape:
        return rows.view(len(rows), *row_shape)  # a scalar a position is a row of width 1
    wide = rows.new_zeros((len(rows), *row_shape))
    wide[..., : rows.shape[-1]] = rows
    return wide
