"""Where a loader stands in its epochs, and what is left of an epoch that is divided anew.

The rows of an epoch are divided over ranks and their workers once. When other ranks or workers continue, what nobody
has taken is put in a new order and divided again; the settings and the numbers of batches taken say which rows those
are. So a state is a few numbers, however often an epoch is divided.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from residua.analysis.loader.order import Numbers, Order, n_batches, rank_slice, worker_slice
from residua.analysis.loader.shuffle_buffer import shuffled_slots
from residua.store.base.errors import AnalysisError

State: TypeAlias = Mapping[str, Any]

_PIECE_ROWS = 4096  # of rows that lie apart, which are read as one array


class Division(NamedTuple):
    """How the rows of an epoch were divided, and how many of them were taken.

    Attributes:
        n_workers: Workers of a rank; 1 for a rank that reads itself.
        taken: Batches that each rank took, by rank.
    """

    n_workers: int
    taken: tuple[int, ...]


class Point(NamedTuple):
    """Where one rank, or one worker, stands.

    Attributes:
        passed: Epochs of the iteration that are over.
        past: How the epoch was divided before this division of its rest.
        taken: Batches of this division that were taken, of the rank or of the stream.
        stream: The worker whose batches `taken` counts; None if it counts those of the rank.
    """

    passed: int = 0
    past: tuple[Division, ...] = ()
    taken: int = 0
    stream: int | None = None


class Batching(NamedTuple):
    """The settings that decide which rows a batch has.

    Attributes:
        batch_size: Rows of a batch.
        buffer_rows: Rows of a shuffle buffer.
        drop_last: Whether rows that fill no batch are left out.
        seed: Random seed of the loader; None without shuffling.
    """

    batch_size: int
    buffer_rows: int
    drop_last: bool
    seed: int | None

    def buffer_seed(self, epoch: int, generation: int, rank: int, worker: int) -> list[int] | None:
        """Return the seed of one worker's buffers in the division number `generation` of an epoch."""
        if self.seed is None:
            return None
        return [self.seed, epoch, rank, worker, *([generation] if generation else [])]

    def n_batches(self, n_rows: int, rank: int, world_size: int) -> int:
        """Return the batches that a rank makes of `n_rows` rows that all ranks divide."""
        return n_batches(n_rows, self.batch_size, rank, world_size, drop_last=self.drop_last)

    def rows_left(self, n_rows: int, past: Sequence[Division]) -> int:
        """Return how many of the `n_rows` of an epoch nobody has taken in the divisions `past`."""
        for _, taken in past:
            world_size = len(taken)
            n_rows -= sum(
                min(batches * self.batch_size, len(rank_slice(n_rows, rank, world_size)))
                for rank, batches in enumerate(taken)
            )
        return n_rows


class RestOfEpoch:
    """The rows of an epoch that nobody has taken, in the order in which they are divided anew.

    Args:
        order: The order that was divided.
        division: How, and what was taken.
        batching: The settings.
        epoch: Number of the epoch.
        generation: Number of the division within the epoch.
    """

    def __init__(self, order: Order, division: Division, batching: Batching, *, epoch: int, generation: int) -> None:
        self._order = order
        self._parts: list[range | Numbers] = []  # places of `order`, or row numbers
        n_workers, world_size = division.n_workers, len(division.taken)
        for rank, taken in enumerate(division.taken):
            end = 0
            for worker in range(n_workers):
                places = worker_slice(
                    order.n_rows,
                    batching.batch_size,
                    rank,
                    world_size,
                    worker,
                    n_workers,
                    drop_last=batching.drop_last,
                )
                n_taken = min(len(range(worker, taken, n_workers)) * batching.batch_size, len(places))
                seed = batching.buffer_seed(epoch, generation, rank, worker)
                self._add(places, n_taken, batching.buffer_rows, seed)
                end = places.stop
            self._parts.append(range(end, rank_slice(order.n_rows, rank, world_size).stop))
        self._parts = [part for part in self._parts if len(part)]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    @property
    def n_rows(self) -> int:
        """Number of rows that are left."""
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> Iterator[Numbers | range]:
        """Yield the numbers of the rows from place `start` to before `stop` of this order, as arrays and ranges."""
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, part = int(self._starts[at]), self._parts[at]
            found = part[start - begin : stop - begin]
            if isinstance(found, range):
                yield from self._order.rows(found.start, found.stop)
            else:
                yield from (found[first : first + _PIECE_ROWS] for first in range(0, len(found), _PIECE_ROWS))
            start, at = begin + len(part), at + 1

    def _add(self, places: range, n_taken: int, buffer_rows: int, seed: Sequence[int] | None) -> None:
        """Add what is left of one worker's `places`: of the buffer in use the rows, and all places after it."""
        number, first = divmod(n_taken, buffer_rows)
        if first:
            buffer = places[number * buffer_rows : (number + 1) * buffer_rows]
            found = [np.asarray(piece) for piece in self._order.rows(buffer.start, buffer.stop)]
            slots = shuffled_slots(seed, number, len(buffer))[first:]
            self._parts.append(np.sort(np.concatenate(found)[slots]))
            number += 1
        self._parts.append(places[number * buffer_rows :])


class Resume(NamedTuple):
    """What the states of an earlier loader say; `at` makes the point from which one rank continues.

    Attributes:
        passed: Epochs of the iteration that were over.
        past: Earlier divisions of the epoch.
        num_workers: Workers of a rank, as given.
        world_size: Number of ranks.
        taken: Batches taken, by rank, of the ranks whose state is known.
        stream: The worker that the one state is of; None for those of ranks.
    """

    passed: int
    past: tuple[Division, ...]
    num_workers: int
    world_size: int
    taken: Mapping[int, int]
    stream: int | None

    def at(self, rank: int, world_size: int, n_workers: int) -> Point:
        """Return where a rank of `world_size` ranks, each with `n_workers` workers, continues.

        Raises:
            AnalysisError: The states do not say which rows are left for it.
        """
        before = max(1, self.num_workers)
        if (world_size, n_workers) == (self.world_size, before) and rank in self.taken:
            return Point(self.passed, self.past, self.taken[rank], self.stream)
        if self.stream is not None and n_workers != before:
            raise AnalysisError(
                f"the epoch was begun with {before} workers and cannot continue with {n_workers} from the state of one "
                f"worker: use {before} workers, or start the epoch again"
            )
        if self.stream is not None or len(self.taken) < self.world_size:
            raise AnalysisError(
                f"rank {rank} of {world_size} with {n_workers} workers cannot continue from the state of "
                f"rank {', '.join(map(str, self.taken))} of {self.world_size} with {before} workers: give "
                f"load_state_dict a list of the states of all {self.world_size} ranks, and the rows that nobody has "
                "taken are divided anew"
            )
        taken = tuple(self.taken[one] for one in range(self.world_size))
        return Point(self.passed, (*self.past, Division(before, taken)) if any(taken) else self.past)


def resume_of(states: Sequence[State]) -> tuple[int, Resume]:
    """Return the epoch that `states` are in, and what they say; those of several ranks are of one moment.

    Raises:
        AnalysisError: They are no states of a loader, or not of the same division of one epoch.
    """
    parsed = [_parsed(state) for state in states]
    if not parsed or None in parsed:
        raise AnalysisError(
            "this loader cannot continue from that state: it counts no batches: give what state_dict() returned"
        )
    found = [one for one in parsed if one is not None]
    epoch, first = found[0]
    ranks = [rank for _, one in found for rank in one.taken]
    if sorted(set(ranks)) != sorted(ranks) or (len(found) > 1 and len(ranks) != first.world_size):
        raise AnalysisError(
            f"states of the ranks {ranks} of {first.world_size} were given: give one of each rank, or that of this rank"
        )
    for other_epoch, other in found[1:]:
        if (epoch, first._replace(taken={})) != (other_epoch, other._replace(taken={})):
            raise AnalysisError(
                f"the states are of different moments: rank {ranks[0]} is in epoch {epoch} with {first.world_size} "
                f"ranks and {first.num_workers} workers, rank {next(iter(other.taken))} in epoch {other_epoch} with "
                f"{other.world_size} and {other.num_workers}: save all ranks after the same step; with drop_last=True "
                "all ranks have equally many batches an epoch"
            )
    return epoch, first._replace(taken={rank: n for _, one in found for rank, n in one.taken.items()})


def past_to_json(past: Sequence[Division]) -> list[list[Any]]:
    """Return divisions as JSON values, as `_parsed` reads them."""
    return [[n_workers, list(taken)] for n_workers, taken in past]


def _parsed(state: State) -> tuple[int, Resume] | None:
    """Return the epoch of a state, and what it says; None if it is none. Earlier versions kept fewer numbers."""
    names = ("epoch", "taken", "num_workers", "rank", "world_size")
    counts: list[Any] = [state.get(name) for name in names]
    passed, past, stream = state.get("passed", 0), state.get("divided", []), state.get("worker")
    try:
        divisions = tuple(Division(n_workers, tuple(taken)) for n_workers, taken in past)
    except (TypeError, ValueError):
        return None
    numbers = [*counts, passed, stream or 0, *(n for one in divisions for n in (one.n_workers, *one.taken))]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return None
    epoch, taken, num_workers, rank, world_size = counts
    if passed > epoch or rank >= world_size or not all(one.n_workers and one.taken for one in divisions):
        return None
    return epoch, Resume(passed, divisions, num_workers, world_size, {rank: taken}, stream)
