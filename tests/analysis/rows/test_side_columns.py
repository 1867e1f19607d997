"""Side tables in conditions, tables, top rows, probes and the loader, compared with the same numbers in numpy."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

LENGTHS = [7, 5, 9, 6, 8, 5, 7, 9, 6, 8]
N_ROWS = sum(LENGTHS)
SITE = "resid_post.0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((N_ROWS, 6)).astype(np.float32)
    values[:, 0] += 4 * np.repeat(np.arange(10) % 2, LENGTHS)
    ids = [rng.integers(0, 50, length).tolist() for length in LENGTHS]
    found = write_rows(tmp_path_factory.mktemp("side") / "acts.zarr", LENGTHS, {SITE: values}, input_ids=ids)
    found.annotate({"example": range(10), "toxic": [i % 2 == 1 for i in range(10)]}, name="judge")
    found.annotate({"row": range(0, N_ROWS, 2), "mark": range(0, N_ROWS, 2)}, key="row", name="marks")
    return found


def test_a_table_and_the_best_rows_have_the_values(archive: Archive) -> None:
    rows = [3, 0, N_ROWS - 2]
    table = residua.analysis.table(archive, rows, columns=["toxic", "mark"])
    example = np.repeat(np.arange(10), LENGTHS)[rows]
    assert table["toxic"].to_pylist() == (example % 2 == 1).tolist()
    assert table["mark"].to_pylist() == [None, 0, N_ROWS - 2]
    values = np.asarray(archive[SITE][:], np.float64)[:, 1]
    chosen = np.flatnonzero(np.repeat(np.arange(10) % 2 == 1, LENGTHS))
    best = residua.top(archive, SITE, channel=1, k=3, where="toxic == true", columns=["mark", "toxic"])
    expected = chosen[np.argsort(values[chosen])[::-1][:3]]
    assert best["row"].to_pylist() == expected.tolist()
    assert best["mark"].to_pylist() == [row if row % 2 == 0 else None for row in expected.tolist()]


def test_batches_have_the_values_of_their_rows(archive: Archive) -> None:
    found: dict[int, int] = {}
    for batch in archive.loader(SITE, batch_size=4, where="mark != null", columns=["mark", "toxic"]):
        found |= dict(zip(batch["row"].tolist(), batch["mark"].tolist(), strict=True))
    assert found == {row: row for row in range(0, N_ROWS, 2)}
    with pytest.raises(AnalysisError, match=str(N_ROWS // 2)):
        archive.loader(SITE, batch_size=4, columns=["mark"])


def test_a_probe_predicts_them(archive: Archive) -> None:
    found = residua.probe(archive, "toxic", test_fraction=0.4)
    assert found["balanced_accuracy"][0].as_py() > 0.9


def test_copies_take_them_along_where_the_rows_are_the_same(archive: Archive, tmp_path: Path) -> None:
    part = residua.extract(archive, tmp_path / "part.zarr", examples=[1, 2, 8])
    assert part.example_table.table(["toxic"])["toxic"].to_pylist() == [True, False, False]
    marks = part.example_table.table(["mark"])["mark"].to_pylist()
    assert [mark for values in marks for mark in values if mark is not None] == [
        row for start, stop in ((7, 12), (12, 21), (56, 62)) for row in range(start, stop) if row % 2 == 0
    ]
    assert part.side_tables == ()  # they are columns of its own
