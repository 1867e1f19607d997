"""Archives of the same rows opened as one: the sites of all of them, and nothing of other rows."""

import pickle
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter
from residua.store.sharing.push import push
from tests.plain_zarr import plain_array
from tests.servers.s3 import S3Server
from tests.stopped import take_back
from tests.store.small_archive import N_ROWS, make_archive

FIRST, SECOND = "resid_post.0", "q.1"


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return (
        make_archive(tmp_path / "a.zarr", sites=(FIRST,)),
        make_archive(tmp_path / "b.zarr", codec="raw", sites=(SECOND,)),
    )


def test_sites_of_both_are_read_with_the_rows_of_the_first(paths: tuple[Path, Path]) -> None:
    joined = residua.open(paths)
    assert joined.sites == (FIRST, SECOND)
    assert joined.select("*.1") == (SECOND,)
    for path, site in zip(paths, joined.sites, strict=True):
        np.testing.assert_array_equal(
            joined[site][:], plain_array(path, site.replace(".", "/", 1).join(["sites/", ""]))[:]
        )
    assert joined.n_rows == N_ROWS
    assert joined.is_sealed
    assert joined.example(1)[SECOND].shape == (1, 2, 4)
    assert joined.text(3) == Archive(paths[0]).text(3)
    joined.annotate({"example": [1], "mark": [True]}, name="judge")
    assert RowFilter.parse("mark").rows(joined).tolist() == [20]
    again = pickle.loads(pickle.dumps(joined))  # noqa: S301  # our own bytes
    np.testing.assert_array_equal(again[SECOND][:], joined[SECOND][:])
    assert str(paths[1]) in joined.place


def test_a_list_may_have_open_archives_and_one_alone(paths: tuple[Path, Path]) -> None:
    assert residua.open([Archive(paths[0]), paths[1]]).sites == (FIRST, SECOND)
    assert type(residua.open([paths[0]])) is Archive
    with pytest.raises(PlanError, match="empty"):
        residua.open([])


def test_a_site_in_both_has_to_be_equal(paths: tuple[Path, Path], tmp_path: Path) -> None:
    both = make_archive(tmp_path / "both.zarr")
    assert residua.open([paths[0], both]).sites == (FIRST, SECOND)
    with pytest.raises(PlanError, match=rf"{SECOND} is in .*b\.zarr and in .*both\.zarr"):
        residua.open([paths[1], both])  # another codec


def test_archives_of_other_rows_are_refused_with_what_differs(paths: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_archive(tmp_path / "other.zarr", seed=1, sites=(SECOND,))
    with pytest.raises(PlanError, match=r"examples .*other\.zarr"):
        residua.open([paths[0], other])
    unfinished = make_archive(tmp_path / "part.zarr", sites=(SECOND,))
    take_back(unfinished, 2)
    with pytest.raises(NotCapturedError, match=r"part\.zarr"):
        residua.open([paths[0], unfinished])


def test_what_belongs_to_one_archive_says_so(paths: tuple[Path, Path]) -> None:
    joined = residua.open(paths)
    for use in (lambda: joined.group, lambda: joined.to_xarray()):
        with pytest.raises(PlanError, match="name one"):
            use()


def test_one_may_be_at_an_address(paths: tuple[Path, Path], s3: S3Server) -> None:
    address = s3.address("joined.zarr")
    push(paths[1], address, storage_options=s3.options)
    joined = residua.open([paths[0], address], storage_options=s3.options)
    assert joined.is_remote
    np.testing.assert_array_equal(joined[SECOND][:], Archive(paths[1])[SECOND][:])
