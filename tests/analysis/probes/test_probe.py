"""Probes of an archive's sites, compared with scikit-learn on the same rows, and messages about bad targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, mean_squared_error, r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from residua.analysis.probes.controls import FIT, VALIDATION, Split
from residua.analysis.probes.controls import TEST as TEST_SUBSET
from residua.analysis.probes.linear_probe import LinearProbe
from residua.analysis.probes.probe import probe
from residua.analysis.probes.rows import Job
from residua.analysis.probes.site import probe_site
from residua.analysis.probes.target import summarise
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.held_out import held_out
from residua.analysis.support.cluster import connect
from residua.store.base.errors import AnalysisError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(0)
LENGTHS = tuple(RNG.integers(1, 30, 90).tolist())
N_ROWS = sum(LENGTHS)
EXAMPLE = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POSITION = np.concatenate([np.arange(n) for n in LENGTHS])
LABEL = RNG.integers(0, 3, len(LENGTHS))
NAME = np.array(["prose", "code", "maths"])[LABEL]
COLUMNS: dict[str, list[object]] = {
    "label": NAME.tolist(),
    "score": [float(label) + 0.1 * i for i, label in enumerate(LABEL)],
    "good": (LABEL == 1).tolist(),
    "tags": [["noun" if (i + t) % 3 else "verb" for t in range(n)] for i, n in enumerate(LENGTHS)],
    "short": [[1.0] * (n - 1) for n in LENGTHS],
    "gaps": [None if i in (3, 5) else int(label) for i, label in enumerate(LABEL)],
    "same": ["x"] * len(LENGTHS),
    "nested": [{"a": 1}] * len(LENGTHS),
    "many": [float(i) for i in range(len(LENGTHS))],
}
NOISE = RNG.standard_normal((N_ROWS, 20))
KNOWN = NOISE + (LABEL[EXAMPLE][:, None] == np.arange(20) % 3) * 1.5  # the label follows from the row
MEMORY = NOISE + 3 * RNG.standard_normal((len(LENGTHS), 20))[EXAMPLE]  # the example follows, not the label
SITES = {
    "resid_post.0": NOISE.astype(np.float32),
    "resid_post.1": KNOWN.astype(np.float32),
    "z.1": (KNOWN * 100).reshape(N_ROWS, 4, 5).astype(np.float16),
    "final": MEMORY.astype(np.float32),
}
TEST = held_out(EXAMPLE, fraction=0.2, seed=0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(tmp_path_factory.mktemp("probe") / "a.zarr", LENGTHS, SITES, columns=COLUMNS, rows_per_shard=128)


def line(archive: Archive, target: str, site: str, **asked: Any) -> dict[str, Any]:
    found: dict[str, Any] = probe(archive, target, site, **asked).to_pylist()[0]
    return found


def scaled(site: str) -> Any:
    """Return all rows in the coordinates of a scaler that was fitted to the training rows."""
    rows = SITES[site].reshape(N_ROWS, -1).astype(np.float64)
    return StandardScaler().fit(rows[~TEST]).transform(rows)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1"])
@pytest.mark.parametrize(
    ("target", "labels"),
    [
        ("label", NAME[EXAMPLE]),
        ("good", (LABEL == 1)[EXAMPLE]),
        ("tags", np.array([tag for tags in COLUMNS["tags"] for tag in tags])),  # type: ignore[attr-defined]  # a list
        ('position > 10 or label == "code"', (POSITION > 10) | (NAME == "code")[EXAMPLE]),
    ],
)
def test_classes_are_found_as_scikit_learn_finds_them(archive: Archive, target: str, labels: Any, site: str) -> None:
    found = line(archive, target, site)
    rows = scaled(site)
    theirs = LogisticRegression(C=1 / (found["penalty"] * (~TEST).sum()), solver="newton-cholesky", tol=1e-8)
    theirs.fit(rows[~TEST], labels[~TEST])
    guess = theirs.predict(rows[TEST])
    assert (found["n_train"], found["n_test"]) == ((~TEST).sum(), TEST.sum())
    assert found["accuracy"] == pytest.approx((guess == labels[TEST]).mean(), abs=2.1 / TEST.sum())
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels[TEST], guess), abs=0.02)
    values, counts = np.unique(labels[~TEST], return_counts=True)
    assert found["majority_accuracy"] == (labels[TEST] == values[counts.argmax()]).mean()
    assert found["n_classes"] == len(values)
    assert found["converged"]
    if len(values) == 2:
        expected = roc_auc_score(labels[TEST], theirs.predict_proba(rows[TEST])[:, 1])
        assert found["auc"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1"])
@pytest.mark.parametrize(
    ("target", "numbers"),
    [("score", np.array(COLUMNS["score"])[EXAMPLE]), ("position", POSITION), ("many", EXAMPLE)],
)
def test_numbers_are_found_as_scikit_learn_finds_them(archive: Archive, target: str, numbers: Any, site: str) -> None:
    found = line(archive, target, site)
    rows = scaled(site)
    theirs = Ridge(alpha=found["penalty"] * (~TEST).sum()).fit(rows[~TEST], numbers[~TEST])
    guess = theirs.predict(rows[TEST])
    assert found["r2"] == pytest.approx(r2_score(numbers[TEST], guess), rel=1e-6, abs=1e-9)
    assert found["rmse"] == pytest.approx(mean_squared_error(numbers[TEST], guess) ** 0.5, rel=1e-8)
    mean = np.full(TEST.sum(), numbers[~TEST].mean())
    assert found["baseline_r2"] == pytest.approx(r2_score(numbers[TEST], mean), rel=1e-6, abs=1e-9)
    assert found["baseline_rmse"] == pytest.approx(mean_squared_error(numbers[TEST], mean) ** 0.5, rel=1e-8)


def test_only_what_is_there_is_found(archive: Archive) -> None:
    found = {one["site"]: one for one in probe(archive, "label").to_pylist()}
    assert list(found) == list(archive.sites)
    assert found["resid_post.1"]["accuracy"] > 0.75
    assert found["z.1"]["accuracy"] > 0.75
    for one in found.values():
        assert one["control_accuracy"] < 0.6
        assert one["control_balanced_accuracy"] == pytest.approx(1 / 3, abs=0.15)
    assert found["resid_post.0"]["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert [one["layer"] for one in found.values()] == [0, 1, 1, None]
    numbers = {one["site"]: one for one in probe(archive, "score").to_pylist()}
    assert all(one["control_r2"] < 0.1 for one in numbers.values())


def test_the_control_of_examples_shows_what_leaks(archive: Archive) -> None:
    """Rows that identify their example say nothing about held-out labels; if examples are divided, the control does."""
    honest, leaking = (control_accuracy(archive, split) for split in (Split(0.2, 0), DividedSplit(0.2, 0)))
    assert honest < 0.65
    assert leaking > honest + 0.1
    assert honest == line(archive, "good", "final")["control_balanced_accuracy"]


def control_accuracy(archive: Archive, split: Split) -> float:
    found = summarise(archive, "good", where=None, task=None, split=split)
    job = Job(str(archive.path), "final", blocks(archive), "good", None, split, found, 2**30)
    accuracy: float = probe_site(job).line["control_balanced_accuracy"]
    return accuracy


class DividedSplit(Split):
    """Holds out rows whatever their example: the mistake that `Split` prevents."""

    def subsets(self, examples: Any) -> Any:
        subsets = np.full(len(examples), FIT, np.int8)
        for seed, subset in ((1, VALIDATION), (0, TEST_SUBSET)):
            drawn = np.random.default_rng([seed, len(examples), int(examples[0])]).random(len(examples))
            subsets[drawn < 0.2] = subset
        return subsets


def test_rows_that_do_not_fit_are_read_again(archive: Archive) -> None:
    kept = probe(archive, "label", "resid_post.1,final")
    with connect("inline", memory_limit=200_000) as cluster:  # the rows may take a quarter, and take 150,000 bytes
        assert probe(archive, "label", "resid_post.1,final", cluster=cluster).equals(kept)


def test_a_filter_and_the_task(archive: Archive) -> None:
    found = line(archive, "gaps", "resid_post.1", where="gaps != null and position > 3")
    selected = (POSITION > 3) & ~np.isin(EXAMPLE, (3, 5))
    assert (found["n_train"], found["n_test"]) == ((selected & ~TEST).sum(), (selected & TEST).sum())
    assert found["n_classes"] == 3
    assert "r2" in line(archive, "gaps", "resid_post.1", where="gaps != null", task="regression")
    assert line(archive, "many", "resid_post.1", task="classification")["n_classes"] == len(LENGTHS)


def test_the_probes_are_saved(archive: Archive, tmp_path: Path) -> None:
    found = line(archive, "label", "z.1", save=tmp_path)
    loaded = LinearProbe.load(tmp_path / "z" / "1")
    assert loaded.score(SITES["z.1"][TEST], NAME[EXAMPLE][TEST]) == pytest.approx(found["accuracy"])


def test_broken_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    values = SITES["resid_post.1"].copy()
    values[[3, 200, 201], [1, 2, 3]] = np.nan, np.inf, -np.inf
    broken = write_rows(tmp_path / "a.zarr", LENGTHS, {"resid_post.1": values}, columns={"label": COLUMNS["label"]})
    found = line(broken, "label", "resid_post.1")
    assert (found["n_left_out"], found["n_train"] + found["n_test"]) == (3, N_ROWS - 3)
    assert found["accuracy"] > 0.75
    assert line(broken, "position", "resid_post.1")["n_left_out"] == 3


@pytest.mark.parametrize(
    ("target", "asked", "quoted"),
    [
        ("labl", {}, "'labl'.*token, position, example, label, score"),
        ("label ==", {}, "'label =='.*column.*condition"),
        ("labl > 3", {}, "labl"),
        ("same", {}, "'same'.* one value"),
        ("position > 1000", {}, "'position > 1000'.* one value"),
        ("gaps", {}, "'gaps'.* example 3.*gaps != null"),
        ("nested", {}, "'nested'.*struct"),
        ("short", {}, "'short'.*example 0 has"),
        ("label", {"where": "example < 3"}, "no rows.* 3 examples"),
        ("label", {"where": "position > 1000"}, "no rows"),
        ("label", {"test_fraction": 1.5}, "1.5"),
        ("label", {"task": "regresion"}, "regresion"),
    ],
)
def test_bad_targets_are_named(archive: Archive, target: str, asked: Any, quoted: str) -> None:
    with pytest.raises(AnalysisError, match=quoted):
        probe(archive, target, "resid_post.1", **asked)


def test_too_wide_too_many_and_not_there(archive: Archive) -> None:
    with pytest.raises(AnalysisError, match=r"'many'.* 20 different values.*regression"):
        summarise(archive, "many", where=None, task="classification", split=Split(0.2, 0), most_classes=20)
    with (
        connect("inline", memory_limit=12 * 8 * 20**2 - 1) as cluster,
        pytest.raises(AnalysisError, match=r"resid_post.1 is 20 wide.*regression.*--memory-limit"),
    ):
        probe(archive, "position", "resid_post.1", cluster=cluster)
    with (
        connect("inline", memory_limit=30_000) as cluster,
        pytest.raises(AnalysisError, match=r"3 classes on resid_post.1, 20 wide.*--memory-limit"),
    ):
        probe(archive, "label", "resid_post.1", cluster=cluster)
    with pytest.raises(UnknownSiteError, match=r"resid_post\.7"):
        probe(archive, "label", "resid_post.7")


def test_a_control_of_few_rows_of_many_has_their_labels(archive: Archive) -> None:
    """The number of labels that it draws from follows from the selected rows, not from all rows of the archive."""
    selected = POSITION[EXAMPLE < 20] > 3

    def control(sample_rows: int) -> Any:
        options: dict[str, Any] = {"where": "example < 20", "task": None, "split": Split(0.2, 0)}
        return summarise(archive, "position > 3", **options, sample_rows=sample_rows).control

    found = control(32)
    assert not found.is_per_example
    assert 16 < len(found.values) <= 64
    assert found.values.mean() == pytest.approx(selected.mean(), abs=0.25)
    assert control(N_ROWS).values.tolist() == selected.tolist()


def test_a_negative_seed_is_refused(archive: Archive) -> None:
    with pytest.raises(AnalysisError, match=r"seed is -1.*at least 0"):
        probe(archive, "label", "resid_post.1", seed=-1)
