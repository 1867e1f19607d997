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
from residua.analysis.probes.controls import TEST, VALIDATION, Split
from residua.analysis.probes.linear_probe import LinearProbe
from residua.analysis.probes.logistic import best_constant, scale_of
from residua.analysis.probes.passes import Passes, Scale
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


def objective(rows: Any, codes: Any, weight: Any, bias: Any, penalty: float) -> Any:
    """In float64, for weights of standardised rows."""
    logits = rows @ weight.T + bias
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(rows)), codes]
    return losses.mean() + penalty / 2 * (weight**2).sum()


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

    scaled, codes = (train - mean) / scale, LABEL[EXAMPLE][~is_test]
    least = objective(scaled, codes, theirs.coef_, theirs.intercept_, found["penalty"])
    bias = ours.intercept_ + ours.coef_ @ mean
    assert objective(scaled, codes, ours.coef_ * scale, bias, found["penalty"]) == pytest.approx(least, abs=5e-6)


def test_few_wide_rows_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """Fewer rows than channels, of which a few directions are huge: coordinates along the leading directions."""
    rng = np.random.default_rng(2)
    width, lengths, classes = 400, [4] * 60, rng.integers(0, 3, 60)
    sizes = np.arange(1, width + 1) ** -0.5
    sizes[:3] *= [20, 10, 5]
    mixing = sizes[:, None] * np.linalg.qr(rng.standard_normal((width, width))).Q
    means = rng.standard_normal((3, width)) * 0.5
    values = ((means[np.repeat(classes, 4)] + rng.standard_normal((240, width))) @ mixing).astype(np.float32)
    columns: dict[str, list[object]] = {"label": [f"class {label}" for label in classes]}
    archive = write_rows(tmp_path / "a.zarr", lengths, {"resid_post.0": values}, columns=columns, rows_per_shard=HEIGHT)
    (found,) = probe(archive, "label", save=tmp_path / "probes").to_pylist()
    assert found["converged"]
    subsets = summarise(archive, "label", where=None, task=None, split=Split(0.2, 0)).subsets
    is_train = np.repeat(subsets != TEST, 4)
    train, labels = values[is_train].astype(np.float64), np.repeat(classes, 4)[is_train]
    mean, scale = train.mean(axis=0), train.std(axis=0)
    theirs = LogisticRegression(C=1 / (found["penalty"] * len(train)), tol=1e-8, max_iter=10_000)
    theirs.fit((train - mean) / scale, labels)
    ours = saved(tmp_path / "probes")
    least = objective((train - mean) / scale, labels, theirs.coef_, theirs.intercept_, found["penalty"])
    bias = ours.intercept_ + ours.coef_ @ mean
    mine = objective((train - mean) / scale, labels, ours.coef_ * scale, bias, found["penalty"])
    assert mine == pytest.approx(least, abs=5e-6)


def test_products_with_directions_are_the_same_bits_from_any_workers(archive: Archive, scheduler: str) -> None:
    summary = summarise(archive, "label", where=None, task=None, split=Split(0.2, 0))
    rows = probe_rows.site_rows(archive, "resid_post.0", "label", None, summary, analysis="products", memory=2**30)
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, 5))).Q
    train = VALUES[(summary.subsets != TEST)[EXAMPLE]]
    scale = Scale(train.mean(axis=0), train.std(axis=0))
    found = []
    for where in ("inline", scheduler):
        with connect(where) as cluster:
            passes = Passes(cluster, rows, number=0, advance=lambda _: None)
            passes.standardise(scale)
            found.append((passes.products(directions), passes.products(None)))
            cluster.let_go("products")
    (here, all_here), (there, all_there) = found
    assert here.products.tobytes() == there.products.tobytes()
    assert all_here.products.tobytes() == all_there.products.tobytes()
    assert here.n_rows == all_here.n_rows == there.n_rows > 0
    np.testing.assert_allclose(here.products, all_here.products @ directions, atol=1e-3)
    assert here.squares == pytest.approx(np.trace(all_here.products), rel=1e-5)


def test_rows_of_classes_that_are_not_asked_for_do_not_choose_the_penalty(archive: Archive) -> None:
    summary = summarise(archive, "label", where=None, task=None, split=Split(0.2, 0))
    rows = probe_rows.site_rows(archive, "resid_post.0", "label", None, summary, analysis="classes", memory=2**30)
    n_classes = len(summary.classes)
    tried = [best_constant(np.arange(1, n_classes + 1), WIDTH)]
    with connect("inline") as cluster:
        passes = Passes(cluster, rows, number=0, advance=lambda _: None)
        counts = passes.counts()
        passes.standardise(Scale(counts.train.mean, scale_of(counts.train)))
        of_each = [passes.validation_losses(tried, np.arange(n_classes) == one)[0] for one in range(n_classes)]
        cluster.let_go("classes")
    n_rows = counts.n_learned[0] - counts.n_fitted
    expected = -n_rows * np.log(np.arange(1, n_classes + 1) / (n_classes * (n_classes + 1) / 2))
    np.testing.assert_allclose(of_each, expected, rtol=1e-6)
    assert n_rows.sum() == counts.n_rows[VALIDATION] > 0


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
