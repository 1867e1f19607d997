"""Scores of attention heads on a block of tokens that is repeated: induction, and what it is made of.

Four scores a head, each a mean over queries of the attention to the keys that its definition names, all in
`residua.analysis.attention.token_matches`:

- ``induction``: the stripe. To the one key that followed the same token one period before; over the queries of the
  second and later copies.
- ``prefix_matching``: to all keys that followed an earlier occurrence of the query's token (Olsson et al. 2022,
  "In-context Learning and Induction Heads"); over the queries whose token occurred before.
- ``previous_token``: to the key just before; over all queries but the first, a BOS left out on both sides.
- ``duplicate_token``: to all earlier occurrences of the query's token (Wang et al. 2022); over the queries whose
  token occurred before.

Every query has the same weight, whichever example it is in.
"""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from residua.analysis.attention.jobs import MOST_BYTES, AttentionJob, Source, attention_jobs, example_sums, run_jobs
from residua.analysis.attention.token_matches import Match, duplicate_token, prefix, previous_token, stripe
from residua.analysis.attention.weights import ExampleSums, Floats
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.open_archives import opened
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive

SCORES = ("induction", "previous_token", "duplicate_token", "prefix_matching")
PERIOD_COLUMN = "period"


class _Sums(NamedTuple):
    """Summed weights, float64, (scores, heads), and the number of queries that they are of, int64, (scores)."""

    matched: Floats
    n_queries: npt.NDArray[np.int64]


def induction_scores(
    archive: Archive | str | PathLike[str],
    *,
    period: int | None = None,
    bos: bool | None = None,
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    cluster: Cluster | None = None,
    most_bytes: int = MOST_BYTES,
) -> pa.Table:
    """Score every head of an archive whose examples are blocks of tokens, each repeated.

    Args:
        archive: The archive, or its path. It holds `pattern` sites, or `q` and `k` sites with all positions.
        period: Tokens of a block; None: what the column ``period`` of the example table says.
        bos: Whether a token stands in front of the first block; None: found out from the tokens of each example.
        layers: Layers to score; None: all that can be.
        source: ``pattern`` or ``qk``; None: patterns where they are stored.
        cluster: Where the jobs run, from `residua.analysis.support.cluster.connect`; None: in this process.
        most_bytes: Memory that one job takes at most, besides the tokens of an example.

    Returns:
        One line a head, with the columns ``layer`` and ``head`` (int32) and, float64, ``induction``,
        ``previous_token``, ``duplicate_token`` and ``prefix_matching``; see the module's head. A score is null if no
        stored query has a key that counts for it.

    Raises:
        AnalysisError: An example is no repeated block, or the archive lacks what the weights follow from.
        NotCapturedError: The archive is not captured to its end.

    Example:
        >>> residua.induction_scores("ind.zarr", period=50).sort_by([("induction", "descending")])  # doctest: +SKIP
    """
    archive = archive if isinstance(archive, Archive) else Archive(archive)
    if period is not None and period < 2:
        raise AnalysisError(f"period is {period}: a repeated block has at least two tokens")
    if period is None and PERIOD_COLUMN not in archive.example_table.column_types():
        raise AnalysisError(
            f"{archive.path} has no column {PERIOD_COLUMN!r} in its example table: say the period, which is the "
            "number of tokens after which an example repeats itself"
        )
    jobs = attention_jobs(archive, layers=layers, source=source, most_bytes=most_bytes)
    score = partial(_score, period=period, bos=bos)
    found = run_jobs(score, jobs, cluster=cluster, label="scoring heads")
    return _table({layer: _added(sums) for layer, sums in found.items()})


def repeats_from(tokens: Tensor, period: int, bos: bool | None) -> int | None:
    """Return the position at which `tokens` begin to be a block of `period` tokens, repeated; None if they are not.

    It is 1 behind a BOS and 0 without. The last copy may be cut short.
    """
    for start in (0, 1) if bos is None else (int(bos),):
        body = tokens[start:]
        if len(body) > period and bool((body[period:] == body[:-period]).all()):
            return start
    return None


def _score(job: AttentionJob, *, period: int | None, bos: bool | None) -> _Sums:
    """Sum one job's scores over its queries."""
    periods = _periods(job) if period is None else [period] * (job.last - job.first)

    def matches(example: int, tokens: Tensor) -> Sequence[Match]:
        length = periods[example - job.first]
        start = repeats_from(tokens, length, bos)
        if start is None:
            with_bos = {None: "with or without a BOS", True: "behind a BOS", False: "from its first token on"}[bos]
            raise AnalysisError(
                f"example {example} of {job.path}, {len(tokens)} tokens, does not repeat itself after {length} tokens, "
                f"{with_bos}: say another period, or capture sequences that do"
            )
        return (
            stripe(length, start=start),
            previous_token(start=start),
            duplicate_token(tokens, start=start),
            prefix(tokens, start=start),
        )

    return _added(list(example_sums(job, matches)))


def _added(parts: Sequence[_Sums | ExampleSums]) -> _Sums:
    matched: Floats = np.sum([part.matched for part in parts], axis=0)
    n_queries: npt.NDArray[np.int64] = np.sum([part.n_queries for part in parts], axis=0)
    return _Sums(matched, n_queries)


def _periods(job: AttentionJob) -> list[int]:
    column = opened(job.path).example_table.table([PERIOD_COLUMN]).column(PERIOD_COLUMN)
    found: list[int] = column.slice(job.first, job.last - job.first).to_pylist()
    wrong = next((n for n, value in enumerate(found) if type(value) is not int or value < 2), None)
    if wrong is not None:
        raise AnalysisError(
            f"example {job.first + wrong} of {job.path} has {found[wrong]!r} in the column {PERIOD_COLUMN!r}: say the "
            "period yourself"
        )
    return found


def _table(layers: dict[int, _Sums]) -> pa.Table:
    columns: dict[str, list[int | float | None]] = {name: [] for name in ("layer", "head", *SCORES)}
    for layer, (matched, n_queries) in layers.items():
        for head in range(matched.shape[1]):
            columns["layer"].append(layer)
            columns["head"].append(head)
            for name, total, count in zip(SCORES, matched[:, head], n_queries, strict=True):
                columns[name].append(float(total / count) if count else None)
    types = {name: pa.float64() if name in SCORES else pa.int32() for name in columns}
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
