"""Batches of rows for training on activations: shuffled, divided over ranks and workers, resumable after any batch.

The rows of a batch follow from the archive, the settings and the epoch alone (`residua.analysis.loader.order`), so the
number of batches so far is all that a stopped training has to keep. In a worker process it is the number of that
worker's own batches, which is what torchdata's `StatefulDataLoader` keeps. With other ranks or workers, the rest of the
epoch is divided anew (`residua.analysis.loader.division`).
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from residua.analysis.loader.division import (
    Batching,
    Division,
    Point,
    RestOfEpoch,
    Resume,
    State,
    past_to_json,
    resume_of,
)
from residua.analysis.loader.normalisation import Kind, Normalisation, checked_kind, normalisation
from residua.analysis.loader.order import (
    ChosenRows,
    EpochOrder,
    Order,
    Source,
    block_height,
    resumed_worker,
    row_bytes,
    worker_slice,
)
from residua.analysis.loader.shuffle_buffer import ShuffleBuffer
from residua.analysis.rows.columns import lookups
from residua.analysis.rows.groups import example_groups
from residua.analysis.rows.held_out import held_out_groups
from residua.analysis.support.device import Batch, checked_device, on_device
from residua.store.base.errors import AnalysisError, few
from residua.store.base.sizes import Size, n_bytes
from residua.store.format.site_aliases import BySite
from residua.store.read.archive import Archive
from residua.store.read.array import as_tensor
from residua.store.selection.row_filter import RowFilter

_OVERHEAD_BYTES = 16  # per row: its number and its place in the buffer
_UNSHUFFLED_BLOCKS = 16  # of the buffer without shuffling; enough to make reading cheap
_LATER = ("chosen",)  # settings that states of earlier versions do not have
_DIVIDERS = ("accelerate.data_loader", "transformers.trainer_pt_utils")  # modules that divide batches over processes


class LoaderOptions(TypedDict, total=False):
    """The settings of a `Loader`, as named arguments of `Archive.loader`."""

    shuffle: bool
    seed: int
    where: str | RowFilter | None
    columns: Iterable[str]
    epochs: int | None
    normalise: Kind | Mapping[str, Normalisation] | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    buffer_bytes: Size
    drop_last: bool
    num_workers: int
    rank: int | None
    world_size: int | None
    split: Literal["train", "test"] | None
    test_fraction: float
    split_seed: int
    group: str | None
    raw_block_bytes: Size | None


class Loader(IterableDataset[Batch]):
    """Batches of an archive's rows: ``{site: values, ..., "row": row numbers}``. Made by `Archive.loader`.

    All ranks and workers together return every captured row once per epoch; rank and worker are looked up whenever an
    iteration starts. So use it as it is, in a `DataLoader` of torch (``batch_size=None``), or in torchdata's
    `StatefulDataLoader`. What divides batches over processes once more, such as `accelerate.prepare`, is refused.

    The last batch of a rank may be short, and ranks may differ by one row and so by one batch. With `drop_last` all
    batches are full, all ranks have equally many, and each epoch leaves out other rows.

    First all blocks of rows are put in random order, then all rows within a buffer. A block is a chunk of 512 KiB, or
    less for sites stored raw in a folder. ``docs/loader.md`` compares this with a full shuffle.

    Args:
        archive: The archive.
        sites: Sites of a batch, for example ``resid_post.3`` or ``["resid_post.*", "final"]``.
        batch_size: Rows of a batch.
        shuffle: Return rows in random order, different in each epoch; see `set_epoch`.
        seed: Random seed of the order; not negative.
        where: Which rows, for example ``position > 0 and label == "code"``; see `residua.store.selection`.
        columns: Further values of a batch: ``token``, ``position``, ``example``, those of images (``modality``,
            ``image``, ``view``, ``patch_row``, ``patch_column``), and numeric columns of the example table. Those of
            rows are kept in memory, 4 bytes a row, and those with a value a token 8.
        epochs: Epochs of one iteration, each in an order of its own; None for batches without end.
        normalise: ``mean_norm``: scale a site so that the mean norm of its rows is the square root of their width, as
            Anthropic and SAELens do; ``standardise``: every channel to mean 0 and variance 1; ``whiten``: rows to mean
            0 and the identity as covariance. Or the `normalisation` of another loader, as for evaluation.
        dtype: Type to cast the values to; by default the stored type, or float32 if they are normalised.
        device: Where batches lie. On CUDA, the next one is copied from pinned memory meanwhile. In your own
            `DataLoader` with workers it has no effect: use its ``pin_memory``.
        buffer_bytes: Memory of the rows that are held at a time, in each worker: bytes, or a text such as ``1GiB``.
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
        raw_block_bytes: Size of a block at most if all sites are stored raw, written likewise. Smaller blocks mix
            better, larger ones are read faster. By default 128 KiB in a folder, and a chunk at an address, from where
            chunks come whole: smaller blocks would fetch them several times.

    Attributes:
        sites: Sites of a batch.
        epoch: The first epoch of an iteration.
        normalisation: The constants of each site; empty if values are not normalised.

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
        epochs: int | None = 1,
        normalise: Kind | Mapping[str, Normalisation] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffer_bytes: Size = 256 * 2**20,
        drop_last: bool = False,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        split: Literal["train", "test"] | None = None,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        group: str | None = None,
        raw_block_bytes: Size | None = None,
    ) -> None:
        self._archive = archive
        self.sites = archive.select(sites)
        archive.refuse_losses(self.sites, "a loader")
        self.num_workers = num_workers
        self.epoch = 0
        self._dtype, self._device = dtype, checked_device(device)
        self._given_place = _checked_place(rank, world_size)
        self._sent_place = 0, 1  # of the process that sent this object to a worker
        self._epochs = epochs
        sources = self._sources()
        buffer_size = n_bytes(buffer_bytes, "buffer_bytes")
        block_size = None if raw_block_bytes is None else n_bytes(raw_block_bytes, "raw_block_bytes")
        height = block_height(archive, [*sources.values()], buffer_bytes=buffer_size, raw_block_bytes=block_size)
        buffer_rows = buffer_size // (row_bytes([*sources.values()]) + _OVERHEAD_BYTES)
        if not 0 < batch_size <= buffer_rows or seed < 0 or num_workers < 0 or (epochs is not None and epochs < 1):
            raise AnalysisError(
                f"batches of {batch_size:,} rows were requested, with seed {seed}, {epochs} epochs and {num_workers} "
                f"workers, and a buffer of {buffer_size:,} bytes, which holds {buffer_rows:,} rows: a batch needs at "
                "least one row and must fit into the buffer, an iteration has at least one epoch, and no number may be "
                "negative"
            )
        if not shuffle:
            buffer_rows = min(buffer_rows, max(batch_size, _UNSHUFFLED_BLOCKS * height))
        self._batching = Batching(batch_size, buffer_rows, drop_last, seed if shuffle else None)
        where = RowFilter.parse(where) if isinstance(where, str) else where
        self._chosen = ChosenRows(
            archive, height, where, _examples_of(archive, split, test_fraction, split_seed, group)
        )
        names = ("row", *dict.fromkeys(columns))
        if set(names) & set(self.sites):
            raise AnalysisError(f"{sorted(set(names) & set(self.sites))} cannot be both site and column of a batch")
        self._columns = lookups(archive, names[1:], self._chosen.rows)
        self.normalisation = self.constants(normalise) if isinstance(normalise, str) else BySite(normalise or {})
        if self.normalisation and (lacking := set(self.sites) - set(self.normalisation)):
            raise AnalysisError(f"normalise= has no constants for {few(sorted(lacking))}: give those of all sites")
        self._settings: Mapping[str, object] = {
            "plan": archive.plan.digest,
            "n_rows": self._chosen.n_rows,
            "where": where.text if where else None,
            "chosen": self._chosen.checksum,
            "split": None if split is None else [split, test_fraction, split_seed, group],
            "batch_size": batch_size,
            "buffer_rows": buffer_rows,
            "block_rows": height,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "normalise": sorted({each.kind for each in self.normalisation.values()}) or None,
        }
        self._point = Point()
        self._resume: Resume | None = None

    def __repr__(self) -> str:
        return (
            f"<Loader of {few(self.sites)} from {self._archive.place} in batches of {self._batching.batch_size:,} rows>"
        )

    def __len__(self) -> int:
        """Return the number of batches of one iteration on this rank.

        Raises:
            TypeError: It has no end.
        """
        if self._epochs is None:
            raise TypeError(f"this loader has no end: an epoch has {self.batches_per_epoch:,} batches")
        return self.batches_per_epoch * self._epochs

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of one full epoch on this rank."""
        return self._batching.n_batches(self._chosen.n_rows, *self._place())

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self._batching.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether rows that fill no batch are left out."""
        return self._batching.drop_last

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the further values of a batch."""
        return tuple(self._columns)

    @property
    def n_rows(self) -> int:
        """Number of rows of an epoch, of all ranks together."""
        return self._chosen.n_rows

    def row_shape(self, site: str) -> tuple[int, ...]:
        """Return the shape of a row of one of the sites."""
        return self._sources()[site].shape[1:]

    def settings(self) -> dict[str, Any]:
        """Return what decides the batches, as plain numbers and texts: the archive, the sites, and how rows come."""
        return {"archive": self._archive.place, "sites": [*self.sites], **self._settings}

    @property
    def is_endless(self) -> bool:
        """Whether batches come without end."""
        return self._epochs is None

    def constants(self, kind: Kind) -> dict[str, Normalisation]:
        """Return the constants that normalise each site, from up to 65,536 of this loader's rows.

        Args:
            kind: ``mean_norm``, ``standardise`` or ``whiten``.

        Raises:
            AnalysisError: The kind is unknown, or a site has no finite rows.
        """
        return BySite({site: self._constants(site, source, kind) for site, source in self._sources().items()})

    def _constants(self, site: str, source: Source, kind: Kind) -> Normalisation:
        return normalisation(site, source, self._chosen, checked_kind(kind))

    def shares_rows(self, other: "Loader") -> bool:
        """Return whether a row can come from this loader and from `other`, both of one archive."""
        return self._settings["plan"] == other._settings["plan"] and self._chosen.shares_rows(other._chosen)

    def _sources(self) -> Mapping[str, Source]:
        """Return where the values of each site are read."""
        return {site: self._archive[site] for site in self.sites}

    @property
    def _is_remote(self) -> bool:
        return self._archive.is_remote

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker process, which has no `torch.distributed` of its own to ask."""
        self._refuse_dividers()
        return {**self.__dict__, "_sent_place": self._place()}

    def set_epoch(self, epoch: int) -> None:
        """Set the first epoch of an iteration; an epoch decides the order of rows. The one it is in changes nothing."""
        if epoch not in (self.epoch, self.epoch + self._current().passed):
            self.epoch, self._point, self._resume = epoch, Point(), None

    def __iter__(self) -> Iterator[Batch]:
        """Return the batches of the epoch or epochs, or, after `load_state_dict`, the remaining ones.

        Raises:
            AnalysisError: The states that were loaded do not say what is left for this rank or worker, no batch is
                full, the batches would be divided over processes twice, or a process group appeared after the first
                batch.
        """
        self._refuse_dividers()
        info, resume = get_worker_info(), self._resume
        n_workers = max(1, self.num_workers if info is None else info.num_workers)
        if self._epochs != 1 and not self.batches_per_epoch:
            raise AnalysisError(
                f"the {self._chosen.n_rows:,} rows fill no batch of {self._batching.batch_size:,} rows on each rank: "
                "choose smaller batches, or drop_last=False"
            )
        point = Point() if resume is None else resume.at(*self._place(), n_workers)
        if info is not None and point.stream is None:
            stream, taken = resumed_worker(info.id, n_workers, point.taken)
            point = point._replace(stream=stream, taken=taken)
        batches = self._in_workers() if info is None and self.num_workers else self._batches(point, n_workers)
        self._point, self._resume = point, None
        return self._counted(batches if info is not None else on_device(batches, self._device), n_workers)

    def _in_workers(self) -> Iterator[Batch]:
        """Return the batches of worker processes, which find `_resume` in their copies of this object."""
        context = "forkserver" if self._is_remote else None  # forked, none could read there
        is_pinned = self._device is not None and self._device.type == "cuda"
        return iter(
            DataLoader(
                self,
                batch_size=None,
                num_workers=self.num_workers,
                multiprocessing_context=context,
                pin_memory=is_pinned,
            )
        )

    def _counted(self, batches: Iterator[Batch], n_workers: int) -> Iterator[Batch]:
        begun = self._place()
        for batch in batches:
            if (now := self._place()) != begun and now[1] > 1:
                raise AnalysisError(
                    f"the iteration began as rank {begun[0]} of {begun[1]}, and torch.distributed now says rank "
                    f"{now[0]} of {now[1]}, whose rows are others: begin it after init_process_group, or create the "
                    "loader with rank= and world_size="
                )
            self._point = self._after(self._point, 1, n_workers)
            yield batch

    def _after(self, point: Point, taken: int, n_workers: int) -> Point:
        """Return the point that is `taken` batches after `point`; the end of an epoch belongs to that epoch."""
        taken += point.taken
        while True:
            total = self._batching.n_batches(self._batching.rows_left(self._chosen.n_rows, point.past), *self._place())
            own = total if point.stream is None else len(range(point.stream, total, n_workers))
            if taken <= own or point.passed + 1 == self._epochs:
                return point._replace(taken=taken)
            stream = None if point.stream is None else (point.stream - total) % n_workers
            point, taken = Point(point.passed + 1, (), 0, stream), taken - own

    def _current(self) -> Point:
        """Return where this rank stands, or will continue with as many workers as before."""
        if self._resume is None:
            return self._point
        return self._resume.at(*self._place(), max(1, self._resume.num_workers))

    def state_dict(self, *, taken: int | None = None, num_workers: int | None = None) -> dict[str, Any]:
        """Return the position of this rank, after the batch that was returned last, as plain numbers and texts.

        Args:
            taken: Batches that were taken from your own `DataLoader`, which this object cannot see, since this epoch
                began or, with other ranks or workers, since it was resumed.
            num_workers: Workers of that `DataLoader`.
        """
        info, point, place = get_worker_info(), self._current(), self._place()
        own = self.num_workers if info is None else info.num_workers
        if self._resume is not None and num_workers is None:
            own = self._resume.num_workers
        n_workers = own if num_workers is None else num_workers
        if taken is not None:
            point = self._after(point._replace(taken=0), taken, max(1, n_workers))
        return {
            **self._settings,
            "rank": place[0],
            "world_size": place[1],
            "epoch": self.epoch + point.passed,
            "passed": point.passed,
            "divided": past_to_json(point.past),
            "taken": point.taken,
            "num_workers": n_workers,
            **({} if info is None else {"worker": info.id if point.stream is None else point.stream}),
        }

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue after the batch at which `state` was made: the batches that remain have the rows that nobody took.

        With as many ranks and workers they are exactly those that would have followed. With other numbers, give the
        states of all ranks, saved after the same step: the rows that nobody has taken are divided anew.

        Args:
            state: The state of this rank, or a list of the states of all ranks.

        Raises:
            AnalysisError: A state is from a loader with other settings, or of another archive, or of one worker and
                this is none; or those of other ranks are needed.
        """
        states: Sequence[State] = [state] if isinstance(state, Mapping) else state
        other = [
            f"{name} was {one.get(name)!r} and is {value!r}"
            for one in states[:1]
            for name, value in self._settings.items()
            if any(each.get(name, value if name in _LATER else None) != value for each in states)
        ]
        worker = states[0].get("worker") if states else None
        if worker is not None and get_worker_info() is None:
            other.append(f"it is the state of worker {worker!r}, to be loaded by a worker of StatefulDataLoader")
        if other:
            raise AnalysisError(
                f"this loader cannot continue from that state: {'; '.join(other)}: create the loader with the earlier "
                "settings, or start the epoch again"
            )
        epoch, resume = resume_of(states)
        resume.at(*self._place(), max(1, resume.num_workers))  # refuses what says too little
        self.epoch, self._resume = epoch - resume.passed, resume

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

    def _batches(self, point: Point, n_workers: int) -> Iterator[Batch]:
        """Yield the batches of one of `n_workers` workers after `point`, over the epochs that are left."""
        worker = point.stream or 0
        for passed in count(point.passed) if self._epochs is None else range(point.passed, self._epochs):
            past = point.past if passed == point.passed else ()
            order = self._order(self.epoch + passed, past)
            first = point.taken if passed == point.passed else 0
            yield from self._of_epoch(self.epoch + passed, order, len(past), (worker, n_workers), first)
            worker = (worker - self._batching.n_batches(order.n_rows, *self._place())) % n_workers

    def _order(self, epoch: int, past: Sequence[Division]) -> Order:
        """Return the order of the rows of an epoch that nobody took in the divisions `past`."""
        seed = self._batching.seed
        order: Order = EpochOrder(self._chosen, None if seed is None else np.random.default_rng([seed, epoch]))
        for generation, division in enumerate(past):
            order = RestOfEpoch(order, division, self._batching, epoch=epoch, generation=generation)
        return order

    def _of_epoch(
        self, epoch: int, order: Order, generation: int, stream: tuple[int, int], first: int
    ) -> Iterator[Batch]:
        """Yield the batches of one worker in one epoch after its `first` ones; `stream` is worker and workers."""
        size, (rank, world_size) = self._batching.batch_size, self._place()
        places = worker_slice(order.n_rows, size, rank, world_size, *stream, drop_last=self._batching.drop_last)
        buffer = ShuffleBuffer(
            self._sources(),
            order,
            places,
            height=self._batching.buffer_rows,
            seed=self._batching.buffer_seed(epoch, generation, rank, stream[0]),
        )
        for start in range(first * size, len(places), size):
            rows, values = buffer.take(start, min(start + size, len(places)))
            batch = BySite({site: self._prepared(site, as_tensor(array)) for site, array in values.items()})
            batch["row"] = torch.from_numpy(rows)
            for name, lookup in self._columns.items():
                batch[name] = as_tensor(lookup(rows))
            yield batch

    def _prepared(self, site: str, values: Tensor) -> Tensor:
        """Return the values of a batch, normalised and cast."""
        if self.normalisation:
            values = self.normalisation[site].apply(values)
        return values if self._dtype is None else values.to(self._dtype)


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
