"""How costs grow, against what people write by hand: `python benchmarks/sizes.py [probes] [passes]`.

Each section is a function of `SECTIONS` and returns a table; `docs/scale.md` draws the conclusions. Cases of a row are
run in turn in the same minutes, and ratios are taken within the row; the last column is the growth from the smallest to
the largest size, eight times as many rows.

`probes`: 20 classes from rows of width 256 in memory and in an archive (float32, `fast`). By hand: scikit-learn's
`StandardScaler` and `LogisticRegression` (L-BFGS, tol 1e-4, at most 300 iterations) on float32 rows in memory, one fit
for each of seven penalties on four fifths of the training rows, a fit of the best and one of the control on all of
them, and its scores. `residua.probe` does the same from the archive, read included, with one worker in this process.
Both use one thread; seconds are processor time. The step from one worker to two compares the longest way through the
probe: what is done once, and in each pass the share of the slower worker, as processor time, without Dask's messages.

`passes`: a sum over 10^3 and over 10^5 shards on two workers, of terms that cost nothing: jobs, what each is told, the
partial sums that it returns, and processor seconds for adding up, in this process and without Dask's messages.
"""

import argparse
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import machine, publish, table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from residua.analysis.probes.probe import probe
from residua.analysis.probes.site import LOGISTIC_PENALTIES
from residua.analysis.rows.blocks import Leaves
from residua.analysis.support.cluster import connect
from residua.analysis.support.sums import joined, shares, sum_share, total_of
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive

SITE = "resid_post.0"
WIDTH, N_CLASSES, N_TOKENS = 256, 20, 64
SIZES = (4_096, 32_768)  # rows
SHARD_ROWS = 2_048
MEMORY = "1GiB"

Rows = npt.NDArray[np.float32]


def make(folder: Path, n_rows: int) -> tuple[Archive, Rows, npt.NDArray[np.int64]]:
    """Write an archive of `n_rows` rows; return it with its rows and their classes."""
    rng = np.random.default_rng(0)
    by_example = rng.integers(0, N_CLASSES, n_rows // N_TOKENS)
    labels = np.repeat(by_example, N_TOKENS)
    mixing = rng.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
    means = rng.standard_normal((N_CLASSES, WIDTH), np.float32) * 0.15
    rows = (means[labels] + rng.standard_normal((n_rows, WIDTH), np.float32)) @ mixing
    path = folder / str(n_rows)
    site = SitePlan(name=SITE, row_shape=(WIDTH,), dtype="float32", codec="fast")
    with workspace(path) as made:
        writer = ExampleWriter(made / "examples")
        for label in by_example.tolist():
            ids = rng.integers(0, 50_000, N_TOKENS).astype(np.int32)
            writer.add(
                Example(input_ids=ids, positions=np.arange(N_TOKENS, dtype=np.int32), columns={"label": str(label)})
            )
        dataset = {"digest": writer.close().digest}
        plan = Plan(model={}, dataset=dataset, rules={}, sites=(site,), rows_per_shard=SHARD_ROWS, n_rows=n_rows)
        create_archive(made, path, plan, {})
    with ShardWriter(path, plan) as shards_:
        for index, first in enumerate(range(0, n_rows, SHARD_ROWS)):
            here = np.arange(first, min(first + SHARD_ROWS, n_rows))
            columns: dict[str, npt.NDArray[np.generic]] = {
                "token": here.astype(np.int32),
                "position": (here % N_TOKENS).astype(np.int32),
                "example": here // N_TOKENS,
            }
            shards_.submit(FilledShard(index=index, first_row=first, sites={SITE: rows[here]}, columns=columns))
    return Archive(path, threads=1), rows, labels


def by_hand(rows: Rows, labels: npt.NDArray[np.int64]) -> float:
    """Choose the penalty, fit the labels and a control, and score; return the accuracy."""
    rng = np.random.default_rng(1)
    groups = rng.permutation(len(rows) // N_TOKENS)
    order = (groups[:, None] * N_TOKENS + np.arange(N_TOKENS)).reshape(-1)
    n_test = len(order) // 5
    n_fit = n_test + (len(order) - n_test) // 5
    test, validation, fit = np.split(order, [n_test, n_fit])
    scaler = StandardScaler().fit(rows[order[n_test:]])
    scaled = scaler.transform(rows)

    def fitted(chosen: npt.NDArray[np.int64], truth: npt.NDArray[np.int64], penalty: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (penalty * len(chosen)), max_iter=300)
        return model.fit(scaled[chosen], truth[chosen])

    tried = [fitted(fit, labels, penalty) for penalty in LOGISTIC_PENALTIES]
    best = int(np.argmax([one.score(scaled[validation], labels[validation]) for one in tried]))
    train = order[n_test:]
    control = np.repeat(rng.permutation(labels[::N_TOKENS]), N_TOKENS)
    fitted(train, control, LOGISTIC_PENALTIES[best]).score(scaled[test], control[test])
    return float(
        balanced_accuracy_score(labels[test], fitted(train, labels, LOGISTIC_PENALTIES[best]).predict(scaled[test]))
    )


def cpu_seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a job in this process, and its result."""
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


class Divided:
    """This process as a cluster of `n_workers`: it makes their shares one after the other, and counts each one's time.

    Attributes:
        seconds: Processor time of the shares, by worker.
        waited: Of the slowest worker of each pass, added up: what the others and the fit wait for.
    """

    def __init__(self, inline: Any, n_workers: int) -> None:
        self.n_workers, self.memory_limit = 1, inline.memory_limit  # one site after the other
        self.bar, self.let_go, self.send = inline.bar, inline.let_go, inline.send
        self.seconds, self.waited = [0.0] * n_workers, 0.0

    def sum(self, term: Any, arguments: Any, n_leaves: int, *, merge: Any, **_: object) -> Any:
        """Return the sum, from the shares that a cluster would make and in its order."""
        divided = shares(n_leaves, 2 * len(self.seconds))
        here, parts = [0.0] * len(self.seconds), []
        for number, share in enumerate(divided):
            start = time.process_time()
            parts.append(sum_share(partial(term, *arguments), share, n_leaves, merge))
            here[number * len(here) // len(divided)] += time.process_time() - start
        self.seconds = [before + more for before, more in zip(self.seconds, here, strict=True)]
        self.waited += max(here)
        return total_of(joined(parts, n_leaves, merge))


def critical_seconds(archive: Archive, n_workers: int) -> float:
    """Return the processor time of the longest way through a probe on some workers, without Dask's messages."""
    with connect("inline", memory_limit=MEMORY) as inline:
        cluster: Any = Divided(inline, n_workers)
        seconds, _ = cpu_seconds(partial(probe, archive, "label", SITE, cluster=cluster))
    return float(seconds - sum(cluster.seconds) + cluster.waited)


def probes(folder: Path) -> str:
    """Compare probes of 20 classes."""
    lines, first = [], None
    for n_rows in SIZES:
        archive, rows, labels = make(folder, n_rows)
        with threadpool_limits(1):
            theirs, accuracy = cpu_seconds(partial(by_hand, rows, labels))
            ours, found = cpu_seconds(partial(probe, archive, "label", SITE))
            one, two = critical_seconds(archive, 1), critical_seconds(archive, 2)
        figures = (theirs, ours)
        first = first or figures
        lines.append(
            [
                f"{n_rows:,} rows",
                f"{theirs:.1f}",
                f"{ours:.1f}",
                f"{ours / theirs:.2f}",
                f"{one / two:.2f}",
                f"{accuracy:.3f} / {found['balanced_accuracy'][0].as_py():.3f}",
                f"{theirs / first[0]:.1f} / {ours / first[1]:.1f}",
            ]
        )
    head = ["", "by hand, s", "Residua, s", "ratio", "1 to 2 workers", "accuracy", "growth"]
    return table(head, lines)


def passes(_: Path) -> str:
    """Measure what a sum over 10^3 and over 10^5 shards costs besides its terms, on two workers."""
    lines = []
    for n_shards in (1_000, 100_000):
        leaves = Leaves(((0, n_shards * SHARD_ROWS),), SHARD_ROWS, SHARD_ROWS)
        divided = shares(len(leaves), 4)
        start = time.process_time()
        parts = [sum_share(lambda leaf: leaf, share, len(leaves), int.__add__) for share in divided]
        assert total_of(joined(parts, len(leaves), int.__add__)) == n_shards * (n_shards - 1) // 2
        seconds = time.process_time() - start
        n_partial = max(len(part) for part in parts)
        told = len(pickle.dumps((leaves, divided[0])))
        lines.append([f"{n_shards:,}", str(len(divided) + 1), str(told), str(n_partial), f"{seconds:.3f}"])
    return table(["shards", "jobs", "bytes that a job is told", "partial sums of a job", "s in all"], lines)


SECTIONS: dict[str, Callable[[Path], str]] = {"probes": probes, "passes": passes}


def main() -> None:
    """Measure and report."""
    made = argparse.ArgumentParser(description=__doc__ or "")
    made.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    made.add_argument("--out", type=Path, help="also write the tables to this file")
    made.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    options = made.parse_args()
    parts = [machine("numpy", "scikit-learn", "scipy", "dask", "distributed")]
    if unknown := set(options.sections) - set(SECTIONS):
        made.error(f"there is no section {min(unknown)}: choose from {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        folder = Path(tempfile.mkdtemp(prefix="residua-sizes-", dir=options.folder))
        try:
            parts.append(f"### {name}\n\n{SECTIONS[name](folder)}")
        finally:
            shutil.rmtree(folder)
    publish("\n\n".join(parts), options.out)


if __name__ == "__main__":
    main()
