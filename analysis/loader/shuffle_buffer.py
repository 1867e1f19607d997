"""The buffer of a loader: rows of several sites in memory of a fixed size, handed out in an order of their own."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.loader.chosen import ChosenRows
from residua.analysis.loader.order import Order, Share
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

Rows = npt.NDArray[np.int64]


class Taken(NamedTuple):
    """Rows out of a buffer: their numbers, and per site their values, (rows, *row shape)."""

    rows: Rows
    values: Mapping[str, Array]


class ShuffleBuffer:
    """A worker's piece of an epoch, a bufferful at a time.

    Args:
        archive: The archive.
        sites: Sites to read.
        chosen: The rows that take part.
        order: The line of rows of the epoch.
        share: The worker's piece of the line.
        height: Rows of the buffer.
        seed: Shuffles each bufferful, together with the buffer's number in the share; None keeps the line's order.
    """

    def __init__(
        self,
        archive: Archive,
        sites: Sequence[str],
        chosen: ChosenRows,
        order: Order,
        share: Share,
        *,
        height: int,
        seed: Sequence[int] | None,
    ) -> None:
        self._sources = {site: archive[site] for site in sites}
        self._chosen = chosen
        self._order = order
        self._share = share
        self._height = height
        self._seed = seed
        n_rows = min(height, share.stop - share.start)
        self._rows = np.empty(n_rows, np.int64)
        self._values = {name: np.empty((n_rows, *each.shape[1:]), each.dtype) for name, each in self._sources.items()}
        self._number = -1
        self._places = np.empty(0, np.int64)

    def take(self, start: int, stop: int) -> Taken:
        """Return rows `start` to `stop` (not included) of the share; fast while both lie in one bufferful."""
        pieces = []
        while start < stop:
            number, first = divmod(start, self._height)
            last = min(self._height, first + stop - start)
            self._fill(number)
            places = self._places[first:last]
            values = {name: _gather(values, places) for name, values in self._values.items()}
            pieces.append(Taken(self._rows[places], values))
            start += last - first
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _fill(self, number: int) -> None:
        if number == self._number:
            return
        start = self._share.start + number * self._height
        stop = min(start + self._height, self._share.stop)
        for at, rows in self._chosen.runs_of_rows(self._order.runs(start, stop)):
            self._read(slice(at, at + len(rows)), rows)
        n_rows = stop - start
        if self._seed is None:
            self._places = np.arange(n_rows)
        else:
            self._places = np.random.default_rng([*self._seed, number]).permutation(n_rows)
        self._number = number

    def _read(self, places: slice, rows: Rows | range) -> None:
        """Put rows into places of the buffer."""
        self._rows[places] = np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
        for name, source in self._sources.items():
            out = self._values[name][places]
            if isinstance(rows, range):
                source.read_into(out, rows.start, rows.stop)
            else:
                out[...] = source[rows]


def _gather(values: Array, places: Rows) -> Array:
    """Return rows of `values`; numpy takes opaque items faster than rows of numbers."""
    row_shape = values.shape[1:]
    item = np.dtype((np.void, values.dtype.itemsize * prod(row_shape)))
    taken = values.reshape(-1).view(item)[places]
    return taken.view(values.dtype).reshape(len(places), *row_shape)


def _joined(pieces: Sequence[Taken]) -> Taken:
    values = {name: np.concatenate([piece.values[name] for piece in pieces]) for name in pieces[0].values}
    return Taken(np.concatenate([piece.rows for piece in pieces]), values)
