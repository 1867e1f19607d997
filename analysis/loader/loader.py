"""Batches of rows for training on activations: shuffled, divided over ranks and workers, resumable after any batch.

The rows of a batch follow from the archive, the settings and the epoch alone (`residua.analysis.loader.order`), so the
number of batches so far is all that a stopped training has to keep. In a worker process it is the number of that
worker's own batches, which is what torchdata's `StatefulDataLoader` keeps.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
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
from residua.analysis.rows.groups import example_groups
from residua.analysis.rows.held_out import held_out_groups
from residua.store.base.errors import AnalysisError, few
from residua.store.read.archive import Archive
from residua.store.read.array import as_tensor
from residua.store.read.remote_archive import RemoteArchive
from residua.store.selection.row_filter import RowFilter

Batch: TypeAlias = dict[str, Tensor]

_OVERHEAD_BYTES = 16  # per row: its number and its place in the buffer
_UNSHUFFLED_BLOCKS = 16  # of the buffer without shuffling; enough to make reading cheap
_DIVIDERS = ("accelerate.data_loader", "transformers.trainer_pt_utils")  # modules that divide batches over processes


class _Resume(NamedTuple):
    """Where to continue.

    Attributes:
        taken: Batches taken, of the rank or of the stream.
        n_workers: Workers that made them.
        stream: The worker whose batches `taken` counts; None if it counts those of the rank.
    """

    taken: int
    n_workers: int
    stream: int | None


class LoaderOptions(TypedDict, total=False):
    """The settings of a `Loader`, as named arguments of `Archive.loader`."""

    shuffle: bool
    seed: int
    where: str | RowFilter | None
    columns: Iterable[str]
    dtype: torch.dtype | None
    buffer_bytes: int
    drop_last: bool
    num_workers: int
    rank: int | None
    world_size: int | None
    split: Literal["train", "test"] | None
    test_fraction: float
    split_seed: int
    group: str | None
    raw_block_bytes: int


class Loader(IterableDataset[Batch]):
    """Batches of an archive's rows: ``{site: values, ..., "row": row numbers}``. Made by `Archive.loader`.

    All ranks and workers together return every captured row once per epoch; rank and worker are looked up whenever an
    iteration starts. So use it as it is, in a `DataLoader` of torch (``batch_size=None``), or in torchdata's
    `StatefulDataLoader`. What divides batches over processes once more, such as `accelerate.prepare`, is refused.

    The last batch of a rank may be short, and ranks may differ by one row and so by one batch. With `drop_last` all
    batches are full, all ranks have equally many, and each epoch leaves out other rows.

    First all blocks of rows are put in random order, then all rows within a buffer. A block is a chunk of 512 KiB, or
    less for sites stored raw. ``docs/analysis.md`` compares this with a full shuffle.

    Args:
        archive: The archive.
        sites: Sites of a batch, for example ``resid_post.3`` or ``["resid_post.*", "final"]``.
        batch_size: Rows of a batch.
        shuffle: Return rows in random order, different in each epoch; see `set_epoch`.
        seed: Random seed of the order; not negative.
        where: Which rows, for example ``position > 0 and label == "code"``; see `residua.store.selection`.
        columns: Further values of a batch: ``token``, ``position``, ``example``, those of images (``modality``,
            ``image``, ``view``, ``patch_row``, ``patch_column``), and numeric columns of the example table. Those of
            rows are kept in memory, 4 bytes a row.
        dtype: Type to cast the values to; by default the stored type.
        buffer_bytes: Most bytes of rows in memory at a time, in each worker.
        drop_last: Leave out the rows that do not fill a batch.
        num_workers: Processes that read; 0 reads in this process. Your own `DataLoader` works as well
            (``DataLoader(loader, batch_size=None, num_workers=2)``), but then it has to be told what you took:
            ``loader.state_dict(taken=batches, num_workers=2)``.
        rank: Number of this rank; by default that of `torch.distributed`, if it is initialised when an iteration
            starts.
        world_size: Number of ranks; likewise. 0 and 1 give every process all rows.
        split: ``train`` or ``test``: rows of the documents that are not held out, or that are. The windows of a
            document, and documents of equal content, stay together (`residua.analysis.rows.groups`).
        test_fraction: Share of the documents in ``test``.
        split_seed: Random seed of the split; `seed` does not change it.
        group: What else stays together: a column such as ``author``; ``source_index``: documents alone; ``example``:
            each example for itself.
        raw_block_bytes: Most bytes of a block if all sites are stored raw. Smaller blocks mix better, larger ones are
            read faster.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: The settings do not fit each other or the archive.
        PlanError: Finite values of a site were lost when it was stored.
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
        split: Literal["train", "test"] | None = None,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        group: str | None = None,
        raw_block_bytes: int = 128 * 1024,
    ) -> None:
        self._archive = archive
        self.sites = archive.select(sites)
        archive.refuse_losses(self.sites, "a loader")
        self.num_workers = num_workers
        self.epoch = 0
        self._dtype = dtype
        self._given_place = _checked_place(rank, world_size)
        self._sent_place = 0, 1  # of the process that sent this object to a worker
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
        self._chosen = ChosenRows(
            archive, height, where, _examples_of(archive, split, test_fraction, split_seed, group)
        )
        names = ("row", *dict.fromkeys(columns))
        if set(names) & set(self.sites):
            raise AnalysisError(f"{sorted(set(names) & set(self.sites))} cannot be both site and column of a batch")
        self._columns = lookups(archive, names[1:])
        self._settings: Mapping[str, object] = {
            "plan": archive.plan.digest,
            "n_rows": self._chosen.n_rows,
            "where": where.text if where else None,
            "split": None if split is None else [split, test_fraction, split_seed, group],
            "batch_size": batch_size,
            "buffer_rows": self._buffer_rows,
            "block_rows": height,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
        }
        self._taken = 0
        self._stream: int | None = None  # in a worker process, whose batches `_taken` counts
        self._resume: _Resume | None = None

    def __repr__(self) -> str:
        return f"<Loader of {few(self.sites)} from {self._archive.place} in batches of {self._batch_size:,} rows>"

    def __len__(self) -> int:
        """Return the number of batches of one epoch on this rank."""
        return n_batches(self._chosen.n_rows, self._batch_size, *self._place(), drop_last=self._drop_last)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker process, which has no `torch.distributed` of its own to ask."""
        self._refuse_dividers()
        return {**self.__dict__, "_sent_place": self._place()}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of rows. Setting the current epoch again changes nothing."""
        if epoch != self.epoch:
            self.epoch, self._taken, self._resume = epoch, 0, None

    def __iter__(self) -> Iterator[Batch]:
        """Return the batches of the epoch, or, after `load_state_dict`, the remaining ones.

        Raises:
            AnalysisError: The epoch was begun with another number of workers, the batches would be divided over
                processes twice, or a process group appeared after the first batch.
        """
        self._refuse_dividers()
        info, resume = get_worker_info(), self._resume
        n_workers = self.num_workers if info is None else info.num_workers
        if resume is not None and resume.taken and resume.n_workers != max(1, n_workers):
            raise AnalysisError(
                f"the epoch was begun with {resume.n_workers} workers and cannot continue with {max(1, n_workers)}, "
                f"which changes the order of rows: use {resume.n_workers} workers, or start the epoch again"
            )
        taken = 0 if resume is None else resume.taken
        if info is None:
            batches = self._in_workers(n_workers) if n_workers else self._batches(0, 1, taken)
        else:
            if resume is None or resume.stream is None:
                self._stream, taken = resumed_worker(info.id, n_workers, taken)
            else:
                self._stream = resume.stream
            batches = self._batches(self._stream, n_workers, taken)
        self._taken, self._resume = taken, None
        return self._counted(batches)

    def _in_workers(self, n_workers: int) -> Iterator[Batch]:
        """Return the batches of worker processes, which find `_resume` in their copies of this object."""
        context = "forkserver" if isinstance(self._archive, RemoteArchive) else None  # forked, none could read there
        return iter(DataLoader(self, batch_size=None, num_workers=n_workers, multiprocessing_context=context))

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        begun = self._place()
        for batch in batches:
            if (now := self._place()) != begun and now[1] > 1:
                raise AnalysisError(
                    f"the iteration began as rank {begun[0]} of {begun[1]}, and torch.distributed now says rank "
                    f"{now[0]} of {now[1]}, whose rows are others: begin it after init_process_group, or create the "
                    "loader with rank= and world_size="
                )
            self._taken += 1
            yield batch

    def state_dict(self, *, taken: int | None = None, num_workers: int | None = None) -> dict[str, Any]:
        """Return the position of this rank, after the batch that was returned last, as plain numbers and texts.

        Args:
            taken: Batches of this epoch that were taken from your own `DataLoader`, which this object cannot see.
            num_workers: Workers of that `DataLoader`.
        """
        info = get_worker_info()
        own = self.num_workers if info is None else info.num_workers
        return {
            **self._all_settings(),
            "epoch": self.epoch,
            "taken": self._taken if taken is None else taken,
            "num_workers": own if num_workers is None else num_workers,
            **({} if info is None else {"worker": info.id if self._stream is None else self._stream}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was made, with the same batches as without the stop.

        Raises:
            AnalysisError: The state is from a loader with other settings, or of another archive, or of one worker and
                this is none.
        """
        other = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._all_settings().items()
            if state.get(name) != value
        ]
        worker: Any = state.get("worker")
        if worker is not None and get_worker_info() is None:
            other.append(f"it is the state of worker {worker!r}, to be loaded by a worker of StatefulDataLoader")
        counts: list[Any] = [state.get(name) for name in ("epoch", "taken", "num_workers")]
        if other or not all(isinstance(count, int) and count >= 0 for count in [*counts, worker or 0]):
            raise AnalysisError(
                f"this loader cannot continue from that state: {'; '.join(other) or 'it counts no batches'}: create "
                "the loader with the earlier settings, or start the epoch again"
            )
        self.epoch, self._taken, n_workers = counts
        self._stream = worker
        self._resume = _Resume(self._taken, max(1, n_workers), worker)

    def _all_settings(self) -> dict[str, object]:
        rank, world_size = self._place()
        return {**self._settings, "rank": rank, "world_size": world_size}

    def _place(self) -> tuple[int, int]:
        """Return rank and number of ranks, as given, or as `torch.distributed` says now."""
        if self._given_place is not None:
            return self._given_place
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return (0, 1) if get_worker_info() is None else self._sent_place

    def _refuse_dividers(self) -> None:
        """Raise AnalysisError if the caller divides batches over the processes that the rows are divided over.

        The caller does not say so, but its module is among those that are running; those of the parent are among the
        frames of a forked worker, too.
        """
        if self._given_place is not None or self._place()[1] == 1:
            return
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            name = frame.f_globals.get("__name__")
            if name in _DIVIDERS:
                raise AnalysisError(
                    f"{name} divides the batches over {self._place()[1]} processes, but the loader has given each "
                    "process rows of its own already: use the loader without prepare, and move batches to the device "
                    "yourself; or create it with rank=0, world_size=1, so that only accelerate divides them"
                )

    def _batches(self, worker: int, n_workers: int, first: int) -> Iterator[Batch]:
        """Yield the batches of one of `n_workers` workers after its `first` ones."""
        n_rows, size = self._chosen.n_rows, self._batch_size
        rank, world_size = self._place()
        places = worker_slice(n_rows, size, rank, world_size, worker, n_workers, drop_last=self._drop_last)
        seed = [self._seed, self.epoch]
        buffer = ShuffleBuffer(
            self._archive,
            self.sites,
            EpochOrder(self._chosen, np.random.default_rng(seed) if self._shuffle else None),
            places,
            height=self._buffer_rows,
            seed=[*seed, rank, worker] if self._shuffle else None,
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


def _examples_of(
    archive: Archive, split: str | None, test_fraction: float, seed: int, group: str | None
) -> npt.NDArray[np.bool_] | None:
    """Return which examples a split has; None for all."""
    if split not in (None, "train", "test"):
        raise AnalysisError(f"the split {split!r} is unknown: choose train or test, or none for all rows")
    if split is None:
        return None
    is_test = held_out_groups(example_groups(archive, group), fraction=test_fraction, seed=seed)
    return is_test if split == "test" else ~is_test


def _checked_place(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Return rank and number of ranks as given; None if they are not."""
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise AnalysisError(f"rank {rank} of {world_size} was requested: give both numbers, or neither")
    if not 0 <= rank < world_size:
        raise AnalysisError(f"rank {rank} of {world_size} was requested: ranks count from 0")
    return rank, world_size
