"""The probes compared with scikit-learn's Ridge and LogisticRegression after a StandardScaler, on rows in memory."""

import json
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from residua.analysis.probes.linear_probe import LinearProbe, LogisticProbe, RidgeProbe
from residua.store.base.errors import AnalysisError

N_ROWS, WIDTH = 1500, 12


def made_up() -> tuple[Any, Any, dict[int, Any]]:
    """Rows with mixed scales, a large mean, a constant channel and correlations; a number; classes."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N_ROWS, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))
    rows *= np.exp(rng.standard_normal(WIDTH))
    rows[:, 2] += 1e4
    rows[:, 5] = -7
    rows = rows.astype(np.float32)
    exact = StandardScaler().fit_transform(rows.astype(np.float64))
    number = exact @ rng.standard_normal(WIDTH) + rng.standard_normal(N_ROWS) + 30
    logits = exact @ rng.standard_normal((WIDTH, 4)) * 0.5 + rng.gumbel(size=(N_ROWS, 4))
    return rows, number, {2: logits[:, :2].argmax(axis=1), 4: logits.argmax(axis=1)}


ROWS, NUMBER, CLASSES = made_up()
EXACT = StandardScaler().fit_transform(ROWS.astype(np.float64))


@pytest.mark.parametrize("penalty", [1e-4, 1.0])
def test_ridge_is_scikit_learns(penalty: float) -> None:
    theirs = Ridge(alpha=penalty * N_ROWS).fit(EXACT, NUMBER)
    mine = RidgeProbe(penalty).fit(ROWS, NUMBER)
    np.testing.assert_allclose(mine.predict(ROWS), theirs.predict(EXACT), rtol=1e-9)
    assert mine.score(ROWS, NUMBER) == pytest.approx(theirs.score(EXACT, NUMBER), rel=1e-9)
    np.testing.assert_allclose(ROWS.astype(np.float64) @ mine.coef_ + mine.intercept_, mine.predict(ROWS), rtol=1e-9)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_logistic_is_scikit_learns(n_classes: int, penalty: float) -> None:
    labels = np.array(["a", "b", "c", "d"])[CLASSES[n_classes]]
    theirs = LogisticRegression(C=1 / (penalty * N_ROWS), tol=1e-10, solver="newton-cholesky").fit(EXACT, labels)
    mine = LogisticProbe(penalty, tolerance=1e-14).fit(ROWS.astype(np.float64), labels)
    assert mine.classes_.tolist() == theirs.classes_.tolist()
    np.testing.assert_allclose(mine.coef_ * ROWS.astype(np.float64).std(axis=0), theirs.coef_, atol=2e-6)
    np.testing.assert_allclose(mine.predict_proba(ROWS), theirs.predict_proba(EXACT), atol=1e-6)
    np.testing.assert_allclose(mine.decision_function(ROWS), theirs.decision_function(EXACT), atol=1e-5)
    single = LogisticProbe(penalty).fit(ROWS, labels)  # in float32, and to the usual tolerance
    np.testing.assert_allclose(single.predict_proba(ROWS), theirs.predict_proba(EXACT), atol=2e-3)
    assert single.score(ROWS, labels) == pytest.approx(theirs.score(EXACT, labels), abs=2 / N_ROWS)


def test_blocks_of_any_kind_are_the_same_rows() -> None:
    heads = ROWS.reshape(N_ROWS, 3, 4)
    make: Any = da.from_array
    lazy = make(heads, chunks=((100, 1300, 100), 2, 4))
    labels = CLASSES[4]
    at_once, by_block = LogisticProbe().fit(ROWS, labels), LogisticProbe().fit(lazy, make(labels, chunks=700))
    np.testing.assert_allclose(by_block.predict_proba(lazy), at_once.predict_proba(ROWS), atol=1e-5)
    assert by_block.score(lazy, labels) == at_once.score(heads, labels)
    straight = RidgeProbe().fit(ROWS, NUMBER)
    in_batches = RidgeProbe()
    for batch in np.array_split(np.arange(N_ROWS), 7):
        in_batches.partial_fit(heads[batch], NUMBER[batch])
    for other in (RidgeProbe().fit(lazy, NUMBER), in_batches):
        np.testing.assert_allclose(other.coef_, straight.coef_, rtol=1e-8, atol=1e-12)


def test_scikit_learns_tools_accept_them() -> None:
    copy: Any = clone(LogisticProbe(0.5))
    assert copy.get_params() == {"penalty": 0.5, "tolerance": 1e-8, "most_passes": 300}
    assert cross_val_score(LogisticProbe(), ROWS, CLASSES[2], cv=3).mean() > 0.6
    assert cross_val_score(RidgeProbe(), ROWS, NUMBER, cv=3).mean() > 0.6


@pytest.mark.parametrize("labels", [CLASSES[2] == 1, CLASSES[4], np.array(["x", "y", "z", "ü"])[CLASSES[4]], NUMBER])
def test_a_saved_probe_predicts_the_same(labels: Any, tmp_path: Path) -> None:
    probe = (RidgeProbe(0.1) if labels is NUMBER else LogisticProbe(0.1)).fit(ROWS, labels)
    probe.save(tmp_path / "probe", site="resid_post.3", target="label")
    loaded = LinearProbe.load(tmp_path / "probe")
    assert type(loaded) is type(probe)
    assert loaded.penalty == 0.1
    np.testing.assert_array_equal(loaded.predict(ROWS), probe.predict(ROWS))
    assert sorted(path.name for path in (tmp_path / "probe").iterdir()) == ["probe.json", "probe.safetensors"]
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["about"]["site"] == "resid_post.3"


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"classes": [["a"], ["b"]]},
        {"classes": None, "penalty": "much"},
        {"about": 3},
        {"weight": np.zeros((2, 3))},
        {"bias": np.zeros(1, np.float32)},
    ],
)
def test_files_that_are_no_probe(change: dict[str, Any], tmp_path: Path) -> None:
    meaning = {"classes": ["a", "b"], "penalty": 1.0, "about": {}}
    tensors = {"weight": np.zeros((1, 3)), "bias": np.zeros(1)}
    save_file({name: change.get(name, tensor) for name, tensor in tensors.items()}, tmp_path / "probe.safetensors")
    (tmp_path / "probe.json").write_text(json.dumps({name: change.get(name, value) for name, value in meaning.items()}))
    with pytest.raises(AnalysisError, match=tmp_path.name):
        LinearProbe.load(tmp_path)
    with pytest.raises(AnalysisError, match="nowhere"):
        LinearProbe.load(tmp_path / "nowhere")


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two classes"):
        LogisticProbe().fit(ROWS, np.zeros(N_ROWS))
    with pytest.raises(ValueError, match="NaN"):
        RidgeProbe().fit(np.full((3, 2), np.nan), np.arange(3))
    with pytest.raises(ValueError, match="5 features"):
        RidgeProbe().fit(ROWS, NUMBER).predict(ROWS[:, :5])
    with pytest.raises(ValueError, match="inconsistent numbers"):
        RidgeProbe().fit(ROWS, NUMBER[1:])
    RidgeProbe().fit(ROWS, NUMBER).save(tmp_path)
    loaded: Any = LinearProbe.load(tmp_path)
    with pytest.raises(AnalysisError, match=r"loaded.* new"):
        loaded.partial_fit(ROWS, NUMBER)


def test_lists_are_accepted() -> None:
    rows, labels = ROWS[:200].tolist(), CLASSES[2][:200]
    found = LogisticProbe().fit(rows, labels)
    np.testing.assert_allclose(found.coef_, LogisticProbe().fit(np.array(rows), labels).coef_)
