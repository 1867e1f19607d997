"""The shuffle buffer of a loader: rows of several sites in memory of a fixed size, returned in random order.

Rows are read in the order of the epoch until the buffer is full. All of them are shuffled and returned, and the buffer
is filled again. (``tf.data.Dataset.shuffle``, Abadi et al. 2016, replaces one row at a time instead.) Filling all at
once reads neighbouring rows together, and the order after a stop can be computed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from residua.analysis.loader.order import Numbers, Order, Source
from residua.store.read.rows_in_shards import Array, Following

_AHEAD_BYTES = 64 * 2**20  # stored bytes of all sites together

Taken = tuple[Numbers, Mapping[str, Array]]


class ShuffleBuffer:
    """The rows of one worker in one epoch, one full buffer at a time.

    Args:
        sources: What to read, by site.
        order: The order of the epoch, or of what is left of it.
        places: The worker's slice of that order.
        height: Rows of the buffer.
        seed: Shuffles each full buffer, together with its number; None keeps the order.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        order: Order,
        places: range,
        *,
        height: int,
        seed: Sequence[int] | None,
    ) -> None:
        self._sources = sources
        self._order = order
        self._places = places
        self._height = height
        self._seed = seed
        n_rows = min(height, len(places))
        self._rows = np.empty(n_rows, np.int64)
        self._values = {
            name: np.empty((n_rows, *each.shape[1:]), each.stored_dtype) for name, each in self._sources.items()
        }
        self._number = -1
        self._shuffled = np.empty(0, np.int64)
        self._next: list[Numbers | range] = []

    def take(self, start: int, stop: int) -> Taken:
        """Return the worker's rows from `start` to before `stop`: their numbers, and by site (rows, *row shape).

        This is fast while both lie in the same full buffer as those of the call before.
        """
        pieces: list[Taken] = []
        while start < stop:
            number, first = divmod(start, self._height)
            last = min(self._height, first + stop - start)
            self._fill(number)
            at = self._shuffled[first:last]
            pieces.append((self._rows[at], {name: values.take(at, axis=0) for name, values in self._values.items()}))
            start += last - first
        if len(pieces) == 1:
            return pieces[0]
        values = {name: np.concatenate([piece[name] for _, piece in pieces]) for name in self._values}
        return np.concatenate([rows for rows, _ in pieces]), values

    def _fill(self, number: int) -> None:
        if number == self._number:
            return
        pieces = self._next if number == self._number + 1 and self._number >= 0 else self._pieces(number)
        self._next = self._pieces(number + 1)
        n_rows = sum(map(len, pieces))
        self._number = -1  # of no buffer, if reading fails
        self._rows[:n_rows] = np.concatenate([_numbers(rows) for rows in pieces])
        following = Following(self._next, _AHEAD_BYTES // len(self._sources))
        for name, source in self._sources.items():
            source.fill(self._values[name][:n_rows], pieces, following)
        self._shuffled = shuffled_slots(self._seed, number, n_rows)
        self._number = number

    def _pieces(self, number: int) -> list[Numbers | range]:
        """Return the rows of a full buffer, in the order of the epoch; none after the last."""
        places = self._places[number * self._height : (number + 1) * self._height]
        return [*self._order.rows(places.start, places.stop)] if places else []


def shuffled_slots(seed: Sequence[int] | None, number: int, n_rows: int) -> Numbers:
    """Return in which order the rows of the full buffer `number` are returned; None as seed keeps their order."""
    return np.arange(n_rows) if seed is None else np.random.default_rng([*seed, number]).permutation(n_rows)


def _numbers(rows: Numbers | range) -> Numbers:
    return np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
