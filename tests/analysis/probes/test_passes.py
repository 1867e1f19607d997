"""Probes by passes over many leaves: the same bits from any workers, rows that are kept within bounds, many classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression, Ridge

from residua.analysis.probes import probe as probe_module
from residua.analysis.probes import rows as probe_rows
from residua.analysis.probes import site as probe_site
from residua.analysis.probes.controls import TEST, Split
from residua.analysis.probes.linear_probe import LinearProbe
from residua.analysis.probes.passes import Passes
from residua.analysis.probes.probe import probe
from residua.analysis.probes.target import summarise
from residua.analysis.support.cluster import connect
from residua.store.read.archive import Archive
from tests.analysis import cluster_jobs as jobs
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(1)
LENGTHS = tuple(RNG.integers(1, 30, 120).tolist())
EXAMPLE = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
N_ROWS, WIDTH, HEIGHT = len(EXAMPLE), 12, 64
LABEL = RNG.integers(0, 20, len(LENGTHS))
MEANS = RNG.standard_normal((20, WIDTH)) * 2
VALUES = (MEANS[LABEL[EXAMPLE]] + RNG.standard_normal((N_ROWS, WIDTH))) * np.exp(RNG.standard_normal(WIDTH)) + 30
SITES = {"resid_post.0": VALUES.astype(np.float32), "resid_post.1": VALUES[:, ::-1].astype(np.float32)}
COLUMNS: dict[str, list[object]] = {
    "label": [f"class {label:02}" for label in LABEL],
    "even": (LABEL % 2 == 0).tolist(),
    "score": (LABEL + 0.25).tolist(),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(
        tmp_path_factory.mktemp("passes") / "a.zarr", LENGTHS, SITES, columns=COLUMNS, rows_per_shard=HEIGHT
    )


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_rows, "_LEAF_BYTES", HEIGHT * WIDTH * 4)
    monkeypatch.setattr(probe_rows, "_LEAF_ROWS", HEIGHT)


def saved(folder: Path, site: str = "resid_post/0") -> Any:
    found: Any = LinearProbe.load(folder / site)
    return found


@pytest.mark.parametrize("target", ["even", "score"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_any_workers_find_the_same_bits(
    archive: Archive, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, is_whole: bool
) -> None:
    """Each site goes to one worker, or both workers share the passes over it."""
    shared: list[str] = []

    def counted(cluster: Any, rows: Any, **options: Any) -> Any:
        shared.append(rows.site)
        return Passes(cluster, rows, **options)

    here = probe(archive, target, save=tmp_path / "here")
    monkeypatch.setattr(probe_module, "Passes", counted)
    if not is_whole:
        monkeypatch.setattr(probe_module, "fits_one_worker", lambda _: False)
    with connect(scheduler) as cluster:
        there = probe(archive, target, save=tmp_path / "there", cluster=cluster)
        assert sorted(shared) == ([] if is_whole else list(SITES))
        assert [found for _, found in cluster.map(jobs.kept_here, range(4), label="kept")] == [0] * 4
    assert here.equals(there)
    for file in ("resid_post/0/probe.safetensors", "resid_post/1/probe.safetensors"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


@pytest.mark.parametrize(
    ("n_sites", "n_workers", "n_whole"),
    [(1, 1, 0), (1, 2, 0), (2, 2, 2), (3, 2, 2), (12, 8, 8), (14, 8, 14), (3, 8, 0)],
)
def test_small_sites_go_to_one_worker_each_if_that_keeps_all_at_work(
    archive: Archive, n_sites: int, n_workers: int, n_whole: int
) -> None:
    summary = summarise(archive, "even", where=None, task=None, split=Split(0.2, 0))
    large, small = (
        probe_rows.site_rows(archive, "resid_post.0", "even", None, summary, analysis="", memory=memory)
        for memory in (2**16, 2**30)
    )
    cluster: Any = SimpleNamespace(n_workers=n_workers)
    assert probe_module._n_whole([small] * n_sites, cluster) == n_whole
    assert probe_module._n_whole([large] * n_sites, cluster) == 0


@pytest.mark.parametrize("n_numbers", [2**22, 1])
def test_twenty_classes_in_many_leaves_are_those_of_scikit_learn(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_numbers: int
) -> None:
    """All penalties in the same passes, and one after the other."""
    monkeypatch.setattr(probe_site, "_MOST_NUMBERS", n_numbers)
    found = probe(archive, "label", "resid_post.0", save=tmp_path).to_pylist()[0]
    assert found["converged"]
    is_test = (summarise(archive, "label", where=None, task=None, split=Split(0.2, 0)).subsets == TEST)[EXAMPLE]
    train = VALUES[~is_test].astype(np.float32).astype(np.float64)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    theirs = LogisticRegression(C=1 / (found["penalty"] * len(train)), solver="newton-cholesky", tol=1e-10)
    theirs.fit((train - mean) / scale, LABEL[EXAMPLE][~is_test])
    ours = saved(tmp_path)

    def objective(weight: Any, bias: Any) -> Any:
        """In float64, for weights of standardised rows."""
        logits = (train - mean) / scale @ weight.T + bias
        losses = logsumexp(logits, axis=1) - logits[np.arange(len(train)), LABEL[EXAMPLE][~is_test]]
        return losses.mean() + found["penalty"] / 2 * (weight**2).sum()

    least = objective(theirs.coef_, theirs.intercept_)
    assert objective(ours.coef_ * scale, ours.intercept_ + ours.coef_ @ mean) == pytest.approx(least, abs=5e-6)


def test_numbers_in_many_leaves_are_those_of_scikit_learn(archive: Archive, tmp_path: Path) -> None:
    found = probe(archive, "score", "resid_post.0", task="regression", save=tmp_path).to_pylist()[0]
    summary = summarise(archive, "score", where=None, task="regression", split=Split(0.2, 0))
    is_test = (summary.subsets == TEST)[EXAMPLE]
    train = VALUES[~is_test].astype(np.float32).astype(np.float64)
    scale = train.std(axis=0)
    theirs = Ridge(alpha=found["penalty"] * len(train)).fit(train / scale, (LABEL + 0.25)[EXAMPLE][~is_test])
    np.testing.assert_allclose(saved(tmp_path).coef_ * scale, theirs.coef_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_are_read_once_as_far_as_they_fit(archive: Archive, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    read: list[int] = []
    make = probe_rows._read

    def counted(rows: Any, leaf: int) -> Any:
        read.append(leaf)
        return make(rows, leaf)

    n_leaves = -(-N_ROWS // HEIGHT)
    monkeypatch.setattr(probe_rows, "_read", counted)
    kept = probe(archive, "even", "resid_post.0")
    assert sorted(read) == list(range(n_leaves))
    read.clear()
    row_bytes = 4 * WIDTH + 2 * 8 + 1
    monkeypatch.setattr(probe_rows.SiteRows, "most_kept", int(share * N_ROWS * row_bytes))
    assert probe(archive, "even", "resid_post.0").equals(kept)
    again = {leaf for leaf in read if read.count(leaf) > 1}
    assert len(again) == pytest.approx((1 - share) * n_leaves, abs=1)
