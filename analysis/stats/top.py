"""The rows with the largest dot product with a direction, and their text; memory does not grow with the rows."""

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.columns import ExampleColumns, examples_of
from residua.analysis.rows.site_rows import pieces, runs
from residua.analysis.stats.directions import full_row
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import Location, location, opened
from residua.store.base.errors import AnalysisError
from residua.store.examples.index import NO_TOKEN
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive

_CONTEXT = 10  # tokens of text on either side


class Best(NamedTuple):
    """Rows in the order of their scores, highest first; of equal scores the lower row comes first.

    Attributes:
        scores: float64.
        rows: Their numbers, int64.
        examples: The example of each, int64.
    """

    scores: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    examples: npt.NDArray[np.int64]


def no_rows() -> Best:
    """Return the best of no rows."""
    return Best(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


class _Job(NamedTuple):
    location: Location
    site: str
    blocks: Sequence[Block]
    direction: npt.NDArray[np.float64]
    k: int
    per_example: bool
    where: str | None


def top(
    archive: Archive | str | PathLike[str],
    site: str,
    *,
    direction: npt.ArrayLike | None = None,
    channel: int | None = None,
    head: int | None = None,
    k: int = 20,
    bottom: bool = False,
    per_example: bool = False,
    where: str | None = None,
    columns: Sequence[str] = (),
    cluster: Cluster | None = None,
    task_rows: int = 2**18,
) -> pa.Table:
    """Find the `k` captured rows of `site` with the largest dot product with a direction.

    A task keeps `k` rows, however many it reads. The dot product is computed in float64; a row where it is NaN has no
    score.

    Args:
        archive: The archive, or its path or address.
        site: One stored site.
        direction: One number for each value of a row; of a site with heads (heads, head width), or with `head` one
            for each value of that head.
        channel: Instead of a direction: the number of one value of the row, or of `head`.
        head: A head of a site with heads; None: the full row.
        k: Number of rows.
        bottom: Find the smallest dot products instead.
        per_example: Take at most one row of an example, its best.
        where: Use only these rows, for example ``position > 0``.
        columns: Columns of the examples, or of side tables, to add to the table.
        cluster: Where to compute; by default in this process.
        task_rows: Fewest rows that a task reads.

    Returns:
        A table, the best first (of equal scores the lower row): score float64; row, example, position and token int64;
        text (the token between « and » in its context; null if the archive has no tokenizer); then `columns`.

    Raises:
        UnknownSiteError: `site` names no stored site.
        AnalysisError: Direction, channel or head does not fit the site, or no row has a score.
        DatasetError: The examples have no such column.
        PlanError: Finite values of the site were lost when it was stored.
    """
    archive = open_archive(archive).of_sites(site)
    name = _one_site(archive, site)
    archive.refuse_losses([name], "a search for the best rows")
    if k < 1:
        raise AnalysisError(f"the best {k} rows were asked for: ask for at least 1")
    more = ExampleColumns(archive, columns)
    wanted = full_row(archive, name, direction=direction, channel=channel, head=head) * (-1 if bottom else 1)
    jobs = [
        _Job(location(archive), name, run, wanted, k, per_example, where)
        for run in runs(blocks(archive), least_rows=task_rows)
    ]
    best = no_rows()
    for _, found in or_inline(cluster).map(_search, jobs, label="top rows"):
        best = kept(best, found, k, per_example=per_example)
    if not len(best.rows):
        raise AnalysisError(
            f"{name} has no row with a score: no row is captured, the filter selects none, or all scores are NaN"
        )
    found = described(archive, best, sign=-1 if bottom else 1)
    for column, values in more(best.rows).items():
        found = found.append_column(column, values)
    return found


def _one_site(archive: Archive, site: str) -> str:
    names = archive.select(site)
    if len(names) != 1:
        raise AnalysisError(f"{site!r} names {len(names)} sites: name one, for example {names[0]}")
    return names[0]


def _search(job: _Job) -> Best:
    """Return the best rows of one job; runs where the job runs."""
    archive = opened(job.location)
    best = no_rows()
    channels = np.flatnonzero(job.direction)  # a NaN in another channel does not count
    for rows, values in pieces(archive, job.site, job.blocks, job.where):
        with np.errstate(invalid="ignore"):
            scores = values[:, channels].astype(np.float64) @ job.direction[channels]
        ranked = ~np.isnan(scores)
        found = Best(scores[ranked], rows[ranked], examples_of(archive, rows)[ranked])
        best = kept(best, found, job.k, per_example=job.per_example)
    return best


def kept(first: Best, second: Best, k: int, *, per_example: bool) -> Best:
    """Return the best `k` rows of both; with `per_example` at most one row of an example."""
    scores = np.concatenate([first.scores, second.scores])
    rows = np.concatenate([first.rows, second.rows])
    examples = np.concatenate([first.examples, second.examples])
    if not per_example and len(scores) > k:
        candidates = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[-k])
        scores, rows, examples = scores[candidates], rows[candidates], examples[candidates]
    order = np.lexsort((rows, -scores))
    if per_example:
        order = order[np.sort(np.unique(examples[order], return_index=True)[1])]
    order = order[:k]
    return Best(scores[order], rows[order], examples[order])


def described(archive: Archive, best: Best, *, sign: int) -> pa.Table:
    """Return the table of `top` for rows whose scores were multiplied by `sign` before the best were kept."""
    rows = best.rows.tolist()
    has_text = archive.tokenizer is not None
    tokens = archive.rows.token.numpy(rows, dtype=np.int64)
    texts = [
        archive.text(row, _CONTEXT) if has_text and token != NO_TOKEN else None
        for row, token in zip(rows, tokens.tolist(), strict=True)
    ]
    return pa.table(
        {
            "score": pa.array(best.scores * sign + 0.0),
            "row": pa.array(best.rows),
            "example": pa.array(best.examples),
            "position": pa.array(archive.rows.position.numpy(rows, dtype=np.int64)),
            "token": pa.array(tokens),
            "text": pa.array(texts, pa.string()),
        }
    )
