"""Overlays: written by any library, for one plan."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr

import residua
from residua.store.base.errors import DamagedArchiveError, PlanError, UnknownSiteError, UnsafeArchiveError
from residua.store.edits.overlay import Overlay
from residua.store.read.archive import Archive
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("archive") / "a.zarr"))


def test_written_rows_are_there_even_if_zero(archive: Archive, tmp_path: Path) -> None:
    made = residua.overlay(archive, tmp_path / "o", sites=SITE)
    rows = [30, 2, 17]
    values = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    values[1] = 0
    values[2, 3] = np.nan
    made.write(SITE, rows, values)
    again = residua.overlay(archive.path, tmp_path / "o")
    found, there = again.read(SITE, np.arange(N_ROWS))
    assert np.flatnonzero(there).tolist() == sorted(rows)
    np.testing.assert_array_equal(found[rows], values)


def test_dask_writes_blocks_of_shards(archive: Archive, tmp_path: Path) -> None:
    stored = np.asarray(archive[SITE], np.float32)
    made = residua.overlay(archive, tmp_path / "o", sites=SITE)
    array: Any = da
    edited = array.from_array(stored, chunks=(HEIGHT, 40))[:HEIGHT] * 2
    array.store(edited, made[SITE], regions=(slice(0, HEIGHT), slice(None)), lock=False)
    found, there = made.read(SITE, np.arange(N_ROWS))
    np.testing.assert_array_equal(there, np.arange(N_ROWS) < HEIGHT)
    np.testing.assert_array_equal(found[:HEIGHT], 2 * stored[:HEIGHT])
    plain = zarr.open_array(str(tmp_path / "o" / "sites" / "resid_post" / "0"), mode="r")
    np.testing.assert_array_equal(np.asarray(plain[:HEIGHT]), 2 * stored[:HEIGHT])


def test_what_does_not_fit_is_refused(archive: Archive, tmp_path: Path) -> None:
    made = residua.overlay(archive, tmp_path / "o", sites=SITE)
    with pytest.raises(PlanError, match=r"2 rows of resid_post\.0 .*\(2, 40\).*\(2, 39\)"):
        made.write(SITE, [0, 1], np.zeros((2, 39)))
    with pytest.raises(PlanError, match="has 38 rows: there is no row 38"):
        made.write(SITE, [38], np.zeros((1, 40)))
    with pytest.raises(PlanError, match=r"no edited rows of 'q\.1'; it has resid_post\.0"):
        made.write("q.1", [0], np.zeros((1, 2, 4)))
    with pytest.raises(UnknownSiteError, match=r"resid_post\.3"):
        residua.overlay(archive, tmp_path / "p", sites="resid_post.3")
    with pytest.raises(FileExistsError, match="is no overlay"):
        residua.overlay(archive, archive.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is no overlay"):
        residua.overlay(archive, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"residua\.overlay\("):
        Overlay(tmp_path / "none", archive)
    other = Archive(make_archive(tmp_path / "b.zarr", seed=1))
    with pytest.raises(PlanError, match="an overlay of another plan"):
        residua.overlay(other, tmp_path / "o")


def test_a_damaged_or_hostile_overlay_is_an_error(archive: Archive, tmp_path: Path) -> None:
    made = residua.overlay(archive, tmp_path / "o", sites=SITE)
    made.write(SITE, [0], np.ones((1, 40)))
    chunk = next((tmp_path / "o" / "sites" / "resid_post" / "0" / "c").rglob("*0"))
    chunk = chunk / "0" if chunk.is_dir() else chunk
    damaged = bytearray(chunk.read_bytes())
    damaged[17] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(DamagedArchiveError, match=r"rows of resid_post\.0 cannot be read"):
        made.read(SITE, [0])
    node = tmp_path / "o" / "sites" / "resid_post" / "0" / "zarr.json"
    good = json.loads(node.read_text())
    for change in ({"shape": [2**40, 40]}, {"data_type": "float64"}, {"codecs": good["codecs"][:1]}):
        node.write_text(json.dumps({**good, **change}))
        with pytest.raises(UnsafeArchiveError, match=r"resid_post\.0"):
            Overlay(tmp_path / "o", archive)
    shutil.rmtree(node.parent)
    with pytest.raises(UnsafeArchiveError, match="resid_post"):
        Overlay(tmp_path / "o", archive)


def test_hostile_files_are_not_read(archive: Archive, tmp_path: Path) -> None:
    made = residua.overlay(archive, tmp_path / "o", sites=SITE)
    made.write(SITE, [0], np.ones((1, 40)))
    node = tmp_path / "o" / "sites" / "resid_post" / "0"
    chunk = node / "c" / "0" / "0"
    chunk.rename(tmp_path / "elsewhere")
    for target in (tmp_path / "elsewhere", Path("/dev/zero")):
        chunk.symlink_to(target)
        with pytest.raises(UnsafeArchiveError, match="a link that leads out"):
            made.read(SITE, [0])
        chunk.unlink()
    with chunk.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnsafeArchiveError, match="1,099,511,627,776 bytes"):
        made.read(SITE, [0])
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(DamagedArchiveError, match="not a file"):
        made.read(SITE, [0])
    (node / "zarr.json").unlink()
    (node / "zarr.json").symlink_to("/dev/zero")
    with pytest.raises(UnsafeArchiveError, match="a link that leads out"):
        Overlay(tmp_path / "o", archive)
