"""Scores of attention heads on a repeated block of tokens: induction, and what it is made of.

Each of the four scores is a mean over queries of the attention to the keys that its definition names. The definitions
are in `residua.analysis.attention.token_matches`:

- ``induction``: the stripe, that is, the one key that followed the same token one period before; over the queries of
  the second and later copies.
- ``prefix_matching``: all keys that followed an earlier occurrence of the query's token (Olsson et al. 2022,
  "In-context Learning and Induction Heads"); over the queries whose token occurred before.
- ``previous_token``: the key just before; over all queries but the first. A BOS token is left out on both sides.
- ``duplicate_token``: all earlier occurrences of the query's token (Wang et al. 2022, "Interpretability in the Wild");
  over the queries whose token occurred before.

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

from residua.analysis.attention.jobs import (
    JOB_PAIRS,
    MOST_BYTES,
    AttentionJob,
    Source,
    attention_jobs,
    example_sums,
    head_table,
    run_jobs,
)
from residua.analysis.attention.token_matches import Match, duplicate_token, prefix, previous_token, stripe
from residua.analysis.attention.weights import ExampleSums, Floats
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.open_archives import opened
from residua.store.base.errors import AnalysisError
from residua.store.base.sizes import Size
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive

SCORES = ("induction", "previous_token", "duplicate_token", "prefix_matching")
PERIOD_COLUMN = "period"


class _Sums(NamedTuple):
    """Summed weights, float64, (scores, heads), and the number of queries behind them, int64, (scores)."""

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
    most_bytes: Size = MOST_BYTES,
    job_pairs: int = JOB_PAIRS,
) -> pa.Table:
    """Score every head of an archive in which each example is a repeated block of tokens.

    Args:
        archive: The archive, or its path. It holds `pattern` sites, or `q` and `k` sites with all positions.
        period: Tokens of a block; None: the value in the column ``period`` of the example table.
        bos: Whether a BOS token stands before the first block; None: detected from the tokens of each example.
        layers: Layers to score; None: all layers whose weights are known.
        source: ``pattern`` or ``qk``; None: patterns if they are stored.
        cluster: Where the jobs run, from `residua.analysis.support.cluster.connect`; None: in this process.
        most_bytes: Memory limit of a job, in bytes or as a text such as ``1GiB``, not counting the tokens of an
            example.
        job_pairs: Pairs of query and key that a job covers at most, if it has more than one example.

    Returns:
        One line for each head, with the columns ``layer`` and ``head`` (int32) and, float64, ``induction``,
        ``previous_token``, ``duplicate_token`` and ``prefix_matching``; see the module's head. A score is null if no
        stored query has a key that counts.

    Raises:
        AnalysisError: An example is not a repeated block, or the archive lacks the sites.
        NotCapturedError: The archive is not fully captured.

    Example:
        >>> residua.induction_scores("ind.zarr", period=50).sort_by([("induction", "descending")])  # doctest: +SKIP
    """
    archive = open_archive(archive)
    if period is not None and period < 2:
        raise AnalysisError(f"the period is {period}: a repeated block has at least two tokens")
    if period is None and PERIOD_COLUMN not in archive.example_table.column_types():
        raise AnalysisError(
            f"{archive.place} has no column {PERIOD_COLUMN!r} in its example table: give the period, which is the "
            "number of tokens after which an example repeats itself"
        )
    jobs = attention_jobs(archive, layers=layers, source=source, most_bytes=most_bytes, job_pairs=job_pairs)
    found = run_jobs(partial(_score, period=period, bos=bos), jobs, cluster=cluster, label="scoring heads")
    return head_table({layer: _means(_added(sums)) for layer, sums in found.items()})


def repeats_from(tokens: Tensor, period: int, bos: bool | None) -> int | None:
    """Return the position from which `tokens` repeat a block of `period` tokens, or None if they do not.

    It is 1 after a BOS token and 0 without one. The last copy may be incomplete.
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
            with_bos = {None: "with or without a BOS", True: "after a BOS", False: "from its first token on"}[bos]
            raise AnalysisError(
                f"example {example} of {job.location}, {len(tokens)} tokens, does not repeat itself after {length} "
                f"tokens, {with_bos}: give another period, or capture sequences that repeat"
            )
        return (
            stripe(length, start=start),
            previous_token(start=start),
            duplicate_token(tokens, start=start),
            prefix(tokens, start=start),
        )

    return _added(list(example_sums(job, matches)))


def _added(sums: Sequence[_Sums | ExampleSums]) -> _Sums:
    matched: Floats = np.sum([one.matched for one in sums], axis=0)
    n_queries: npt.NDArray[np.int64] = np.sum([one.n_queries for one in sums], axis=0)
    return _Sums(matched, n_queries)


def _means(sums: _Sums) -> dict[str, list[float | None]]:
    """Return each score of each head; None if there is no query."""
    return {
        name: [float(total / n_queries) if n_queries else None for total in totals]
        for name, totals, n_queries in zip(SCORES, sums.matched, sums.n_queries, strict=True)
    }


def _periods(job: AttentionJob) -> list[int]:
    column = opened(job.location).example_table.table([PERIOD_COLUMN]).column(PERIOD_COLUMN)
    found: list[int] = column.slice(job.first, job.last - job.first).to_pylist()
    wrong = next((n for n, value in enumerate(found) if type(value) is not int or value < 2), None)
    if wrong is not None:
        raise AnalysisError(
            f"example {job.first + wrong} of {job.location} has {found[wrong]!r} in the column {PERIOD_COLUMN!r}: give "
            "the period yourself"
        )
    return found
