"""How much attention falls on the keys that count, and the same from stored patterns.

Axes: `H` heads, `Q` queries, `K` keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.analysis.attention.token_matches import Match
from residua.store.base.errors import AnalysisError
from residua.store.read.array import ArchiveArray

Floats = npt.NDArray[np.float64]
_MOST_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ExampleSums:
    """What the heads of one layer attend to in one example.

    Attributes:
        matched: Summed weights of the pairs that count, float64, (matches, heads).
        total: Summed weights of all pairs, float64, (heads): fewer than queries where attention has sinks.
        n_queries: Queries that have any key that counts, (matches).
        n_pairs: Pairs that count, (matches).
        n_tokens: Tokens of the example.
    """

    matched: Floats
    total: Floats
    n_queries: npt.NDArray[np.int64]
    n_pairs: npt.NDArray[np.int64]
    n_tokens: int


class ExampleRows(NamedTuple):
    """Where the rows of one example are, their positions in it (int64), and its number of tokens."""

    rows: range
    positions: Tensor
    n_tokens: int


class Weights(Protocol):
    """The attention weights of one layer, wherever they come from."""

    def sums(self, example: ExampleRows, matches: Sequence[Match]) -> ExampleSums:
        """Sum the weights of one example on the pairs that count, for each match by itself."""
        ...


class StoredPattern:
    """The weights of a stored `pattern` site; rows of some positions only are enough.

    Args:
        pattern: The site, (rows, heads, keys).
        most_bytes: Memory to keep to.

    Raises:
        AnalysisError: Not even one row fits.
    """

    def __init__(self, pattern: ArchiveArray, *, most_bytes: int) -> None:
        _, n_heads, n_keys = pattern.shape
        row_bytes = n_heads * n_keys * (pattern.dtype.itemsize + 16) + n_keys * 40
        if row_bytes > most_bytes:
            raise AnalysisError(too_small(most_bytes, f"a row of {pattern.name}", row_bytes))
        self._pattern = pattern
        self._height = min(_MOST_ROWS, most_bytes // row_bytes)

    def sums(self, example: ExampleRows, matches: Sequence[Match]) -> ExampleSums:
        """See `Weights`."""
        tally = Tally(len(matches), self._pattern.shape[1])
        keys = torch.arange(example.n_tokens)[None]
        for start in range(0, len(example.rows), self._height):
            rows = example.rows[start : start + self._height]
            queries = example.positions[start : start + self._height, None]
            weights_QHK = self._pattern.torch(slice(rows.start, rows.stop))[:, :, : example.n_tokens]
            tally.total += weights_QHK.sum((0, 2), dtype=torch.float64)
            seen = torch.zeros(len(matches), len(rows), dtype=torch.bool)
            for number, match in enumerate(matches):
                query, key = tally.count(number, match(queries, keys), seen)
                tally.matched[number] += weights_QHK[query, :, key].sum(0, dtype=torch.float64)
            tally.n_queries += seen.sum(1)
        return tally.sums(example.n_tokens)


class Tally:
    """Adds up one example."""

    def __init__(self, n_matches: int, n_heads: int) -> None:
        self.matched = torch.zeros(n_matches, n_heads, dtype=torch.float64)
        self.total = torch.zeros(n_heads, dtype=torch.float64)
        self.n_queries = torch.zeros(n_matches, dtype=torch.int64)
        self._n_pairs = [0] * n_matches

    def count(self, number: int, hits_QK: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Count what match `number` hits in a tile, note in `seen` which queries do, and return the pairs."""
        query, key = hits_QK.nonzero(as_tuple=True)
        seen[number, query] = True
        self._n_pairs[number] += len(query)
        return query, key

    def sums(self, n_tokens: int) -> ExampleSums:
        """Return what was added up, of an example of so many tokens."""
        return ExampleSums(
            matched=self.matched.numpy(),
            total=self.total.numpy(),
            n_queries=self.n_queries.numpy(),
            n_pairs=np.array(self._n_pairs, np.int64),
            n_tokens=n_tokens,
        )


def too_small(most_bytes: int, what: str, least: int) -> str:
    """Return the message that a budget is too small for `what`, which take `least` bytes."""
    return f"at most {most_bytes:,} bytes were allowed, but {what} need {least:,} at a time: allow more memory"
