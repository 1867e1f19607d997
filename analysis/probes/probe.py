"""Linear probes on many sites: how well a linear function of the rows predicts a column, compared with a control.

A probe is fitted by passes over the rows, each a sum (`residua.analysis.probes.passes`). If there are sites enough for
all workers and their rows fit, each site goes to one worker, which makes all its passes. Otherwise workers share each
pass; several sites are then fitted side by side, as many as workers can keep the rows of, so that workers have work
between the passes over one of them. The sums are the same in all cases, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from os import PathLike
from threading import Event
from typing import Any
from uuid import uuid4

import pyarrow as pa

from residua.analysis.probes.controls import Split
from residua.analysis.probes.files import write_probe
from residua.analysis.probes.passes import Passes
from residua.analysis.probes.pooling import Pool, check_pool
from residua.analysis.probes.progress import PassBar, SiteReport
from residua.analysis.probes.rows import SiteRows, site_rows
from residua.analysis.probes.site import SiteProbe, check_memory, fits_one_worker, probe_site
from residua.analysis.probes.target import GivenTarget, Task, summarise
from residua.analysis.rows.site_rows import width_of
from residua.analysis.support.cluster import INLINE, Cluster, connect, or_inline
from residua.analysis.support.kept import let_go
from residua.analysis.support.threads import one_thread
from residua.store.base.errors import AnalysisError
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.storage.place import result_folder

_ROWS_PER_CHANNEL = 4  # of a leaf of a regression, so that the covariance it returns is no larger than what it reads

_COLUMNS = ("site", "layer", "target", "n_train", "n_test", "n_left_out", "penalty")
_SCORES = {
    "classification": (
        *("n_classes", "accuracy", "balanced_accuracy", "auc", "majority_accuracy", "majority_balanced_accuracy"),
        *("control_accuracy", "control_balanced_accuracy", "control_majority_accuracy"),
        *("not_learned", "not_tested", "converged"),
    ),
    "regression": ("r2", "rmse", "baseline_r2", "baseline_rmse", "control_r2", "control_baseline_r2"),
}
_TYPES = {
    **dict.fromkeys(("site", "target"), pa.string()),
    **dict.fromkeys(("layer", "n_train", "n_test", "n_left_out", "n_classes"), pa.int64()),
    **dict.fromkeys(("not_learned", "not_tested"), pa.list_(pa.string())),
    "converged": pa.bool_(),
}


def probe(
    archive: Archive | str | PathLike[str],
    target: str | Any,
    sites: str | Iterable[str] = "*",
    *,
    task: Task | None = None,
    where: str | None = None,
    pool: Pool | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    group: str | None = None,
    as_numbers: bool = False,
    save: str | PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cluster: Cluster | None = None,
) -> pa.Table:
    """Fit a linear probe for `target` to each of `sites`, and test it on held-out documents.

    Classes are fitted by logistic regression and numbers by ridge regression, both exactly, on standardised channels
    (`residua.analysis.probes.linear_probe`). A fifth of the documents that are not held out chooses the penalty; the
    probe is then fitted to all of them. The windows of a document, and documents or windows of equal content, are held
    out together. The control is the same probe with the same penalty, for labels that say nothing about the rows: if
    all rows of a document have the same label, labels permuted among the documents (Hewitt and Liang 2019, "Designing
    and Interpreting Probes with Control Tasks").

    Args:
        archive: The archive, or its path or address.
        target: ``token`` or ``position`` of the row; a column of the example table, with one value per example or a
            list with one a token; or a condition such as ``position > 10``. Or the values themselves: an array, a list,
            or a series of pandas or polars with one for each example or each row; where there is none (None, NaN), rows
            are left out.
        sites: The sites, for example ``resid_post.*``.
        task: ``classification`` or ``regression``; None: classification of texts, of token ids, of true and false, and
            of whole numbers if there are at most 16 different ones; else regression.
        where: Use only these rows, for example ``position > 0``.
        pool: Make one row of the chosen rows of each example: the ``last``, their ``mean``, or the ``max`` of each
            channel. None: every row counts for itself.
        test_fraction: Share of the documents that is held out; of those of each class, if rows of an example have one
            class.
        seed: Random seed for the held-out split and the control.
        group: What else belongs together and is held out together: a column such as ``author``. ``source_index``:
            documents alone, even if they are equal. ``example``: each example for itself, even windows of one document;
            the control then shows what leaks.
        as_numbers: Regress token ids, and texts by their alphabetical rank, although such numbers have no size.
        save: Folder to write the probes to, or an address in a bucket, one folder for each site; `LinearProbe.load`
            reads them.
        storage_options: For `save` in a bucket, as for `residua.open`.
        cluster: Where to compute; by default in this process.

    Returns:
        One line for each site: site, layer (null for a site outside the layers), target, n_train, n_test, n_left_out
        (rows with a NaN or an infinity), penalty. For a classification also n_classes, accuracy, balanced_accuracy
        (mean over classes that are tested), auc (two classes), majority_accuracy and majority_balanced_accuracy (of
        always answering the most common training class), control_accuracy, control_balanced_accuracy,
        control_majority_accuracy (of always answering the control's most common training class), not_learned and
        not_tested (names of the classes without a row to learn from, or to test on), converged. For a regression also
        r2, rmse, baseline_r2 and baseline_rmse (of always answering the training mean), control_r2 and
        control_baseline_r2. All scores are on held-out documents.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: The target cannot be predicted; the message says why.
        NotCapturedError: Rows are pooled, and the archive is not finished.
        OSError: The place `save` cannot be written; this is tried before anything is computed.
    """
    if task not in (None, "classification", "regression"):
        raise AnalysisError(f"the task {task!r} is unknown: choose classification or regression")
    if seed < 0:
        raise AnalysisError(f"the seed is {seed}: give a number of at least 0")
    archive, cluster = open_archive(archive).of_sites(sites), or_inline(cluster)
    names = archive.select(sites)
    if pool is not None:
        check_pool(archive, pool)
    wanted = target if isinstance(target, str) else GivenTarget.of(archive, target)
    with nullcontext() if save is None else result_folder(save, storage_options) as folder:
        split = Split(test_fraction, seed, group)
        found = summarise(archive, wanted, where=where, task=task, split=split, pool=pool, as_numbers=as_numbers)
        analysis = uuid4().hex
        per_channel = _ROWS_PER_CHANNEL if found.task == "regression" else 0
        jobs = [
            site_rows(
                archive,
                name,
                wanted,
                where,
                found,
                pool=pool,
                analysis=analysis,
                memory=cluster.memory_limit,
                least_rows=per_channel * width_of(archive, name),
            )
            for name in names
        ]
        for job in jobs:
            check_memory(job)
        probed: dict[int, SiteProbe] = {}
        try:
            for number, answer in _probed(jobs, cluster, f"probes of {found.text}"):
                probed[number] = answer
                if folder is not None:
                    write_probe(folder / parse_site(names[number]).path.removeprefix("sites/"), answer.probe)
        finally:
            cluster.let_go(analysis)
    schema = pa.schema([(name, _TYPES.get(name, pa.float64())) for name in (*_COLUMNS, *_SCORES[found.task])])
    return pa.Table.from_pylist([probed[number].line for number in range(len(names))], schema=schema)


def _probed(jobs: Sequence[SiteRows], cluster: Cluster, label: str) -> Iterator[tuple[int, SiteProbe]]:
    """Yield number and probe of each site as it is done."""
    bar = PassBar(cluster, label, len(jobs), jobs[0].summary.task)
    try:
        n_whole = _n_whole(jobs, cluster)
        yield from _by_site(jobs[:n_whole], cluster, label, bar)
        yield from ((n_whole + number, found) for number, found in _side_by_side(jobs[n_whole:], cluster, bar))
    finally:
        bar.close()


def _n_whole(jobs: Sequence[SiteRows], cluster: Cluster) -> int:
    """Return how many sites go to one worker each: as many as keep all workers at work for about the same time.

    Passes that workers share cost messages and waiting, which small sites do not repay.
    """
    if cluster.n_workers == 1 or not all(fits_one_worker(job) for job in jobs):
        return 0
    n_last = len(jobs) % cluster.n_workers
    is_nearly_all = 4 * n_last >= 3 * cluster.n_workers
    return len(jobs) if is_nearly_all else len(jobs) - n_last


def _by_site(jobs: Sequence[SiteRows], cluster: Cluster, label: str, bar: PassBar) -> Iterator[tuple[int, SiteProbe]]:
    """Yield number and probe of each site, which one worker fits by itself."""
    sites = [bar.site() for _ in jobs]

    def hear(number: int, report: tuple[float, ...]) -> None:
        n_passes, loss = report
        sites[number].moved(n_passes)
        bar.loss(loss)

    for number, found in cluster.map(_fit_whole, jobs, label=label, on_report=hear):
        sites[number].done()
        yield number, found


def _fit_whole(rows: SiteRows, send: Callable[[tuple[float, float]], object]) -> SiteProbe:
    """Fit the probe of a site in this process, with the sums that several workers would find."""
    report = SiteReport(send)
    with connect(INLINE, memory_limit=rows.memory) as here:
        try:
            return probe_site(Passes(here, rows, number=0, advance=report.moved), report)
        finally:
            let_go(rows.analysis, rows.keys)


def _side_by_side(jobs: Sequence[SiteRows], cluster: Cluster, bar: PassBar) -> Iterator[tuple[int, SiteProbe]]:
    """Yield number and probe of each site; all workers share the passes over its rows."""
    is_stopped = Event()

    def fit(number: int) -> SiteProbe:
        site = bar.site()

        def advance(share: float) -> None:
            if is_stopped.is_set():
                raise CancelledError
            site.moved(share)

        with one_thread():  # the same bits on any machine that sends the jobs
            found = probe_site(Passes(cluster, jobs[number], number=number, advance=advance), bar)
        site.done()
        return found

    if cluster.n_workers == 1 or len(jobs) < 2:  # in this thread: an interrupt ends it at once
        yield from ((number, fit(number)) for number in range(len(jobs)))
        return
    room = cluster.n_workers * jobs[0].most_kept
    n_together = min(len(jobs), 2 * cluster.n_workers, max(1, room // max(job.bytes_to_keep for job in jobs)))
    with ThreadPoolExecutor(n_together) as pool:
        futures = {pool.submit(fit, number): number for number in range(len(jobs))}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            is_stopped.set()
            pool.shutdown(cancel_futures=True)
