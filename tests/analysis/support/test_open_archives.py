"""One open archive per process and path: the same object until the archive changes."""

from pathlib import Path

import pytest

from residua.analysis.support.open_archives import Location, location, opened
from residua.store.base.errors import NotCapturedError
from residua.store.format.commits import FOLDER
from residua.store.read.archive import Archive
from tests.stopped import take_back
from tests.store.small_archive import make_archive


def test_an_archive_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_archive(tmp_path / "acts.zarr")
    monkeypatch.chdir(tmp_path)
    where = location(Archive("acts.zarr"))
    assert Path(where.place) == tmp_path / "acts.zarr"
    assert opened(where) is opened(where)


def test_it_is_opened_again_after_shards_were_added(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "acts.zarr")
    record = path / FOLDER / "00000002-0000.json"
    text = record.read_bytes()
    take_back(path, 2)
    with pytest.raises(NotCapturedError):
        opened(Location(str(path)))["q.1"][:]
    record.write_bytes(text)
    assert len(opened(Location(str(path)))["q.1"][:]) == 38


def test_it_is_opened_again_if_another_archive_replaces_it(tmp_path: Path) -> None:
    first, second = make_archive(tmp_path / "a", seed=1), make_archive(tmp_path / "b", seed=2)
    digests = [opened(Location(str(first))).plan.digest]
    first.rename(tmp_path / "c")
    second.rename(first)
    digests.append(opened(Location(str(first))).plan.digest)
    assert digests == [opened(Location(str(tmp_path / "c"))).plan.digest, Archive(first).plan.digest]
    assert len(set(digests)) == 2


def test_a_missing_archive_is_an_error_every_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="is not an archive"):
            opened(Location(str(tmp_path / "nothing")))
