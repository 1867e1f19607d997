"""Attention weights of one layer, summed over the keys that count: from stored patterns, or from queries and keys.

Weights from queries and keys are computed tile by tile. Nothing is ever as large as a pattern: the softmax keeps a
running maximum and a running sum (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv
1805.02867). Memory depends on the limit alone, whatever the length of an example.

Every sum over the keys of a query is a product of its weights with a factor for each pair: 1 for all weights, 1 or 0
for the pairs that count, the distance and its square. One batched matrix product gives all sums of a tile.

Axes: `H` heads, `Q` queries, `K` keys, `D` width of a head, `F` factors.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.analysis.attention.token_matches import Match
from residua.store.base.errors import AnalysisError
from residua.store.examples.table import ExampleTable
from residua.store.format.sidecars import AttentionSpec
from residua.store.read.array import ArchiveArray

Floats: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

_MOST_ROWS = 256
_LONGEST_SIDE = 256  # of a tile
_SHORTEST_SIDE = 8
_TILE_BYTES = 2**20  # of the scores of some heads, which the processor's cache holds
_MOST_FACTORS = 8  # for which there is memory
_PAIR_BYTES = 32  # of a tile's positions, distances and pairs that count
_KEY_SHARE = 4  # of the memory for rows, the queries get one part and the keys the others, which are read more often


class ExampleSums:
    """What the heads of one layer attend to in one example.

    The last four stay 0 unless the shape of the patterns is asked for.

    Attributes:
        matched: Summed weights of the pairs that count, float64, (matches, heads).
        total: Summed weights of all pairs, float64, (heads): less than the number of queries if there are sinks.
        n_queries: Queries that have at least one key that counts, (matches).
        n_pairs: Pairs that count, (matches).
        n_tokens: Tokens of the example.
        entropy: Entropies of the queries' weights, in nats, summed over queries, float64, (heads).
        distance: Distances of query and key times their weight, in tokens, summed, float64, (heads).
        squared_distance: The same of the squared distances.
        strongest: The greatest weight of a pair without the first query and the first key, float64, (heads).
    """

    def __init__(self, n_matches: int, n_heads: int, n_tokens: int) -> None:
        self.matched: Floats = np.zeros((n_matches, n_heads))
        self.total: Floats = np.zeros(n_heads)
        self.n_queries: Counts = np.zeros(n_matches, np.int64)
        self.n_pairs: Counts = np.zeros(n_matches, np.int64)
        self.n_tokens = n_tokens
        self.entropy: Floats = np.zeros(n_heads)
        self.distance: Floats = np.zeros(n_heads)
        self.squared_distance: Floats = np.zeros(n_heads)
        self.strongest: Floats = np.zeros(n_heads)

    def add(self, sum_HF: Tensor) -> None:
        """Add the sums of some queries, float64, (heads, factors), in the order of `_factors`."""
        n_matches = len(self.matched)
        sum_FH = sum_HF.T.numpy()
        self.total += sum_FH[0]
        self.matched += sum_FH[1 : 1 + n_matches]
        if len(sum_FH) > 1 + n_matches:
            self.distance += sum_FH[-2]
            self.squared_distance += sum_FH[-1]

    def add_shape(self, entropy_HQ: Tensor, strongest_HQ: Tensor, queries: Tensor) -> None:
        """Add the entropies and the greatest weights of some queries, float64; `queries` are their positions."""
        self.entropy += entropy_HQ.sum(-1).numpy()
        if len(others := strongest_HQ.T[queries > 0]):
            self.strongest = np.maximum(self.strongest, others.amax(0).numpy())


class ExampleRows(NamedTuple):
    """The rows of one example, their positions in it (int64), and its number of tokens."""

    rows: range
    positions: Tensor
    n_tokens: int

    @classmethod
    def of(cls, table: ExampleTable, example: int) -> "ExampleRows":
        """Return those of an example of a table, by its number."""
        positions = torch.from_numpy(table.positions(example).astype("int64"))
        return cls(range(*table.rows(example)), positions, len(table.tokens(example)))


class _Pairs:
    """The pairs of queries and keys that count, for each match, and the factors that add them up.

    Args:
        sums: Where the pairs and their queries are counted.
        matches: Which pairs count.
        query_Q1: Positions of the queries.
        shape: Whether the distances are summed, too.
    """

    def __init__(self, sums: ExampleSums, matches: Sequence[Match], query_Q1: Tensor, *, shape: bool) -> None:
        self._sums = sums
        self._matches = matches
        self._query_Q1 = query_Q1
        self._shape = shape
        self._seen = torch.zeros(len(matches), len(query_Q1), dtype=torch.bool)
        self.n_factors = 1 + len(matches) + 2 * shape

    def factors(self, key_1K: Tensor, dtype: torch.dtype) -> Tensor:
        """Count the pairs with some keys, and return their factors, (queries, factors, keys)."""
        factor_QFK = torch.empty(len(self._query_Q1), self.n_factors, key_1K.shape[1], dtype=dtype)
        factor_QFK[:, 0] = 1
        for number, hits_QK in enumerate(self._hits(key_1K)):
            factor_QFK[:, 1 + number] = hits_QK
        if self._shape:
            distance_QK = factor_QFK[:, -2]
            torch.sub(self._query_Q1.to(dtype), key_1K.to(dtype), out=distance_QK).abs_()
            torch.mul(distance_QK, distance_QK, out=factor_QFK[:, -1])
        return factor_QFK

    def count(self, key_1K: Tensor) -> None:
        """Count the pairs with some keys that no query sees."""
        for _ in self._hits(key_1K):
            pass

    def _hits(self, key_1K: Tensor) -> Iterator[Tensor]:
        for number, match in enumerate(self._matches):
            hits_QK = match(self._query_Q1, key_1K)
            count_Q = hits_QK.count_nonzero(dim=1)
            self._seen[number] |= count_Q > 0
            self._sums.n_pairs[number] += int(count_Q.sum())
            yield hits_QK

    def finish(self) -> None:
        """Count the queries that have a key that counts."""
        self._sums.n_queries += self._seen.sum(1).numpy()


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
        row_bytes = n_keys * (n_heads * (pattern.dtype.itemsize + 24) + _MOST_FACTORS * 8 + _PAIR_BYTES)
        if row_bytes > most_bytes:
            raise AnalysisError(_too_small(most_bytes, f"a row of {pattern.name}", row_bytes))
        self._pattern = pattern
        self._height = min(_MOST_ROWS, most_bytes // row_bytes)

    def sums(self, example: ExampleRows, matches: Sequence[Match], *, shape: bool = False) -> ExampleSums:
        """Sum the weights of one example over the pairs that count, for each match by itself.

        Args:
            example: The example.
            matches: Which pairs count.
            shape: Whether to sum entropies and distances, too, and to find the greatest weight.
        """
        sums = ExampleSums(len(matches), self._pattern.shape[1], example.n_tokens)
        keys = torch.arange(example.n_tokens)[None]
        for start in range(0, len(example.rows), self._height):
            rows = example.rows[start : start + self._height]
            queries = example.positions[start : start + self._height, None]
            stored_QHK = self._pattern.torch(slice(rows.start, rows.stop))
            weight_QHK = stored_QHK[:, :, : example.n_tokens].double()
            pairs = _Pairs(sums, matches, queries, shape=shape)
            factor_QFK = pairs.factors(keys, torch.float64)
            sums.add(torch.bmm(weight_QHK, factor_QFK.transpose(1, 2)).sum(0))
            pairs.finish()
            if shape:
                entropy_QH, strongest_QH = torch.special.entr(weight_QHK).sum(-1), _greatest(weight_QHK[..., 1:])
                sums.add_shape(entropy_QH.T, strongest_QH.T, queries[:, 0])
        return sums

    def rows(self, example: ExampleRows, head: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions of some queries and one head's weights there, (queries) and (queries, keys)."""
        for start in range(0, len(example.rows), self._height):
            rows = example.rows[start : start + self._height]
            weight_QHK = self._pattern.torch(slice(rows.start, rows.stop))
            yield example.positions[start : start + self._height], weight_QHK[:, head, : example.n_tokens].float()


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
        row_bytes, key_bytes = (n_heads * width * size for n_heads in (self._n_heads, self._n_key_heads))
        reading = 4 + size  # bytes of a value while it is read, in addition

        def tile_bytes(side: int) -> int:
            pairs = side**2 * (_MOST_FACTORS * size + _PAIR_BYTES + 2 * size * self._slice_heads(side))
            running = side * self._n_heads * (2 * _MOST_FACTORS + 6) * 8
            return pairs + running + 2 * side * row_bytes + side * reading * (row_bytes // size)

        side = _LONGEST_SIDE
        while tile_bytes(side) + side * (row_bytes + key_bytes) > most_bytes:
            side //= 2
            if side < _SHORTEST_SIDE:
                least = tile_bytes(_SHORTEST_SIDE) + _SHORTEST_SIDE * (row_bytes + key_bytes)
                raise AnalysisError(_too_small(most_bytes, f"weights of {query.name}", least))
        self._side = side
        n_heads = self._slice_heads(side)
        self._slices = [slice(first, first + n_heads) for first in range(0, self._n_heads, n_heads)]
        left = most_bytes - tile_bytes(side)
        queries = max(side, left // _KEY_SHARE // row_bytes)
        keys = (left - queries * row_bytes) // key_bytes
        self._query = _Window(query, queries, side, end, self._dtype)
        self._key = _Window(key, keys, side, end, self._dtype)

    def _slice_heads(self, side: int) -> int:
        """Return how many heads are computed at a time: whole groups that share keys, or equal parts of a group."""
        group = self._n_heads // self._n_key_heads
        most = min(self._n_heads, max(1, _TILE_BYTES // (side**2 * self._dtype.itemsize)))
        if most >= group:
            return most // group * group
        return next(n for n in range(most, 0, -1) if group % n == 0)

    def sums(self, example: ExampleRows, matches: Sequence[Match], *, shape: bool = False) -> ExampleSums:
        """Sum the weights of one example over the pairs that count, for each match by itself.

        Args:
            example: The example.
            matches: Which pairs count.
            shape: Whether to sum entropies and distances, too, and to find the greatest weight.
        """
        sums = ExampleSums(len(matches), self._n_heads, example.n_tokens)
        for start in range(0, example.n_tokens, self._side):
            queries = range(start, min(start + self._side, example.n_tokens))
            self._add_queries(example, queries, matches, sums, shape=shape)
        return sums

    def rows(self, example: ExampleRows, head: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the positions of some queries and one head's weights there, (queries) and (queries, keys).

        Unlike `sums`, it takes memory for all keys of the example.
        """
        key_KD = self._key.rows(example.rows, range(example.n_tokens))[:, head * self._n_key_heads // self._n_heads]
        position_1K = torch.arange(example.n_tokens)[None]
        for start in range(0, example.n_tokens, self._side):
            position_Q1 = torch.arange(start, min(start + self._side, example.n_tokens))[:, None]
            queries = range(start, start + len(position_Q1))
            score_QK = (self._query.rows(example.rows, queries)[:, head] * self._spec.scale) @ key_KD.T
            if self._spec.softcap is not None:
                score_QK = score_QK.div_(self._spec.softcap).tanh_().mul_(self._spec.softcap)
            if self._spec.causal:
                score_QK.masked_fill_(~self._visible(position_Q1, position_1K), -torch.inf)
            if self._spec.sinks is not None:
                score_QK = torch.cat([score_QK, score_QK.new_full((len(score_QK), 1), self._spec.sinks[head])], dim=1)
            yield position_Q1[:, 0], score_QK.softmax(-1)[:, : example.n_tokens]

    def _add_queries(
        self, example: ExampleRows, queries: range, matches: Sequence[Match], sums: ExampleSums, *, shape: bool
    ) -> None:
        position_Q1 = torch.arange(queries.start, queries.stop)[:, None]
        pairs = _Pairs(sums, matches, position_Q1, shape=shape)
        running = _Softmax(self._spec, self._n_heads, len(queries), pairs.n_factors, self._dtype, shape=shape)
        query_QHD = self._query.rows(example.rows, queries)
        query_HQD = query_QHD.transpose(0, 1).contiguous().mul_(self._spec.scale)
        end = queries.stop if self._spec.causal else example.n_tokens  # no match looks ahead
        for start in range(0, end, self._side):
            keys = range(start, min(start + self._side, example.n_tokens))
            position_1K = torch.arange(keys.start, keys.stop)[None]
            if not self._sees(queries, keys):
                pairs.count(position_1K)
                continue
            factor_QFK = pairs.factors(position_1K, self._dtype)
            hidden_QK = None if self._sees_all(queries, keys) else ~self._visible(position_Q1, position_1K)
            key_KHD = self._key.rows(example.rows, keys)
            for heads in self._slices:
                score_HQK = self._scores(query_HQD[heads], key_KHD, heads)
                running.add(heads, score_HQK, factor_QFK, hidden_QK, has_first=start == 0)
        sums.add(running.sums())
        pairs.finish()
        if shape:
            sums.add_shape(*running.shape(), position_Q1[:, 0])

    def _scores(self, query_HQD: Tensor, key_KHD: Tensor, heads: slice) -> Tensor:
        """Return the scores of a tile for some heads, (heads, queries, keys); heads of a group use the same keys."""
        n_heads, n_queries, width = query_HQD.shape
        group = self._n_heads // self._n_key_heads
        first = heads.start // group
        key_HDK = key_KHD[:, first : first + max(1, n_heads // group)].permute(1, 2, 0)
        grouped = query_HQD.reshape(key_HDK.shape[0], -1, width)
        score_HQK = torch.bmm(grouped, key_HDK).view(n_heads, n_queries, -1)
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
    """Rows of one site, read ahead and kept until others are needed, so that no chunk is decoded twice.

    Args:
        site: The site.
        height: Most rows that are kept.
        piece: Most rows that are read at a time, which takes more memory than keeping them.
        end: Number of the row after the last one that will be needed.
        dtype: Type of the values.
    """

    def __init__(self, site: ArchiveArray, height: int, piece: int, end: int, dtype: torch.dtype) -> None:
        self._site = site
        self._height = height
        self._piece = piece
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
            self._values = torch.empty(self._stop - start, *self._site.shape[1:], dtype=self._dtype)
            first = start
            while first < self._stop:
                last = min(self._stop, (first // self._piece + 1) * self._piece)  # chunks end at multiples
                self._values[first - start : last - start] = self._site.torch(slice(first, last))
                first = last
        return self._values[start - self._start : stop - self._start]


class _Softmax:
    """A softmax over keys that come in tiles, and the sums of its weights times factors, in float64.

    Args:
        spec: How weights follow from scores; its sinks take their share.
        n_heads: Number of heads.
        n_queries: Number of queries.
        n_factors: Number of factors; the first is 1.
        dtype: Type of the scores.
        shape: Whether entropies and greatest weights are needed.
    """

    def __init__(
        self, spec: AttentionSpec, n_heads: int, n_queries: int, n_factors: int, dtype: torch.dtype, *, shape: bool
    ) -> None:
        lowest = torch.finfo(dtype).min
        self._highest_HQ = torch.full((n_heads, n_queries), lowest, dtype=dtype)
        self._sinks_HQ: Tensor | None = None
        if spec.sinks is not None:
            self._sinks_HQ = torch.tensor(spec.sinks, dtype=dtype)[:, None].expand(n_heads, n_queries)
            self._highest_HQ = self._sinks_HQ.clone()
        self._sum_HQF = torch.zeros(n_heads, n_queries, n_factors, dtype=torch.float64)
        self._shape = shape
        self._logs_HQ = torch.zeros(n_heads, n_queries, dtype=torch.float64)  # weights times scores below the highest
        self._strongest_HQ = torch.full((n_heads, n_queries), -torch.inf, dtype=dtype)  # score, first key left out

    def add(
        self, heads: slice, score_HQK: Tensor, factor_QFK: Tensor, hidden_QK: Tensor | None, *, has_first: bool
    ) -> None:
        """Add a tile of scores of some heads, which is overwritten.

        Args:
            heads: The heads.
            score_HQK: Their scores.
            factor_QFK: The factors of the pairs.
            hidden_QK: The keys that queries do not see; None if they see all.
            has_first: Whether the first key is that of the example.
        """
        if hidden_QK is not None:
            score_HQK.masked_fill_(hidden_QK, -torch.inf)
        tile_HQ, before_HQ = score_HQK.amax(-1), self._highest_HQ[heads]
        highest_HQ = torch.maximum(before_HQ, tile_HQ)
        sunk_HQ = before_HQ.double() - highest_HQ
        shrunk_HQ = sunk_HQ.exp()
        sum_HQF = self._sum_HQF[heads]
        if self._shape:
            others_HQ = _greatest(score_HQK[..., 1:]) if has_first else tile_HQ
            self._strongest_HQ[heads] = torch.maximum(self._strongest_HQ[heads], others_HQ)
            score_HQK.sub_(highest_HQ[..., None])
            weight_HQK = score_HQK.exp()
            if hidden_QK is not None:
                score_HQK.masked_fill_(hidden_QK, 0)
            logs_HQ = score_HQK.mul_(weight_HQK).sum(-1)
            self._logs_HQ[heads] = (self._logs_HQ[heads] + sunk_HQ * sum_HQF[..., 0]) * shrunk_HQ + logs_HQ
        else:
            weight_HQK = score_HQK.sub_(highest_HQ[..., None]).exp_()
        self._highest_HQ[heads] = highest_HQ
        tile_QHF = torch.bmm(weight_HQK.transpose(0, 1), factor_QFK.transpose(1, 2))
        sum_HQF.mul_(shrunk_HQ[..., None]).add_(tile_QHF.transpose(0, 1))

    def sums(self) -> Tensor:
        """Return the weights times each factor, summed over queries and keys, float64, (heads, factors)."""
        return (self._sum_HQF / self._total()[..., None]).sum(1)

    def shape(self) -> tuple[Tensor, Tensor]:
        """Return the entropy and the greatest weight of each query, the first key left out, float64, (heads, Q)."""
        total_HQ = self._total()
        entropy_HQ = (self._sum_HQF[..., 0] * total_HQ.log() - self._logs_HQ) / total_HQ
        return entropy_HQ, (self._strongest_HQ.double() - self._highest_HQ).exp() / total_HQ

    def _total(self) -> Tensor:
        total_HQ = self._sum_HQF[..., 0]
        if self._sinks_HQ is None:
            return total_HQ
        return total_HQ + (self._sinks_HQ.double() - self._highest_HQ).exp()


def _greatest(values: Tensor) -> Tensor:
    """Return the greatest values of the last axis; minus infinity if it is empty."""
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -torch.inf)


Weights: TypeAlias = StoredPattern | QueriesAndKeys


def _too_small(most_bytes: int, what: str, least: int) -> str:
    return f"at most {most_bytes:,} bytes were allowed, but {what} need {least:,} at a time: allow more memory"
