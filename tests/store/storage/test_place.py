"""Places that cannot take an archive are refused before anything runs, and leave nothing behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from residua.store.base.errors import PlanError
from residua.store.storage.place import try_place


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("links", [False, True])
def test_a_good_place_is_left_as_it_was(links: bool, tmp_path: Path) -> None:
    try_place(tmp_path / "folder" / "inner" / "a.zarr", links=links)
    assert list(tmp_path.rglob("*")) == []
    try_place(tmp_path / "folder" / "a.zarr", locks=True, links=links)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "c.zarr").symlink_to("b.zarr")
    try_place(tmp_path / "c.zarr", links=links)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.ENOTSUP])
def test_a_place_without_links_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    try_place(tmp_path / "a.zarr")
    with pytest.raises(OSError, match=r"a\.zarr.*no hard links.*another place") as caught:
        try_place(tmp_path / "a.zarr", links=True)
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["replace", "fdatasync", "fsync", "write"])
@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only")])
def test_a_place_that_cannot_be_written_is_named(
    step: str, number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, step, failing(number))
        with pytest.raises(OSError, match=rf"a\.zarr.*{advice}"):
            try_place(tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["s3://bucket/a.zarr", "gs://bucket/a", "hf://datasets/me/a", "https://host/a.zarr"]
)
def test_an_address_makes_no_folder(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="local folder"):
        try_place(Path(address))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_file", [False, True])
def test_a_link_is_followed(is_file: bool, tmp_path: Path) -> None:
    target = tmp_path / "disk" / "real"
    target.parent.mkdir()
    if is_file:
        target.write_text("before")
    else:
        target.mkdir()
    (tmp_path / "name").symlink_to(target)
    place = try_place(tmp_path / "name", is_file=is_file, locks=not is_file, links=not is_file)
    assert (place.out.path, place.notes) == (target, ())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "name", "real"]


def test_a_folder_is_tried_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tried, replace = tmp_path / "results", [], os.replace
    folder.mkdir()

    def spy(source: Path, target: Path) -> None:
        tried.append(target.parent)
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    try_place(folder)  # what lies next to it is no concern of a job without a lock
    try_place(folder, locks=True)
    try_place(tmp_path / "new")
    assert tried == [folder, tmp_path, folder, tmp_path]


@pytest.mark.parametrize("is_file", [False, True])
def test_a_file_for_a_folder_or_the_reverse_is_named(is_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.mkdir() if is_file else path.write_text("")
    with pytest.raises(IsADirectoryError if is_file else NotADirectoryError, match=str(path)):
        try_place(path, is_file=is_file)


def _always(*_: Any) -> None:
    """Take any lock, as a file system does that leaves locks to the machine."""


@pytest.mark.parametrize("flock", [failing(errno.ENOLCK), failing(errno.EOPNOTSUPP), _always])
def test_locks_that_do_not_lock_are_noted(flock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", flock)
    place = try_place(tmp_path / "a.zarr", locks=True)
    assert [str(tmp_path / "a.zarr") in note and "lock" in note for note in place.notes] == [True]
    assert try_place(tmp_path / "a.zarr").notes == ()


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").symlink_to(tmp_path / "gone")
    with pytest.raises(PlanError, match=f"link to {tmp_path / 'gone'}"):
        try_place(tmp_path / "a.zarr")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.zarr"):
        try_place(tmp_path / "file" / "a.zarr")


def test_what_a_killed_trial_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / ".a.zarr.4194305-0123abcd.tmp", tmp_path / "..a.zarr.4194305-0123abcd.tmp.4194305-89abcdef.tmp"]
    others = [tmp_path / ".b.zarr.4194305-0123abcd.tmp", tmp_path / ".a.zarr.notes", tmp_path / "a.zarr.txt"]
    for path in (*left, *others):
        path.write_text("x")
    try_place(tmp_path / "a.zarr", links=True)
    assert sorted(tmp_path.iterdir()) == sorted(others)
