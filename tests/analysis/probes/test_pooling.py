"""One row an example for probes, and targets that the caller has, compared with numpy in float64 and scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

import residua
from residua.analysis.probes.linear_probe import LinearProbe
from residua.analysis.probes.pooling import POOLS, Pool, last_rows, pooled_pieces
from residua.analysis.rows.blocks import Leaves
from residua.store.base.errors import AnalysisError, NotCapturedError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(0)
LENGTHS = [int(n) for n in RNG.integers(1, 30, 60)] + [100]
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
VALUES = RNG.standard_normal((sum(LENGTHS), 3, 2)).astype(np.float32)
KIND = [["a", "b"][i % 2] for i in range(len(LENGTHS))]
VALUES[:, 0, 0] += 3 * np.repeat(np.arange(len(LENGTHS)) % 2, LENGTHS)
SITE = "q.0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    path = tmp_path_factory.mktemp("pooled") / "acts.zarr"
    ids = [RNG.integers(0, 50, length).tolist() for length in LENGTHS]
    return write_rows(path, LENGTHS, {SITE: VALUES}, columns={"kind": KIND}, input_ids=ids, rows_per_shard=64)


def expected(pool: Pool, is_chosen: np.ndarray[Any, Any]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return the last chosen row of each example that has one, and the pooled rows, in float64."""
    rows, values = [], []
    for start, stop in zip(STARTS[:-1].tolist(), STARTS[1:].tolist(), strict=True):
        chosen = start + np.flatnonzero(is_chosen[start:stop])
        if len(chosen):
            found = VALUES[chosen].reshape(len(chosen), -1).astype(np.float64)
            rows.append(int(chosen[-1]))
            values.append({"last": found[-1], "mean": found.mean(axis=0), "max": found.max(axis=0)}[pool])
    return rows, np.array(values)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("where", [None, "position > 2", "token < 25"])
@pytest.mark.parametrize("leaf_rows", [1, 48, 10_000])
def test_pooled_rows_are_those_of_numpy(pool: Pool, where: str | None, leaf_rows: int, archive: Archive) -> None:
    is_chosen = np.ones(len(VALUES), bool)
    if where is not None:
        is_chosen[:] = False
        is_chosen[RowFilter.parse(where).rows(archive)] = True
    rows, values = expected(pool, is_chosen)
    leaves = Leaves.of(archive, leaf_rows, multiple=1)
    found = [
        piece for leaf in range(len(leaves)) for piece in pooled_pieces(archive, SITE, leaves.blocks(leaf), where, pool)
    ]
    assert np.concatenate([piece.rows for piece in found]).tolist() == rows
    np.testing.assert_allclose(np.concatenate([piece.values for piece in found]), values, rtol=1e-6, atol=1e-6)
    assert last_rows(archive, None if where is None else RowFilter.parse(where)).tolist() == rows


@pytest.mark.parametrize("pool", POOLS)
def test_a_probe_of_pooled_rows_is_that_of_a_table_of_them(pool: Pool, archive: Archive, tmp_path: Path) -> None:
    found = residua.probe(archive, "kind", SITE, pool=pool, save=tmp_path)
    assert found["n_train"][0].as_py() + found["n_test"][0].as_py() == len(LENGTHS)
    saved = LinearProbe.load(tmp_path / "q/0")
    _, values = expected(pool, np.ones(len(VALUES), bool))
    assert np.mean(saved.predict(values) == np.array(KIND)) > 0.8


def test_what_cannot_be_pooled_is_refused(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="median"):
        residua.probe(archive, "kind", pool="median")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="several values"):
        residua.probe(archive, "position", pool="mean")
    open_one = write_rows(tmp_path / "open.zarr", [3, 3], {SITE: VALUES[:6]}, sealed=False)
    for commit in (open_one.path / "commits").iterdir():
        commit.unlink()
    with pytest.raises(NotCapturedError, match="finish"):
        residua.probe(Archive(open_one.path), "position", pool="last")


@pytest.mark.parametrize("kind", [list, np.array, pd.Series, pl.Series])
def test_given_values_of_examples_predict_as_a_column_does(kind: Any, archive: Archive) -> None:
    by_column = residua.probe(archive, "kind")
    given = residua.probe(archive, kind(KIND))
    assert given.drop_columns(["target"]).equals(by_column.drop_columns(["target"]))


def test_given_values_of_rows_leave_out_those_without(archive: Archive) -> None:
    truth = VALUES[:, 1, 1].astype(np.float64) * 2 + 1
    series = pd.Series(np.where(np.arange(len(truth)) % 3 == 0, np.nan, truth), name="level")
    found = residua.probe(archive, series)
    assert found["target"][0].as_py() == "level"
    assert found["n_train"][0].as_py() + found["n_test"][0].as_py() == int(series.notna().sum())
    assert found["r2"][0].as_py() > 0.99
    with pytest.raises(AnalysisError, match="3 values"):
        residua.probe(archive, [1, 2, 3])


def test_conditions_count_from_the_end_of_an_example(archive: Archive) -> None:
    ends = STARTS[1:] - 1
    first_three_from_the_end = {
        row for end, n in zip(ends, LENGTHS, strict=True) for row in range(end, end - min(3, n), -1)
    }
    for text, rows in (
        ("is_last", set(ends)),
        ("position == -1", set(ends)),
        ("position >= -3", first_three_from_the_end),
        ("position in [0, -1]", {*ends, *STARTS[:-1]}),
        ("not is_last and position < -98", {int(STARTS[-2]), int(STARTS[-2]) + 1}),
        ("is_last == false and position == -1", set()),
    ):
        assert set(RowFilter.parse(text).rows(archive).tolist()) == {int(row) for row in rows}, text


def test_the_direction_between_rows_is_the_difference_of_their_means(archive: Archive) -> None:
    kinds = np.repeat(np.array(KIND), LENGTHS)
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    rows = VALUES.astype(np.float64)
    found = residua.direction(archive, 'kind == "b"', site=SITE, where="position > 0")
    wanted = rows[(kinds == "b") & (position > 0)].mean(axis=0) - rows[(kinds == "a") & (position > 0)].mean(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    two = residua.direction(archive, "is_last", "position == 0", site=SITE, unit=True)
    wanted = rows[STARTS[1:] - 1].mean(axis=0) - rows[STARTS[:-1]].mean(axis=0)
    np.testing.assert_allclose(two, wanted / np.linalg.norm(wanted), rtol=1e-10)
    for condition, said in (('kind == "c"', "kind"), ("position >= 0", "not"), ("nothing == 1", "nothing")):
        with pytest.raises(AnalysisError, match=said):
            residua.direction(archive, condition, site=SITE)
