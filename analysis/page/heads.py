"""Attention heads on a page: their patterns in a few examples, and scores that an analysis of heads wrote."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from residua.analysis.attention.jobs import MOST_BYTES, AttentionJob, attention_jobs, weights_of
from residua.analysis.attention.weights import ExampleRows
from residua.analysis.page.examples import Shown
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.open_archives import opened
from residua.store.base.errors import AnalysisError
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive
from residua.store.storage.mirror import fetched

_TABLES = ("heads.parquet", "measures.parquet")  # of residua induction, and of residua heads
_MOST_HEADS = 2**20
_MOST_TOKENS = 128  # of a pattern
_MOST_EXAMPLES = 12
_MOST_PATTERN_BYTES = 48 * 2**20  # of all patterns of a page
_LEVELS = 255


class Patterns(NamedTuple):
    """Patterns of one layer: for each example (heads, queries, keys) uint8, where 255 is a weight of 1."""

    layer: int
    weights: list[npt.NDArray[np.uint8]]


class PatternPlan(NamedTuple):
    """Which patterns a page shows.

    Attributes:
        jobs: One for each layer.
        examples: Their places among the shown examples.
        n_tokens: Tokens of each pattern.
        note: Why there are none, if the archive has what they come from; else empty.
    """

    jobs: list[AttentionJob]
    examples: list[int]
    n_tokens: list[int]
    note: str = ""


class _Job(NamedTuple):
    attention: AttentionJob
    examples: Sequence[int]
    n_tokens: Sequence[int]


def plan_patterns(archive: Archive, shown: Shown) -> PatternPlan:
    """Choose patterns: of all layers that have `pattern`, or `q` and `k`, and of a few examples with all positions."""
    kinds = {parse_site(site).kind for site in archive.sites}
    if "pattern" not in kinds and not {"q", "k"} <= kinds:
        return PatternPlan([], [], [])
    try:
        found = attention_jobs(archive, layers=None, source=None, most_bytes=MOST_BYTES)
    except AnalysisError as error:
        return PatternPlan([], [], [], f"attention patterns are not shown: {error}")
    if not archive.is_sealed:
        return PatternPlan([], [], [], "attention patterns are shown once the capture is finished")
    jobs = list({job.layer: job for job in found}.values())
    n_heads = sum(archive[f"{'pattern' if job.source == 'pattern' else 'q'}.{job.layer}"].shape[1] for job in jobs)
    examples: list[int] = []
    n_tokens: list[int] = []
    room = _MOST_PATTERN_BYTES
    for at, (rows, total) in enumerate(zip(shown.rows, shown.n_tokens, strict=True)):
        tokens = min(len(shown.tokens[at]), _MOST_TOKENS)
        room -= n_heads * tokens**2
        if len(examples) == _MOST_EXAMPLES or (examples and room < 0):
            break
        first, stop = archive.example_table.rows(shown.numbers[at])
        if rows.start == first and stop - first == total > 1:
            examples.append(at)
            n_tokens.append(tokens)
    return PatternPlan(jobs, examples, n_tokens)


def read_patterns(plan: PatternPlan, shown: Shown, *, cluster: Cluster) -> Iterator[Patterns]:
    """Yield the patterns of each layer, as it is done."""
    numbers = [shown.numbers[at] for at in plan.examples]
    jobs = [_Job(job, numbers, plan.n_tokens) for job in plan.jobs]
    for number, found in cluster.map(_patterns, jobs if numbers else [], label="attention patterns"):
        yield Patterns(plan.jobs[number].layer, found)


def _patterns(job: _Job) -> list[npt.NDArray[np.uint8]]:
    """Return the patterns of one layer; runs where the job runs."""
    found = []
    for example, n_tokens in zip(job.examples, job.n_tokens, strict=True):
        weights = np.nan_to_num(example_pattern(job.attention, example, n_tokens))
        found.append(np.rint(weights.clip(0, 1) * _LEVELS).astype(np.uint8))
    return found


def example_pattern(job: AttentionJob, example: int, n_tokens: int) -> npt.NDArray[np.float32]:
    """Return the attention weights of the first `n_tokens` tokens of an example, (heads, queries, keys).

    Args:
        job: The layer, and where its weights come from.
        example: Number of an example of which all positions are stored.
        n_tokens: Tokens, at most those of the example.
    """
    archive = opened(job.location)
    example_rows = ExampleRows.of(archive.example_table, example)
    weights = weights_of(archive, job._replace(first=example, last=example + 1))
    n_heads = archive[f"{'pattern' if job.source == 'pattern' else 'q'}.{job.layer}"].shape[1]
    found = np.empty((n_heads, n_tokens, n_tokens), np.float32)
    for head in range(n_heads):
        done = 0
        for _, weight_QK in weights.rows(example_rows, head):
            part = weight_QK[: n_tokens - done, :n_tokens].float().numpy()
            found[head, done : done + len(part)] = part
            done += len(part)
            if done == n_tokens:
                break
    return found


def read_scores(
    source: pa.Table | str | PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return scores of heads as JSON values: columns ``layer`` and ``head``, and one of numbers for each score.

    Args:
        source: A table such as `residua.induction_scores` or `residua.heads` returns, its Parquet file, or the folder
            that one of the two commands wrote; or the address of these.
        storage_options: For an address, as for `residua.open`.

    Raises:
        AnalysisError: It is no such table.
    """
    if isinstance(source, str | PathLike):
        with fetched(source, storage_options, names=_TABLES) as path:
            table = _read_table(path)
    else:
        table = source
    names = {field.name for field in table.schema if pa.types.is_floating(field.type)}
    lacks = {"layer", "head"} - set(table.column_names)
    if lacks or not names or not 0 < table.num_rows <= _MOST_HEADS:
        raise AnalysisError(
            f"a table of {table.num_rows:,} lines with the columns {', '.join(table.column_names) or 'none'} has no "
            "scores of heads: give the folder of residua heads or induction, or a table with layer, head and scores"
        )
    columns = [name for name in table.column_names if name in names]
    found = table.select(["layer", "head", *columns]).sort_by([("layer", "ascending"), ("head", "ascending")])
    return {"names": columns, **{name: found[name].to_pylist() for name in found.column_names}}


def _read_table(path: Path) -> pa.Table:
    if path.is_dir():
        path = next((path / name for name in _TABLES if (path / name).is_file()), path / _TABLES[0])
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise AnalysisError(f"scores of heads cannot be read from {path}: {error}") from error
