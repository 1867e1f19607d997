"""The direction between two kinds of rows: the difference of their means, in float64 and in one pass."""

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.site_rows import pieces, runs, width_of
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.moments import Moments
from residua.analysis.support.open_archives import Location, location, opened
from residua.analysis.support.sums import OrderedSum
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.selection.row_filter import RowFilter

_TASK_ROWS = 2**18


class _Job(NamedTuple):
    location: Location
    site: str
    blocks: Sequence[Block]
    condition: str
    other: str | None
    where: str | None


class _Means(NamedTuple):
    """Means of the rows that meet the condition, and of the others."""

    chosen: Moments
    rest: Moments

    def merge(self, other: "_Means") -> "_Means":
        return _Means(self.chosen.merge(other.chosen), self.rest.merge(other.rest))


def direction(
    archive: Archive | str | PathLike[str],
    condition: str,
    other: str | None = None,
    *,
    site: str,
    where: str | None = None,
    unit: bool = False,
    cluster: Cluster | None = None,
) -> npt.NDArray[np.float64]:
    """Return the mean row that meets a condition, less the mean of the rest (Marks and Tegmark 2024).

    The result is a vector for an edit as it is: ``{"edit": "add", "site": site, "vector": found}``, or ``directions``
    of ``project_out``; and a direction for `residua.top`. Rows with a NaN or an infinity are left out.

    Args:
        archive: The archive, or its path or address.
        condition: Chooses rows, for example ``kind == "code"``.
        other: Chooses the rows of the second mean; by default those that do not meet `condition`.
        site: One stored site.
        where: Use only these rows, for example ``position > 0``, or ``is_last``.
        unit: Whether to give the result the length 1.
        cluster: Where to compute; by default in this process.

    Returns:
        float64 of the shape of a row: ``(width,)``, or ``(heads, head width)``.

    Raises:
        UnknownSiteError: `site` names no stored site.
        AnalysisError: It names several, a condition does not fit the archive, no row meets one, or the means are equal
            and have no direction.
        PlanError: Finite values of the site were lost when it was stored.

    Example:
        >>> residua.direction("acts.zarr", 'kind == "code"', site="resid_post.7")  # doctest: +SKIP
    """
    archive = open_archive(archive).of_sites(site)
    names = archive.select(site)
    if len(names) != 1:
        raise AnalysisError(f"{site!r} names {len(names)} sites: name one, for example {names[0]}")
    archive.refuse_losses(names, "a difference of means")
    for text in filter(None, (condition, other, where)):
        RowFilter.parse(text).mask(archive, 0, 0)  # finds wrong names before rows are read
    jobs = [
        _Job(location(archive), names[0], run, condition, other, where)
        for run in runs(blocks(archive), least_rows=_TASK_ROWS)
    ]
    found = _Means(*_no_rows(width_of(archive, names[0])))
    if jobs:
        total = OrderedSum[_Means](len(jobs), _Means.merge)
        for number, means in or_inline(cluster).map(_means, jobs, label="means"):
            found = total.add(number, means) or found
    _require_rows(found, names[0], condition, other or f"not ({condition})")
    difference = found.chosen.mean - found.rest.mean
    length = float(np.linalg.norm(difference))
    if unit and not length:
        raise AnalysisError(f"both means of {names[0]} are equal, and have no direction: choose another condition")
    return (difference / length if unit else difference).reshape(archive[names[0]].shape[1:])


def _require_rows(found: _Means, site: str, condition: str, other: str) -> None:
    for means, text in ((found.chosen, condition), (found.rest, other)):
        if not means.n:
            raise AnalysisError(
                f"no chosen row of {site} meets {text!r}, and a difference of means needs rows of both kinds: choose "
                "another condition, or leave out the filter"
            )


def _no_rows(width: int) -> tuple[Moments, Moments]:
    return Moments(width, full=False), Moments(width, full=False)


def _means(job: _Job) -> _Means:
    """Return the means over the rows of one job; runs where the job runs."""
    archive = opened(job.location)
    first = RowFilter.parse(job.condition)
    second = RowFilter.parse(f"not ({job.condition})" if job.other is None else job.other)
    found = _Means(*_no_rows(width_of(archive, job.site)))
    for rows, values in pieces(archive, job.site, job.blocks, job.where):
        is_finite = np.isfinite(values).all(axis=1)
        for condition, moments in ((first, found.chosen), (second, found.rest)):
            mask = condition.mask(archive, int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
            moments.add(values[mask & is_finite])
    return found
