"""Linear probes on every site: how well a column can be read off the rows by a line, and how much of that is luck.

Sites are probed side by side, a task for each, which holds its rows in memory if they take at most a quarter of it
and else reads them again at every pass.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import pyarrow as pa

from residua.analysis.probes.controls import Split
from residua.analysis.probes.files import write_probe
from residua.analysis.probes.site import Job, SiteProbe, probe_site
from residua.analysis.probes.survey import Task, survey
from residua.analysis.rows.blocks import blocks
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import address
from residua.store.base.errors import AnalysisError
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

_COMMON = [
    ("site", pa.string()),
    ("layer", pa.int64()),
    ("target", pa.string()),
    ("n_train", pa.int64()),
    ("n_test", pa.int64()),
    ("n_left_out", pa.int64()),
    ("penalty", pa.float64()),
]
_SCHEMAS = {
    "classification": pa.schema(
        [
            *_COMMON,
            ("n_classes", pa.int64()),
            ("accuracy", pa.float64()),
            ("balanced_accuracy", pa.float64()),
            ("auc", pa.float64()),
            ("majority_accuracy", pa.float64()),
            ("control_accuracy", pa.float64()),
            ("control_balanced_accuracy", pa.float64()),
            ("converged", pa.bool_()),
        ]
    ),
    "regression": pa.schema(
        [
            *_COMMON,
            ("r2", pa.float64()),
            ("rmse", pa.float64()),
            ("baseline_r2", pa.float64()),
            ("baseline_rmse", pa.float64()),
            ("control_r2", pa.float64()),
        ]
    ),
}


def probe(
    archive: Archive,
    target: str,
    sites: str | Iterable[str] = "*",
    *,
    task: Task | None = None,
    where: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    save: str | PathLike[str] | None = None,
    cluster: Cluster | None = None,
) -> pa.Table:
    """Fit a linear probe for `target` to each of `sites`, and test it on examples that it has not seen.

    Classes are fitted by logistic regression and numbers by ridge regression, both exactly, on standardised channels
    (`residua.analysis.probes.linear_probe`). A fifth of the examples that are not held out chooses the penalty; the
    probe is then fitted to all of them. The control is the same probe, with the same penalty, of labels that say
    nothing: where all rows of an example have one label, labels permuted among the examples.

    Args:
        archive: The archive.
        target: ``token`` or ``position`` of the row; a column of the example table, with one value an example or a
            list with one a token; or a condition such as ``position > 10``.
        sites: The sites, for example ``resid_post.*``.
        task: ``classification`` or ``regression``; None decides: classes are texts, true and false, and whole numbers
            if there are at most 16 of them.
        where: Takes only these rows, for example ``position > 0``.
        test_fraction: Share of the examples that is held out.
        seed: Of the choice of examples, and of the control.
        save: A folder for the probes, one folder a site; `LinearProbe.load` reads them.
        cluster: Where to compute; by default in this process.

    Returns:
        A line a site: site, layer (null for a site outside the blocks), target, n_train, n_test, n_left_out (rows with
        a NaN or an infinity), penalty; of a classification n_classes, accuracy, balanced_accuracy (mean over classes),
        auc (two classes), majority_accuracy (always the commonest training class), control_accuracy,
        control_balanced_accuracy, converged; of a regression r2, rmse, baseline_r2 and baseline_rmse (always
        the training mean), control_r2. All scores are of held-out examples.

    Raises:
        UnknownSiteError: `sites` names no stored site.
        AnalysisError: The target cannot be predicted; the message says why.
    """
    if task not in (None, "classification", "regression"):
        raise AnalysisError(f"the task {task!r} is not known: a probe does classification or regression")
    if seed < 0:
        raise AnalysisError(f"the seed is {seed}: it must be at least 0")
    names, cluster = archive.select(sites), or_inline(cluster)
    split = Split(test_fraction, seed)
    found = survey(archive, target, where=where, task=task, split=split)
    parts = blocks(archive)
    jobs = [Job(address(archive), name, parts, target, where, split, found, cluster.memory_limit) for name in names]
    probed: dict[int, SiteProbe] = {}
    for number, answer in cluster.map(probe_site, jobs, label=f"probes of {target}"):
        probed[number] = answer
        if save is not None:
            write_probe(Path(save) / parse_site(names[number]).path.removeprefix("sites/"), answer.probe)
    lines = [probed[number].line for number in range(len(names))]
    return pa.Table.from_pylist(lines, schema=_SCHEMAS[found.task])
