"""Batches of rows for training on activations: shuffled, divided over ranks and workers, resumable after any batch.

The rows of a batch follow from the archive, the settings and the epoch alone (`residua.analysis.loader.order`), so the
number of batches so far is all that a stopped training has to keep.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from residua.analysis.loader.order import (
    ChosenRows,
    EpochOrder,
    block_height,
    n_batches,
    resumed_worker,
    row_bytes,
    worker_slice,
)
from residua.analysis.loader.shuffle_buffer import ShuffleBuffer
from residua.analysis.rows.columns import lookups
from residua.store.base.errors import AnalysisError, few
from residua.store.read.archive import Archive
from residua.store.read.array import as_tensor
from residua.store.selection.row_filter import RowFilter

Batch: TypeAlias = dict[str, Tensor]

_OVERHEAD_BYTES = 16  # per row: its number and its place in the buffer
_UNSHUFFLED_BLOCKS = 16  # of the buffer without shuffling; enough to make reading cheap


class Loader(IterableDataset[Batch]):
    """Batches of an archive's rows: ``{site: values, ..., "row": row numbers}``. Made by `Archive.loader`.

    All ranks and workers together return every captured row once per epoch. The last batch of a rank may be short, and
    ranks may differ by one row and so by one batch. With `drop_last` all batches are full, all ranks have equally many,
    and each epoch leaves out other rows.

    First all blocks of rows are put in random order, then all rows within a buffer. A block is a chunk of 512 KiB, or
    less for sites stored raw. ``docs/analysis.md`` compares this with a full shuffle.

    Args:
        archive: The archive.
        sites: Sites of a batch, for example ``resid_post.3`` or ``["resid_post.*", "final"]``.
        batch_size: Rows of a batch.
        shuffle: Return rows in random order, different in each epoch; see `set_epoch`.
        seed: Random seed of the order; not negative.
        where: Which rows, for example ``position > 0 and label == "code"``; see `residua.store.selection`.
        columns: Further values of a batch: ``token``, ``position``, ``example``, and numeric columns of the example
            table. Tokens and positions are kept in memory, 4 bytes a row.
        dtype: Type to cast the values to; by default the stored type.
        buffer_bytes: Most bytes of rows in memory at a time, in each worker.
        drop_last: Leave out the rows that do not fill a batch.
        num_workers: Processes that read; 0 reads in this process. Your own `DataLoader` works as well
            (``DataLoader(loader, batch_size=None, num_workers=2)``), but then `state_dict` needs its numbers.
        rank: Number of this rank; by default that of `torch.distributed`, if it is initialised.
        world_size: Number of ranks; likewise.
        raw_block_bytes: Most bytes of a block if all sites are stored raw. Smaller blocks mix better, larger ones are
            read faster.

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
        raw_block_bytes: int = 128 * 1024,
    ) -> None:
        self._archive = archive
        self.sites = archive.select(sites)
        self.num_workers = num_workers
        self.epoch = 0
        self._dtype = dtype
        self._rank, self._world_size = _rank_of(rank, world_size)
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._batch_size = batch_size
        height = block_height(archive, self.sites, buffer_bytes=buffer_bytes, raw_block_bytes=raw_block_bytes)
        self._buffer_rows = buffer_bytes // (row_bytes(archive, self.sites) + _OVERHEAD_BYTES)
        if not 0 < batch_size <= self._buffer_rows or seed < 0 or num_workers < 0:
            raise AnalysisError(
                f"batches of {batch_size:,} rows were requested, with seed {seed} and {num_workers} workers, and a "
                f"buffer of {buffer_bytes:,} bytes, which holds {self._buffer_rows:,} rows: a batch needs at least one "
                "row and must fit into the buffer, and no number may be negative"
            )
        if not shuffle:
            self._buffer_rows = min(self._buffer_rows, max(batch_size, _UNSHUFFLED_BLOCKS * height))
        where = RowFilter.parse(where) if isinstance(where, str) else where
        self._chosen = ChosenRows(archive, height, where)
        names = ("row", *dict.fromkeys(columns))
        if set(names) & set(self.sites):
            raise AnalysisError(f"{sorted(set(names) & set(self.sites))} cannot be both site and column of a batch")
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
        """Set the epoch, which decides the order of rows. Setting the current epoch again changes nothing."""
        if epoch != self.epoch:
            self.epoch, self._taken, self._resume = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch, or, after `load_state_dict`, the remaining ones."""
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
        """Return the position of this rank, after the batch that was returned last, as plain numbers and texts.

        Args:
            taken: Batches of this epoch that were taken from your own `DataLoader`, which this object cannot see.
            num_workers: Workers of that `DataLoader`.
        """
        return {
            **self._settings,
            "epoch": self.epoch,
            "taken": self._taken if taken is None else taken,
            "num_workers": self.num_workers if num_workers is None else num_workers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was made, with the same batches as without the stop.

        Raises:
            AnalysisError: The state is from a loader with other settings, or of another archive.
        """
        other = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._settings.items()
            if state.get(name) != value
        ]
        counts: list[Any] = [state.get(name) for name in ("epoch", "taken", "num_workers")]
        if other or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise AnalysisError(
                f"this loader cannot continue from that state: {'; '.join(other) or 'it counts no batches'}: create "
                "the loader with the earlier settings, or start the epoch again"
            )
        self.epoch, self._taken, workers = counts
        self._resume, self._resume_workers = self._taken, max(1, workers)

    def _batches(self, worker: int, n_workers: int, taken: int) -> Iterator[Batch]:
        """Yield the batches of one of `n_workers` workers that follow after the rank has `taken` some."""
        if taken and n_workers != self._resume_workers:
            raise AnalysisError(
                f"the epoch was begun with {self._resume_workers} workers and cannot continue with {n_workers}, which "
                f"changes the order of rows: use {self._resume_workers} workers, or start the epoch again"
            )
        worker, first = resumed_worker(worker, n_workers, taken)
        n_rows, size = self._chosen.n_rows, self._batch_size
        ranks = (self._rank, self._world_size)
        places = worker_slice(n_rows, size, *ranks, worker, n_workers, drop_last=self._drop_last)
        seed = [self._seed, self.epoch]
        buffer = ShuffleBuffer(
            self._archive,
            self.sites,
            EpochOrder(self._chosen, np.random.default_rng(seed) if self._shuffle else None),
            places,
            height=self._buffer_rows,
            seed=[*seed, self._rank, worker] if self._shuffle else None,
        )
        for start in range(first * size, len(places), size):
            rows, values = buffer.take(start, min(start + size, len(places)))
            batch = {site: as_tensor(array) for site, array in values.items()}
            if self._dtype is not None:
                batch = {site: tensor.to(self._dtype) for site, tensor in batch.items()}
            batch["row"] = torch.from_numpy(rows)
            for name, lookup in self._columns.items():
                batch[name] = as_tensor(lookup(rows))
            yield batch


def _rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and number of ranks, as given or from `torch.distributed`."""
    if (rank is None) != (world_size is None):
        raise AnalysisError(f"rank {rank} of {world_size} was requested: give both numbers, or neither")
    if rank is None or world_size is None:
        distributed = torch.distributed
        is_used = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if is_used else (0, 1)
    if not 0 <= rank < world_size:
        raise AnalysisError(f"rank {rank} of {world_size} was requested: ranks count from 0")
    return rank, world_size
