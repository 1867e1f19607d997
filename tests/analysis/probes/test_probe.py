"""Probes of an archive's sites, compared with scikit-learn on the same rows, and messages about bad targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, mean_squared_error, r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from residua.analysis.probes.controls import TEST, Split
from residua.analysis.probes.linear_probe import LinearProbe
from residua.analysis.probes.probe import probe
from residua.analysis.probes.target import summarise
from residua.analysis.support.cluster import connect
from residua.store.base.errors import AnalysisError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import VOCABULARY, write_rows

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
    "hashes": [2**60 + int(label) for label in LABEL],
    "holes": [float("nan") if i % 4 == 0 else i + 0.5 for i in range(len(LENGTHS))],
    "both": [None if i % 8 == 1 else float("nan") if i % 4 == 0 else i + 0.5 for i in range(len(LENGTHS))],
    "once": ["b" if i == len(LENGTHS) - 1 else "a" for i in range(len(LENGTHS))],
    "twice": ["b" if i < 2 else "c" if i == 2 else "a" for i in range(len(LENGTHS))],
    "a title": [None if i % 4 == 0 else name for i, name in enumerate(NAME.tolist())],
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


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_rows(tmp_path_factory.mktemp("probe") / "a.zarr", LENGTHS, SITES, columns=COLUMNS, rows_per_shard=128)


def line(archive: Archive, target: str, site: str, **asked: Any) -> dict[str, Any]:
    found: dict[str, Any] = probe(archive, target, site, **asked).to_pylist()[0]
    return found


def held_out_rows(archive: Archive, target: str, **asked: Any) -> Any:
    """Return for each row whether it is held out; `test_groups.py` looks at which they are."""
    found = summarise(archive, target, **{"where": None, "task": None, "split": Split(0.2, 0), **asked})
    return (found.subsets == TEST)[EXAMPLE]


def scaled(site: str, is_test: Any) -> Any:
    """Return all rows in the coordinates of a scaler that was fitted to the training rows."""
    rows = SITES[site].reshape(N_ROWS, -1).astype(np.float64)
    return StandardScaler().fit(rows[~is_test]).transform(rows)


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
    found, is_test = line(archive, target, site), held_out_rows(archive, target)
    rows = scaled(site, is_test)
    theirs = LogisticRegression(C=1 / (found["penalty"] * (~is_test).sum()), solver="newton-cholesky", tol=1e-8)
    theirs.fit(rows[~is_test], labels[~is_test])
    guess = theirs.predict(rows[is_test])
    assert (found["n_train"], found["n_test"]) == ((~is_test).sum(), is_test.sum())
    assert found["accuracy"] == pytest.approx((guess == labels[is_test]).mean(), abs=2.1 / is_test.sum())
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels[is_test], guess), abs=0.02)
    values, counts = np.unique(labels[~is_test], return_counts=True)
    assert found["majority_accuracy"] == (labels[is_test] == values[counts.argmax()]).mean()
    assert found["n_classes"] == len(values)
    assert found["converged"]
    if len(values) == 2:
        expected = roc_auc_score(labels[is_test], theirs.predict_proba(rows[is_test])[:, 1])
        assert found["auc"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1"])
@pytest.mark.parametrize(
    ("target", "numbers"),
    [("score", np.array(COLUMNS["score"])[EXAMPLE]), ("position", POSITION), ("many", EXAMPLE)],
)
def test_numbers_are_found_as_scikit_learn_finds_them(archive: Archive, target: str, numbers: Any, site: str) -> None:
    found, is_test = line(archive, target, site), held_out_rows(archive, target)
    rows = scaled(site, is_test)
    theirs = Ridge(alpha=found["penalty"] * (~is_test).sum()).fit(rows[~is_test], numbers[~is_test])
    guess = theirs.predict(rows[is_test])
    assert found["r2"] == pytest.approx(r2_score(numbers[is_test], guess), rel=1e-6, abs=1e-9)
    assert found["rmse"] == pytest.approx(mean_squared_error(numbers[is_test], guess) ** 0.5, rel=1e-8)
    mean = np.full(is_test.sum(), numbers[~is_test].mean())
    assert found["baseline_r2"] == pytest.approx(r2_score(numbers[is_test], mean), rel=1e-6, abs=1e-9)
    assert found["baseline_rmse"] == pytest.approx(mean_squared_error(numbers[is_test], mean) ** 0.5, rel=1e-8)


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


@pytest.mark.parametrize("target", ["holes", "both", "a title"])
def test_the_filter_that_the_message_names_helps(archive: Archive, target: str) -> None:
    with pytest.raises(AnalysisError) as refused:
        probe(archive, target, "resid_post.1")
    words = str(refused.value).split("'")
    found = line(archive, target, "resid_post.1", where=words[-2])
    is_there = np.array([value is not None and value == value for value in COLUMNS[target]])
    assert found["n_train"] + found["n_test"] == is_there[EXAMPLE].sum()


def test_whole_numbers_that_float64_merges_are_told_apart(archive: Archive) -> None:
    found, of_labels = (line(archive, target, "resid_post.1") for target in ("hashes", "label"))
    assert found["n_classes"] == 3
    assert found["accuracy"] > 0.75
    assert found["accuracy"] == pytest.approx(of_labels["accuracy"], abs=0.1)


def test_ids_are_classes_unless_someone_asks(archive: Archive) -> None:
    found = line(archive, "token", "resid_post.1")
    assert found["n_classes"] == VOCABULARY
    assert "r2" in line(archive, "token", "resid_post.1", as_numbers=True)
    assert "r2" in line(archive, "label", "resid_post.1", task="regression", as_numbers=True)
    assert "r2" in line(archive, "good", "resid_post.1", task="regression")


def test_classes_that_are_not_learned_or_not_tested_are_named(archive: Archive) -> None:
    found = line(archive, "twice", "resid_post.1")
    assert (found["not_learned"], found["not_tested"]) == ([], ["c"])
    assert found["majority_balanced_accuracy"] == 0.5
    assert line(archive, "label", "resid_post.1")["not_tested"] == []


def test_a_control_has_a_baseline_of_its_own(archive: Archive) -> None:
    """A rare condition on rows: the control is right as often as a constant guess is, and no more."""
    found = line(archive, "position > 20", "resid_post.0")
    assert found["majority_accuracy"] > 0.8
    assert found["control_accuracy"] == pytest.approx(found["control_majority_accuracy"], abs=0.02)
    numbers = line(archive, "score", "resid_post.0")
    assert numbers["control_r2"] == pytest.approx(numbers["control_baseline_r2"], abs=0.1)


def test_rows_that_do_not_fit_are_read_again(archive: Archive) -> None:
    kept = probe(archive, "label", "resid_post.1,final")
    with connect("inline", memory_limit=280_000) as cluster:  # the rows may take a quarter, and take 150,000 bytes
        assert probe(archive, "label", "resid_post.1,final", cluster=cluster).equals(kept)


def test_a_filter_and_the_task(archive: Archive) -> None:
    where = "gaps != null and position > 3"
    found, is_test = line(archive, "gaps", "resid_post.1", where=where), held_out_rows(archive, "gaps", where=where)
    selected = (POSITION > 3) & ~np.isin(EXAMPLE, (3, 5))
    assert (found["n_train"], found["n_test"]) == ((selected & ~is_test).sum(), (selected & is_test).sum())
    assert found["n_classes"] == 3
    assert "r2" in line(archive, "gaps", "resid_post.1", where="gaps != null", task="regression")
    with pytest.raises(AnalysisError, match=r"90 examples.*a class needs two"):
        probe(archive, "many", "resid_post.1", task="classification")


def test_the_probes_are_saved(archive: Archive, tmp_path: Path) -> None:
    found = line(archive, "label", "z.1", save=tmp_path)
    loaded, is_test = LinearProbe.load(tmp_path / "z" / "1"), held_out_rows(archive, "label")
    assert loaded.score(SITES["z.1"][is_test], NAME[EXAMPLE][is_test]) == pytest.approx(found["accuracy"])


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
        ("same", {}, "'same'.* one value.*'x'"),
        ("position > 1000", {}, "'position > 1000'.* one value"),
        ("gaps", {}, "'gaps'.* example 3.*gaps != null"),
        ("nested", {}, "'nested'.*struct"),
        ("short", {}, "'short'.*example 0 has"),
        ("label", {"where": "example < 3"}, "no rows.* 3 examples"),
        ("label", {"where": "position > 1000"}, "no rows"),
        ("label", {"test_fraction": 1.5}, "1.5"),
        ("label", {"task": "regresion"}, "regresion"),
        ("label", {"task": "regression"}, "'label'.*texts.*as_numbers="),
        ("token", {"task": "regression"}, "'token'.*token ids.*as_numbers="),
        ("hashes", {"task": "regression"}, r"'hashes'.*2\*\*53"),
        ("hashes", {"task": "regression", "as_numbers": True}, r"'hashes'.*2\*\*53"),
        ("once", {}, "'once'.*'b'"),
        ("position > 28 and example == 3", {}, "True|one value"),
        ("label", {"group": "autor"}, "'autor'.*label"),
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
        pytest.raises(AnalysisError, match=r"resid_post.1 is 20 wide.*regression.*memory_limit="),
    ):
        probe(archive, "position", "resid_post.1", cluster=cluster)
    with (
        connect("inline", memory_limit=30_000) as cluster,
        pytest.raises(AnalysisError, match=r"3 classes on resid_post.1, 20 wide.*memory_limit="),
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
