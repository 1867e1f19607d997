"""Attention weights from stored queries and keys, tile by tile.

Nothing here is ever as large as a pattern: the softmax is met in pieces, with a running maximum and a running sum
(Milakov and Gimelshein 2018, arXiv 1805.02867), so memory depends on the budget alone, whatever the length of an
example.

Axes: `H` heads, `Q` queries, `K` keys, `D` width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from residua.analysis.attention.token_matches import Match
from residua.analysis.attention.weights import ExampleRows, ExampleSums, Tally, too_small
from residua.store.base.errors import AnalysisError
from residua.store.format.sidecars import AttentionSpec
from residua.store.read.array import ArchiveArray

_LONGEST_SIDE = 256  # of a tile: larger ones leave the processor's cache
_SHORTEST_SIDE = 8


class QueriesAndKeys:
    """The weights that follow from stored `q` and `k` sites; all positions of an example have to be there.

    Args:
        query: The `q` site, (rows, heads, head width).
        key: The `k` site, (rows, key heads, head width).
        spec: How the weights follow.
        end: Row behind the last that will be asked for.
        most_bytes: Memory to keep to.

    Raises:
        AnalysisError: The budget holds no tile worth the name.
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
                raise AnalysisError(too_small(most_bytes, f"weights of {query.name}", least))
        self._side = side
        window = (most_bytes - side * side * tile_bytes - side * row_bytes) // (2 * row_bytes)
        self._query, self._key = (_Window(site, window, end, self._dtype) for site in (query, key))

    def sums(self, example: ExampleRows, matches: Sequence[Match]) -> ExampleSums:
        """See `Weights`."""
        tally = Tally(len(matches), self._n_heads)
        for start in range(0, example.n_tokens, self._side):
            queries = range(start, min(start + self._side, example.n_tokens))
            self._add_queries(example, queries, matches, tally)
        return tally.sums(example.n_tokens)

    def _add_queries(self, example: ExampleRows, queries: range, matches: Sequence[Match], tally: Tally) -> None:
        running = _Softmax(self._spec, self._n_heads, len(queries), len(matches), self._dtype)
        seen = torch.zeros(len(matches), len(queries), dtype=torch.bool)
        query_HQD = self._query.rows(example.rows, queries).transpose(0, 1) * self._spec.scale
        place_Q1 = torch.arange(queries.start, queries.stop)[:, None]
        for start in range(0, example.n_tokens, self._side):
            keys = range(start, min(start + self._side, example.n_tokens))
            place_1K = torch.arange(keys.start, keys.stop)[None]
            pairs = [tally.count(n, match(place_Q1, place_1K), seen) for n, match in enumerate(matches)]
            if self._sees(queries, keys):
                score_HQK = self._scores(query_HQD, self._key.rows(example.rows, keys))
                if not self._sees_all(queries, keys):
                    score_HQK.masked_fill_(~self._seen(place_Q1, place_1K), -torch.inf)
                running.add(score_HQK, pairs)
        matched, total = running.sums()
        tally.matched += matched
        tally.total += total
        tally.n_queries += seen.sum(1)

    def _scores(self, query_HQD: Tensor, key_KHD: Tensor) -> Tensor:
        """Scores of a tile, (heads, queries, keys); the heads of a group multiply with the same keys."""
        n_heads, n_queries, width = query_HQD.shape
        grouped = query_HQD.reshape(self._n_key_heads, -1, width)
        score_HQK = torch.bmm(grouped, key_KHD.permute(1, 2, 0)).view(n_heads, n_queries, -1)
        cap = self._spec.softcap
        return score_HQK if cap is None else score_HQK.div_(cap).tanh_().mul_(cap)

    def _seen(self, query: Tensor, key: Tensor) -> Tensor:
        if not self._spec.causal:
            return torch.ones(len(query), key.shape[1], dtype=torch.bool)
        seen_QK = key <= query
        return seen_QK if self._spec.window is None else seen_QK & (key > query - self._spec.window)

    def _sees(self, queries: range, keys: range) -> bool:
        """Say whether any of `queries` sees any of `keys`."""
        if not self._spec.causal:
            return True
        far = queries[0] - (self._spec.window or queries[0] + 1)  # the last key that is too far back for all
        return keys[0] <= queries[-1] and keys[-1] > far

    def _sees_all(self, queries: range, keys: range) -> bool:
        """Say whether each of `queries` sees each of `keys`."""
        near_enough = self._spec.window is None or keys[0] > queries[-1] - self._spec.window
        return not self._spec.causal or (keys[-1] <= queries[0] and near_enough)


class _Window:
    """Rows of one site, read some way ahead and kept until others are asked for: a chunk is not decoded twice."""

    def __init__(self, site: ArchiveArray, height: int, end: int, dtype: torch.dtype) -> None:
        self._site = site
        self._height = height
        self._end = end
        self._dtype = dtype
        self._start = self._stop = 0
        self._values = torch.empty(0)

    def rows(self, rows: range, places: range) -> Tensor:
        """Return the rows of `places` in an example whose rows are `rows`."""
        start, stop = rows.start + places.start, rows.start + places.stop
        if not self._start <= start <= stop <= self._stop:
            self._values = torch.empty(0)  # before the next are read: there is memory for one window
            self._start, self._stop = start, max(stop, min(start + self._height, self._end))
            self._values = self._site.torch(slice(self._start, self._stop), dtype=self._dtype)
        return self._values[start - self._start : stop - self._start]


class _Softmax:
    """A softmax over keys that come in tiles, and the share of it that falls on the pairs that count."""

    def __init__(self, spec: AttentionSpec, n_heads: int, n_queries: int, n_matches: int, dtype: torch.dtype) -> None:
        self._highest_HQ = torch.full((n_heads, n_queries), torch.finfo(dtype).min, dtype=dtype)
        self._sinks_HQ: Tensor | None = None
        if spec.sinks is not None:
            self._sinks_HQ = torch.tensor(spec.sinks, dtype=dtype)[:, None].expand(n_heads, n_queries)
            self._highest_HQ = self._sinks_HQ.clone()
        self._sum_HQ = torch.zeros_like(self._highest_HQ)
        self._matched = torch.zeros(n_matches, n_heads, n_queries, dtype=dtype)

    def add(self, score_HQK: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add a tile of scores, which is overwritten; `pairs` are queries and keys that count, for each match."""
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
        whole_HQ = self._sum_HQ
        if self._sinks_HQ is not None:
            whole_HQ = whole_HQ + (self._sinks_HQ - self._highest_HQ).exp()
        return (self._matched / whole_HQ).double().sum(-1), (self._sum_HQ / whole_HQ).double().sum(-1)
