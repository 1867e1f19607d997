"""An archive opens and verifies as it comes out of the ways people copy and share it."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from residua.store.base.errors import DamagedArchiveError, UnknownSiteError, UnsafeArchiveError
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.verification.verify import verify
from tests.store.forging import without_index
from tests.store.small_archive import files_of, make_archive, read_everything


def hub_cache(archive: Path, place: Path, *folders: str) -> Path:
    """Lay an archive out as `snapshot_download` does, in `folders` of the repository; return its place."""
    repository = place / "datasets--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository.joinpath("snapshots", "0a1b2c", *folders)
    for name in files_of(archive):
        blob = repository / "blobs" / hashlib.sha256((archive / name).read_bytes()).hexdigest()
        shutil.copy(archive / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def with_tar(archive: Path, place: Path) -> Path:
    with tarfile.open(place / "a.tar", "w") as file:
        file.add(archive, "a.zarr")
    with tarfile.open(place / "a.tar") as file:
        file.extractall(place / "out", filter="data")
    return place / "out/a.zarr"


def with_zip(archive: Path, place: Path) -> Path:
    """Zip without entries for folders, as many programs do."""
    with zipfile.ZipFile(place / "a.zip", "w") as file:
        for name in files_of(archive):
            file.write(archive / name, name)
    with zipfile.ZipFile(place / "a.zip") as file:
        file.extractall(place / "out")  # noqa: S202  # our own
    return place / "out"


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "hub cache": hub_cache,
    "hub cache, in a folder": lambda archive, place: hub_cache(archive, place, "layer-7", "acts.zarr"),
    "cp": lambda archive, place: Path(shutil.copytree(archive, place / "copy with spaces")),
    "cp -rL": lambda archive, place: Path(shutil.copytree(hub_cache(archive, place), place / "copy")),
    "tar": with_tar,
    "zip": with_zip,
    "link": lambda archive, place: link(place / "link", archive),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_it_opens_and_verifies_elsewhere(way: str, packed: bool, copy: Path, tmp_path: Path) -> None:
    if not packed:
        without_index(copy)
    there = WAYS[way](copy, tmp_path)
    assert read_everything(there) == read_everything(copy)
    report = verify(there)
    assert (report.problems, report.notes) == ([], [])
    assert report.n_files == verify(copy).n_files


def test_links_out_of_the_hubs_cache_are_still_refused(copy: Path, tmp_path: Path) -> None:
    there = hub_cache(copy, tmp_path)
    name = "sites/q/1/c/1/0/0"
    for target in (tmp_path / "secret", tmp_path / "datasets--org--name/refs", tmp_path / "other/blobs/x"):
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(copy / name, target)
        (there / name).unlink()
        (there / name).symlink_to(target)
        with pytest.raises(UnsafeArchiveError, match="leads out of the archive"):
            Archive(there)["q.1"][:]
        assert any("leads out" in problem.what for problem in verify(there).problems)


def test_files_beside_it_are_notes_and_no_damage(copy: Path) -> None:
    before = read_everything(copy)
    others = ["README.md", ".gitattributes", "notes/mine.txt", "sites/.DS_Store", "._zarr.json", "commits/.DS_Store"]
    others += [".cache/huggingface/download/zarr.json.metadata", "examples/._part-00000.parquet"]
    for name in others:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"\0\1")
    assert read_everything(copy) == before
    report = verify(copy)
    assert report.is_sound
    assert all(any(name in note for note in report.notes) for name in others)


def test_thousands_of_files_beside_it_are_counted(copy: Path) -> None:
    for i in range(100):
        (copy / f"{i}.txt").touch()
    notes = verify(copy).notes
    assert len(notes) < 20
    assert any("more" in note for note in notes)


@pytest.mark.parametrize("packed", [True, False])
def test_a_download_of_one_site_is_an_archive_of_one_site(packed: bool, copy: Path) -> None:
    if not packed:
        without_index(copy)
    whole = Archive(copy)["q.1"][:]
    shutil.rmtree(copy / "sites/resid_post")
    archive = Archive(copy)
    assert (archive.sites, archive.absent_sites) == (("q.1",), ("resid_post.0",))
    assert np.array_equal(archive["q.1"][:], whole)
    assert list(archive.example(0)) == ["q.1"]
    assert "1 of 2 sites" in repr(archive)
    assert [site.name for site in summarise(archive).sites] == ["q.1"]
    assert archive.text(3)
    with pytest.raises(
        UnknownSiteError, match=r"this copy.*resid_post\.0|resid_post\.0.*this copy|lacks resid_post\.0"
    ):
        archive["resid_post.0"]
    report = verify(copy)
    assert report.is_sound
    assert any("resid_post.0" in note for note in report.notes)
    shutil.rmtree(copy / "rows")
    assert np.array_equal(Archive(copy)["q.1"][:], whole)
    with pytest.raises(DamagedArchiveError, match="rows/token is missing"):
        _ = Archive(copy).rows


def test_a_site_that_lost_a_file_is_damaged_and_not_absent(copy: Path) -> None:
    (copy / "sites/q/1/zarr.json").unlink()
    assert Archive(copy).absent_sites == ()
    assert any("sites/q/1/zarr.json" in problem.path for problem in verify(copy).problems)


def test_it_opens_where_nothing_can_be_written(copy: Path) -> None:
    before = read_everything(copy)
    folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    for path in [*folders, *(path for path in copy.rglob("*") if path.is_file())]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert read_everything(copy) == before
        assert verify(copy).is_sound
    finally:
        for path in folders:
            path.chmod(0o755)


def test_an_archive_that_was_renamed_while_it_was_open_says_so(copy: Path) -> None:
    archive = Archive(copy)
    copy.rename(copy.with_name("b.zarr"))
    for read in (lambda: archive["q.1"][0], lambda: archive.examples, lambda: archive.text(0)):
        with pytest.raises(DamagedArchiveError, match=r"moved, renamed or removed"):
            read()
    assert make_archive(copy).is_dir()
