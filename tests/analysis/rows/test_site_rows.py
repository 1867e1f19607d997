"""Rows of one site in pieces: every row of the blocks once, in pieces of the size that is allowed."""

from typing import Any

import numpy as np
import pytest

from residua.analysis.rows.blocks import Block, blocks
from residua.analysis.rows.site_rows import pieces, runs, width_of
from residua.store.read.archive import Archive
from tests.store.small_archive import N_ROWS, make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("rows") / "acts.zarr"))


@pytest.mark.parametrize(("piece_bytes", "height"), [(1, 1), (5 * 8 * 8, 5), (2**20, 16)])
@pytest.mark.parametrize("where", [None, "position > 3"])
def test_pieces_are_the_rows_of_the_blocks(archive: Archive, where: str | None, piece_bytes: int, height: int) -> None:
    assert width_of(archive, "q.1") == 8
    found = list(pieces(archive, "q.1", blocks(archive), where, piece_bytes=piece_bytes))
    positions: Any = archive.rows.position[:]
    expected = np.flatnonzero(positions > (3 if where else -1))
    assert max(len(rows) for rows, _ in found) <= height
    assert min(len(rows) for rows, _ in found) > 0
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), expected)
    values = np.concatenate([values for _, values in found])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, archive["q.1"][:].reshape(N_ROWS, 8)[expected])


def test_runs_are_neighbours_of_enough_rows_and_not_too_many() -> None:
    shards = [Block(start, start + 10) for start in range(0, 10_000, 10)]
    assert [len(run) for run in runs(shards[:7], least_rows=25)] == [3, 3, 1]
    many = runs(shards, least_rows=1)
    assert [block for run in many for block in run] == shards
    assert len(many) <= 256
