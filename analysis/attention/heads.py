"""What every attention head looks at: the six measures of HeadVis, from stored queries and keys or patterns.

The measures are those that HeadVis computes (Luger, Kamath et al. 2026, "HeadVis: An Interactive Tool For Investigating
Attention Heads", transformer-circuits.pub/2026/headvis; its data format is in ``data_pipeline.py`` of
github.com/anthropics/headvis), under its names:

- ``self_attention_score``: the attention of a token to itself, mean over queries.
- ``previous_token_score``: the attention to the token before, mean over all queries but the first of each example.
- ``pattern_entropy``: the Shannon entropy of a query's attention, in nats, mean over queries.
- ``qk_distance``: the distance of query and key in tokens, mean over all pairs, each weighted by its attention.
- ``qk_distance_variance``: the variance of that distance, in tokens squared, with the same weights.
- ``induction_score``: the attention to all tokens that followed an earlier occurrence of the query's token, mean over
  the queries whose token occurred before.

Every query has the same weight, whichever example it is in. The first token of an example takes part as any other. What
attention sinks take belongs to no key: it is missing in the scores and in the entropy, and the distances do not see it.
"""

from collections.abc import Mapping, Sequence
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
from residua.analysis.attention.token_matches import Match, prefix, previous_token, self_attention
from residua.analysis.attention.weights import ExampleSums, Floats
from residua.analysis.support.cluster import Cluster
from residua.store.base.sizes import Size
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive

MEASURES = (
    "self_attention_score",
    "previous_token_score",
    "pattern_entropy",
    "qk_distance",
    "qk_distance_variance",
    "induction_score",
)


class HeadMeasures(NamedTuple):
    """The measures of the heads, and what each looked at most strongly in every example.

    Attributes:
        table: One line per head: ``layer``, ``head`` (int32) and the measures (float64).
        strongest: By layer, the greatest weight in each example without its first query and key, float32, (examples,
            heads).
        jobs: The jobs that found them.
    """

    table: pa.Table
    strongest: dict[int, npt.NDArray[np.float32]]
    jobs: list[AttentionJob]


class _Sums(NamedTuple):
    """Sums of one job: float64, (heads) or (matches, heads); the queries of each match, int64."""

    matched: Floats
    n_queries: npt.NDArray[np.int64]
    total: Floats
    entropy: Floats
    distance: Floats
    squared_distance: Floats
    strongest: npt.NDArray[np.float32]


def measure_heads(
    archive: Archive | str | PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    cluster: Cluster | None = None,
    most_bytes: Size = MOST_BYTES,
    job_pairs: int = JOB_PAIRS,
) -> HeadMeasures:
    """Measure every head of an archive; arguments and errors are those of `residua.heads`."""
    archive = open_archive(archive)
    jobs = attention_jobs(archive, layers=layers, source=source, most_bytes=most_bytes, job_pairs=job_pairs)
    found = run_jobs(_measure, jobs, cluster=cluster, label="measuring heads")
    table = head_table({layer: _measures(sums) for layer, sums in found.items()})
    strongest = {layer: np.concatenate([one.strongest for one in sums]) for layer, sums in found.items()}
    return HeadMeasures(table, strongest, jobs)


def _measure(job: AttentionJob) -> _Sums:
    """Sum one job's measures over its queries."""

    def matches(_: int, tokens: Tensor) -> Sequence[Match]:
        return self_attention(), previous_token(), prefix(tokens)

    return _added(list(example_sums(job, matches, shape=True)))


def _added(sums: Sequence[ExampleSums]) -> _Sums:
    return _Sums(
        matched=np.sum([one.matched for one in sums], axis=0),
        n_queries=np.sum([one.n_queries for one in sums], axis=0),
        total=np.sum([one.total for one in sums], axis=0),
        entropy=np.sum([one.entropy for one in sums], axis=0),
        distance=np.sum([one.distance for one in sums], axis=0),
        squared_distance=np.sum([one.squared_distance for one in sums], axis=0),
        strongest=np.stack([one.strongest for one in sums]).astype(np.float32),
    )


def _measures(jobs: Sequence[_Sums]) -> Mapping[str, list[float | None]]:
    """Return the measures of a layer's heads; None where there is nothing to take a mean of."""
    matched, n_queries, total, entropy, distance, squared = (
        np.sum([job[field] for job in jobs], axis=0) for field in range(6)
    )
    own, previous, induction = (_means(sums, count) for sums, count in zip(matched, n_queries, strict=True))
    mean_distance = [one / weight if weight else None for one, weight in zip(distance, total, strict=True)]
    variance = [
        None if mean is None else max(0.0, one / weight - mean**2)
        for one, weight, mean in zip(squared, total, mean_distance, strict=True)
    ]
    columns = (own, previous, _means(entropy, n_queries[0]), mean_distance, variance, induction)
    return dict(zip(MEASURES, columns, strict=True))


def _means(sums: Floats, count: int) -> list[float | None]:
    return [float(one / count) if count else None for one in sums]
