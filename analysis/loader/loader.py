"""Batches of rows for training on activations: shuffled, divided, and resumable at any batch.

`residua.analysis.loader.order` says which rows a batch has. It follows from the archive, the settings and the epoch
alone, so nothing has to be remembered to go on after a batch but how many there were.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from residua.analysis.loader.chosen import ChosenRows, block_rows, row_bytes
from residua.analysis.loader.order import Order, n_batches, share_of, turn
from residua.analysis.loader.shuffle_buffer import ShuffleBuffer, Taken
from residua.analysis.rows.columns import lookups
from residua.store.base.errors import AnalysisError, few
from residua.store.read.archive import Archive
from residua.store.read.array import as_tensor
from residua.store.selection.row_filter import RowFilter

Batch: TypeAlias = dict[str, Tensor]

_BESIDE_BYTES = 16  # a row's number and its place in the buffer
_PLAIN_BLOCKS = 16  # without shuffling, a buffer has to make reading cheap and nothing else


class Loader(IterableDataset[Batch]):
    """Batches of an archive's rows: ``{site: values, ..., "row": row numbers}``. Made by `Archive.loader`.

    Every captured row comes once an epoch, over all ranks and workers together. Each rank's last batch may be short,
    and ranks whose number of rows differs (by one at most) may differ by one batch; with `drop_last` all batches are
    full, all ranks have as many, and the rows left over are others in every epoch.

    Rows are shuffled by blocks (a chunk of 512 KiB, or 128 KiB of sites stored raw): all blocks in random order, then
    all rows within a buffer. ``docs/analysis.md`` says how far that is from a full shuffle.

    Args:
        archive: The archive.
        sites: Sites of a batch, for example ``resid_post.3`` or ``["resid_post.*", "final"]``.
        batch_size: Rows of a batch.
        shuffle: Whether rows come in random order, another in every epoch; see `set_epoch`.
        seed: Of the order; not negative.
        where: Which rows, for example ``position > 0 and label == "code"``; see `residua.store.selection`.
        columns: What else a batch has: ``token``, ``position``, ``example``, and columns of numbers of the example
            table. Tokens and positions are kept in memory, 4 bytes a row.
        dtype: Type to cast the values to; by default they keep theirs.
        buffer_bytes: Most bytes of rows that are held at a time, in each worker.
        drop_last: Whether to leave out rows that make no full batch.
        num_workers: Processes that read; 0 reads in this one. A `DataLoader` of one's own works as well
            (``DataLoader(loader, batch_size=None, num_workers=2)``), but then `state_dict` has to be told.
        rank: Number of this rank; by default that of `torch.distributed`, where it is in use.
        world_size: Number of ranks; likewise.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: The settings do not fit each other or the archive.
    """

    def __init__(
        self,
        archive: Archive,
        sites: str | Iterable[str],
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        where: str | RowFilter | None = None,
        columns: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        buffer_bytes: int = 256 * 2**20,
        drop_last: bool = False,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._archive = archive
        self.sites = archive.select(sites)
        self.num_workers = num_workers
        self.epoch = 0
        self._dtype = dtype
        self._rank, self._world_size = _place(rank, world_size)
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._batch_size = batch_size
        height = block_rows(archive, self.sites, buffer_bytes)
        self._buffer_rows = buffer_bytes // (row_bytes(archive, self.sites) + _BESIDE_BYTES)
        if not 0 < batch_size <= self._buffer_rows or seed < 0 or num_workers < 0:
            raise AnalysisError(
                f"batches of {batch_size:,} rows were asked for, with seed {seed} and {num_workers} workers, and a "
                f"buffer of {buffer_bytes:,} bytes, which holds {self._buffer_rows:,} rows: a batch has at least one "
                "row and fits into the buffer, and none of the numbers is negative"
            )
        if not shuffle:
            self._buffer_rows = min(self._buffer_rows, max(batch_size, _PLAIN_BLOCKS * height))
        where = RowFilter.parse(where) if isinstance(where, str) else where
        self._chosen = ChosenRows(archive, height, where)
        names = ("row", *dict.fromkeys(columns))
        if set(names) & set(self.sites):
            raise AnalysisError(f"{sorted(set(names) & set(self.sites))} would be both site and column of a batch")
        self._columns = lookups(archive, names[1:])
        self._settings: Mapping[str, object] = {
            "plan": archive.plan.digest,
            "n_rows": self._chosen.n_rows,
            "where": where.text if where else None,
            "batch_size": batch_size,
            "buffer_rows": self._buffer_rows,
            "block_rows": height,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "rank": self._rank,
            "world_size": self._world_size,
        }
        self._taken = self._resume = 0
        self._resume_workers = max(1, num_workers)

    def __repr__(self) -> str:
        return f"<Loader of {few(self.sites)} from {self._archive.path} in batches of {self._batch_size:,} rows>"

    def __len__(self) -> int:
        """Return the number of batches of one epoch on this rank."""
        return n_batches(self._chosen.n_rows, self._batch_size, self._rank, self._world_size, drop_last=self._drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; each has an order of its own. The one that is going on stays where it is."""
        if epoch != self.epoch:
            self.epoch, self._taken, self._resume = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch, or, after `load_state_dict`, those that are left of it."""
        info = get_worker_info()
        if info is not None:
            yield from self._batches(info.id, info.num_workers, self._resume)
            return
        start = self._resume
        batches: Iterator[Batch] = self._batches(0, 1, start)
        if self.num_workers:
            batches = iter(DataLoader(self, batch_size=None, num_workers=self.num_workers))
        self._resume, self._taken = 0, start
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self, *, taken: int | None = None, num_workers: int | None = None) -> dict[str, Any]:
        """Return where this rank is, as plain numbers and texts: after the batch that was handed out last.

        Args:
            taken: Batches of this epoch that were taken out of a `DataLoader` of one's own, which this object does
                not see.
            num_workers: Workers of that `DataLoader`.
        """
        return {
            **self._settings,
            "epoch": self.epoch,
            "taken": self._taken if taken is None else taken,
            "num_workers": self.num_workers if num_workers is None else num_workers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which `state` was made: the next batches are the very ones that would have come.

        Raises:
            AnalysisError: The state is of a loader with other settings, or of another archive.
        """
        other = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._settings.items()
            if state.get(name) != value
        ]
        counts: list[Any] = [state.get(name) for name in ("epoch", "taken", "num_workers")]
        if other or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise AnalysisError(
                f"this loader cannot go on from that state: {'; '.join(other) or 'it counts no batches'}: make the "
                "loader with the settings of then, or start the epoch anew"
            )
        self.epoch, self._taken, workers = counts
        self._resume, self._resume_workers = self._taken, max(1, workers)

    def _batches(self, worker: int, n_workers: int, taken: int) -> Iterator[Batch]:
        """Yield the batches of one of `n_workers` workers that follow once the rank has taken some."""
        if taken and n_workers != self._resume_workers:
            raise AnalysisError(
                f"the epoch was begun with {self._resume_workers} workers and cannot go on with {n_workers}: the order "
                "of rows would be another"
            )
        part, first = turn(worker, n_workers, taken)
        ranks = (self._rank, self._world_size)
        n_rows, size = self._chosen.n_rows, self._batch_size
        share = share_of(n_rows, size, *ranks, part, n_workers, drop_last=self._drop_last)
        seed = [self._seed, self.epoch]
        order = Order(self._chosen.counts, np.random.default_rng(seed) if self._shuffle else None)
        buffer = ShuffleBuffer(
            self._archive,
            self.sites,
            self._chosen,
            order,
            share,
            height=self._buffer_rows,
            seed=[*seed, self._rank, part] if self._shuffle else None,
        )
        stop = share.stop - share.start
        for start in range(first * size, stop, size):
            yield self._batch(buffer.take(start, min(start + size, stop)))

    def _batch(self, taken: Taken) -> Batch:
        batch = {site: as_tensor(values) for site, values in taken.values.items()}
        if self._dtype is not None:
            batch = {site: values.to(self._dtype) for site, values in batch.items()}
        batch["row"] = torch.from_numpy(taken.rows)
        for name, lookup in self._columns.items():
            batch[name] = as_tensor(lookup(taken.rows))
        return batch


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and number of ranks, as given, or as `torch.distributed` has them."""
    if (rank is None) != (world_size is None):
        raise AnalysisError(f"rank {rank} of {world_size} was asked for: give both numbers, or none")
    if rank is None or world_size is None:
        distributed = torch.distributed
        is_used = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if is_used else (0, 1)
    if not 0 <= rank < world_size:
        raise AnalysisError(f"rank {rank} of {world_size} was asked for: ranks count from 0")
    return rank, world_size
