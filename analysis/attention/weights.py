"""Attention weights of one layer, summed over the keys that count: from stored patterns, or from queries and keys.

Weights from queries and keys are computed tile by tile. Nothing is ever as large as a pattern: the softmax keeps a
running maximum and a running sum (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv
1805.02867). Memory depends on the limit alone, whatever the length of an example.

Axes: `H` heads, `Q` queries, `K` keys, `D` width of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.analysis.attention.token_matches import Match
from residua.store.base.errors import AnalysisError
from residua.store.format.sidecars import AttentionSpec
from residua.store.read.array import ArchiveArray

Floats: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

_MOST_ROWS = 256
_LONGEST_SIDE = 256  # of a tile: larger tiles do not fit into the processor's cache
_SHORTEST_SIDE = 8


class ExampleSums:
    """What the heads of one layer attend to in one example.

    Attributes:
        matched: Summed weights of the pairs that count, float64, (matches, heads).
        total: Summed weights of all pairs, float64, (heads): less than the number of queries if there are sinks.
        n_queries: Queries that have at least one key that counts, (matches).
        n_pairs: Pairs that count, (matches).
        n_tokens: Tokens of the example.
    """

    def __init__(self, n_matches: int, n_heads: int, n_tokens: int) -> None:
        self.matched: Floats = np.zeros((n_matches, n_heads))
        self.total: Floats = np.zeros(n_heads)
        self.n_queries: Counts = np.zeros(n_matches, np.int64)
        self.n_pairs: Counts = np.zeros(n_matches, np.int64)
        self.n_tokens = n_tokens

    def count(self, number: int, hits_QK: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Count the pairs of match `number` in a tile, mark their queries in `seen`, and return the pairs."""
        query, key = hits_QK.nonzero(as_tuple=True)
        seen[number, query] = True
        self.n_pairs[number] += len(query)
        return query, key


class ExampleRows(NamedTuple):
    """The rows of one example, their positions in it (int64), and its number of tokens."""

    rows: range
    positions: Tensor
    n_tokens: int


class StoredPattern:
    """The weights of a stored `pattern` site; an example needs only some of its rows.

    Args:
        pattern: The site, (rows, heads, keys).
        most_bytes: Memory limit.

    Raises:
        AnalysisError: Not even one row fits.
    """

    def __init__(self, pattern: ArchiveArray, *, most_bytes: int) -> None:
        _, n_heads, n_keys = pattern.shape
        row_bytes = n_heads * n_keys * (pattern.dtype.itemsize + 16) + n_keys * 40
        if row_bytes > most_bytes:
            raise AnalysisError(_too_small(most_bytes, f"a row of {pattern.name}", row_bytes))
        self._pattern = pattern
        self._height = min(_MOST_ROWS, most_bytes // row_bytes)

    def sums(self, example: ExampleRows, matches: Sequence[Match]) -> ExampleSums:
        """Sum the weights of one example over the pairs that count, for each match by itself."""
        sums = ExampleSums(len(matches), self._pattern.shape[1], example.n_tokens)
        keys = torch.arange(example.n_tokens)[None]
        for start in range(0, len(example.rows), self._height):
            rows = example.rows[start : start + self._height]
            queries = example.positions[start : start + self._height, None]
            weights_QHK = self._pattern.torch(slice(rows.start, rows.stop))[:, :, : example.n_tokens]
            sums.total += weights_QHK.sum((0, 2), dtype=torch.float64).numpy()
            seen = torch.zeros(len(matches), len(rows), dtype=torch.bool)
            for number, match in enumerate(matches):
                query, key = sums.count(number, match(queries, keys), seen)
                sums.matched[number] += weights_QHK[query, :, key].sum(0, dtype=torch.float64).numpy()
            sums.n_queries += seen.sum(1).numpy()
        return sums


class QueriesAndKeys:
    """The weights that follow from stored `q` and `k` sites; an example needs all its positions.

    Args:
        query: The `q` site, (rows, heads, head width).
        key: The `k` site, (rows, key heads, head width).
        spec: How the weights follow.
        end: Number of the row after the last one that will be needed.
        most_bytes: Memory limit.

    Raises:
        AnalysisError: Not even a small tile fits.
    """

    def __init__(
        self, query: ArchiveArray, key: ArchiveArray, spec: AttentionSpec, *, end: int, most_bytes: int
    ) -> None:
        self._spec = spec
        self._n_heads, self._n_key_heads, width = query.shape[1], key.shape[1], query.shape[2]
        self._dtype = torch.float64 if query.dtype.itemsize == 8 else torch.float32
        size = self._dtype.itemsize
        row_bytes = self._n_heads * width * (2 * size + 4)
        tile_bytes = 2 * self._n_heads * size + 40
        side = _LONGEST_SIDE
        while side * side * tile_bytes + 3 * side * row_bytes > most_bytes:
            side //= 2
            if side < _SHORTEST_SIDE:
                least = _SHORTEST_SIDE**2 * tile_bytes + 3 * _SHORTEST_SIDE * row_bytes
                raise AnalysisError(_too_small(most_bytes, f"weights of {query.name}", least))
        self._side = side
        window = (most_bytes - side * side * tile_bytes - side * row_bytes) // (2 * row_bytes)
        self._query, self._key = (_Window(site, window, end, self._dtype) for site in (query, key))

    def sums(self, example: ExampleRows, matches: Sequence[Match]) -> ExampleSums:
        """Sum the weights of one example over the pairs that count, for each match by itself."""
        sums = ExampleSums(len(matches), self._n_heads, example.n_tokens)
        for start in range(0, example.n_tokens, self._side):
            queries = range(start, min(start + self._side, example.n_tokens))
            self._add_queries(example, queries, matches, sums)
        return sums

    def _add_queries(self, example: ExampleRows, queries: range, matches: Sequence[Match], sums: ExampleSums) -> None:
        running = _Softmax(self._spec, self._n_heads, len(queries), len(matches), self._dtype)
        seen = torch.zeros(len(matches), len(queries), dtype=torch.bool)
        query_HQD = self._query.rows(example.rows, queries).transpose(0, 1) * self._spec.scale
        position_Q1 = torch.arange(queries.start, queries.stop)[:, None]
        for start in range(0, example.n_tokens, self._side):
            keys = range(start, min(start + self._side, example.n_tokens))
            position_1K = torch.arange(keys.start, keys.stop)[None]
            pairs = [sums.count(n, match(position_Q1, position_1K), seen) for n, match in enumerate(matches)]
            if self._sees(queries, keys):
                score_HQK = self._scores(query_HQD, self._key.rows(example.rows, keys))
                if not self._sees_all(queries, keys):
                    score_HQK.masked_fill_(~self._visible(position_Q1, position_1K), -torch.inf)
                running.add(score_HQK, pairs)
        matched, total = running.sums()
        sums.matched += matched.numpy()
        sums.total += total.numpy()
        sums.n_queries += seen.sum(1).numpy()

    def _scores(self, query_HQD: Tensor, key_KHD: Tensor) -> Tensor:
        """Return the scores of a tile, (heads, queries, keys); all heads of a group use the same keys."""
        n_heads, n_queries, width = query_HQD.shape
        grouped = query_HQD.reshape(self._n_key_heads, -1, width)
        score_HQK = torch.bmm(grouped, key_KHD.permute(1, 2, 0)).view(n_heads, n_queries, -1)
        cap = self._spec.softcap
        return score_HQK if cap is None else score_HQK.div_(cap).tanh_().mul_(cap)

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Return which keys each query of a tile of causal attention sees, bool (queries, keys)."""
        visible_QK = key <= query
        return visible_QK if self._spec.window is None else visible_QK & (key > query - self._spec.window)

    def _sees(self, queries: range, keys: range) -> bool:
        """Return whether any of `queries` sees any of `keys`."""
        if not self._spec.causal:
            return True
        too_far = queries[0] - (self._spec.window or queries[0] + 1)  # the last key that no query reaches back to
        return keys[0] <= queries[-1] and keys[-1] > too_far

    def _sees_all(self, queries: range, keys: range) -> bool:
        """Return whether each of `queries` sees each of `keys`."""
        near_enough = self._spec.window is None or keys[0] > queries[-1] - self._spec.window
        return not self._spec.causal or (keys[-1] <= queries[0] and near_enough)


class _Window:
    """Rows of one site, read ahead and kept until others are needed, so that no chunk is decoded twice."""

    def __init__(self, site: ArchiveArray, height: int, end: int, dtype: torch.dtype) -> None:
        self._site = site
        self._height = height
        self._end = end
        self._dtype = dtype
        self._start = self._stop = 0
        self._values = torch.empty(0)

    def rows(self, rows: range, positions: range) -> Tensor:
        """Return the rows of `positions` of the example that has the rows `rows`."""
        start, stop = rows.start + positions.start, rows.start + positions.stop
        if not self._start <= start <= stop <= self._stop:
            self._values = torch.empty(0)  # freed before the next read: there is memory for one window only
            self._start, self._stop = start, max(stop, min(start + self._height, self._end))
            self._values = self._site.torch(slice(self._start, self._stop), dtype=self._dtype)
        return self._values[start - self._start : stop - self._start]


class _Softmax:
    """A softmax over keys that come in tiles, and its weights on the pairs that count."""

    def __init__(self, spec: AttentionSpec, n_heads: int, n_queries: int, n_matches: int, dtype: torch.dtype) -> None:
        self._highest_HQ = torch.full((n_heads, n_queries), torch.finfo(dtype).min, dtype=dtype)
        self._sinks_HQ: Tensor | None = None
        if spec.sinks is not None:
            self._sinks_HQ = torch.tensor(spec.sinks, dtype=dtype)[:, None].expand(n_heads, n_queries)
            self._highest_HQ = self._sinks_HQ.clone()
        self._sum_HQ = torch.zeros_like(self._highest_HQ)
        self._matched = torch.zeros(n_matches, n_heads, n_queries, dtype=dtype)

    def add(self, score_HQK: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add a tile of scores, which is overwritten; `pairs` are the queries and keys that count, for each match."""
        highest_HQ = torch.maximum(self._highest_HQ, score_HQK.amax(-1))
        shrunk_HQ = (self._highest_HQ - highest_HQ).exp_()
        weight_HQK = score_HQK.sub_(highest_HQ[..., None]).exp_()
        self._highest_HQ = highest_HQ
        self._sum_HQ.mul_(shrunk_HQ).add_(weight_HQK.sum(-1))
        self._matched.mul_(shrunk_HQ)
        for matched_HQ, (query, key) in zip(self._matched, pairs, strict=True):
            matched_HQ.index_add_(1, query, weight_HQK[:, query, key])

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the pairs that count, (matches, heads), and of all, (heads), summed over queries."""
        total_HQ = self._sum_HQ
        if self._sinks_HQ is not None:
            total_HQ = total_HQ + (self._sinks_HQ - self._highest_HQ).exp()
        return (self._matched / total_HQ).double().sum(-1), (self._sum_HQ / total_HQ).double().sum(-1)


Weights: TypeAlias = StoredPattern | QueriesAndKeys


def _too_small(most_bytes: int, what: str, least: int) -> str:
    return f"at most {most_bytes:,} bytes were allowed, but {what} need {least:,} at a time: allow more memory"
