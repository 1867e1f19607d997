"""Blocks hold every committed row once, and never cross the end of a shard or the bytes allowed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.analysis.rows.blocks import Block, blocks
from residua.store.base.errors import AnalysisError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.stopped import take_back
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive

ROW_BYTES = 40 * 4 + 2 * 4 * 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("blocks") / "acts.zarr"))


def test_a_block_is_a_shard(archive: Archive) -> None:
    assert blocks(archive) == [Block(0, 16), Block(16, 32), Block(32, N_ROWS)]


@given(most_bytes=st.integers(ROW_BYTES, 20 * ROW_BYTES))
def test_smaller_blocks_hold_every_row_once_within_their_shard(archive: Archive, most_bytes: int) -> None:
    found = blocks(archive, most_bytes=most_bytes)
    assert [row for block in found for row in range(*block)] == list(range(N_ROWS))
    for start, stop in found:
        assert start // HEIGHT == (stop - 1) // HEIGHT
        assert (stop - start) * ROW_BYTES <= most_bytes
        assert start % max(1, stop - start) == 0 or stop == N_ROWS


def test_only_the_bytes_of_the_sites_that_are_read_count(archive: Archive) -> None:
    assert len(blocks(archive, most_bytes=8 * 32, sites="q.1")) == 5
    assert len(blocks(archive, most_bytes=8 * 32, sites=["resid_post.0"])) == N_ROWS
    with pytest.raises(UnknownSiteError):
        blocks(archive, most_bytes=1000, sites="q.7")


def test_a_budget_below_one_row_is_an_error(archive: Archive) -> None:
    with pytest.raises(AnalysisError, match=r"191 bytes.* 192"):
        blocks(archive, most_bytes=ROW_BYTES - 1)


def test_shards_that_are_not_captured_are_left_out(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "acts.zarr")
    take_back(path, 1)
    assert blocks(Archive(path)) == [Block(0, 16), Block(32, N_ROWS)]
