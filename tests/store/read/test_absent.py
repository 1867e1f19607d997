"""Rows that are not there: every door of ours says so, and none reads them as zeros or leaves them out silently."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from dask import array as da

import residua
from residua.analysis.rows.tables import table
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.cli.main import main
from residua.store.base.errors import DamagedArchiveError, NotCapturedError
from residua.store.edits.archive_values import mean_rows
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.models.tiny import TINY
from tests.stopped import take_back
from tests.store.forging import without_index
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive

SITE, NODE = "resid_post.0", "sites/resid_post/0"
RECORD = "commits/00000001-0000.json"
LOST = slice(HEIGHT, 2 * HEIGHT)


def lose_record(path: Path) -> None:
    without_index(path)
    (path / RECORD).unlink()


def lose_files(path: Path) -> None:
    for file in [*path.glob("sites/*/*/c/1/*"), *path.glob("rows/*/c/1")]:
        if file.is_file():
            file.unlink()


def lose_all(path: Path) -> None:
    """Lose a record and all files of its shard, as a copy that was cut off does."""
    lose_record(path)
    lose_files(path)


def lose_last_record(path: Path) -> None:
    without_index(path)
    (path / "commits/00000002-0000.json").unlink()


def lose_every_record(path: Path) -> None:
    without_index(path)
    shutil.rmtree(path / "commits")


LOSSES: dict[str, Callable[[Path], None]] = {
    "record": lose_record,
    "record and files": lose_all,
    "the last record": lose_last_record,
    "every record": lose_every_record,
}


@pytest.mark.parametrize("records", [True, False])
def test_a_packed_archive_that_lost_files_says_so_at_every_door(records: bool, tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr")
    lose_files(path)
    if not records:
        shutil.rmtree(path / "commits")
    archive, lazy = Archive(path), cast("Any", residua.analysis.array(Archive(path), SITE))
    assert {problem.path for problem in verify(path).problems} >= {f"{NODE}/c/1/0", "rows/token/c/1"}
    doors: dict[str, Callable[[], object]] = {
        "rows": lambda: archive[SITE][:],
        "group": lambda: archive.group[NODE][:],  # type: ignore[index]  # zarr's union of groups and arrays
        "loader": lambda: list(archive.loader(SITE, batch_size=4)),
        "stats": lambda: residua.stats(archive, SITE),
        "dask": lambda: lazy.sum().compute(),
    }
    for name, read in doors.items():
        with pytest.raises(DamagedArchiveError, match="is missing"):
            pytest.fail(f"{name} gave {read()!r}")


@pytest.mark.parametrize("open_size", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_finished_archive_that_lost_shards_is_not_sound_and_not_used_in_part(
    loss: str, open_size: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_archive(tmp_path / "a.zarr", open_size=open_size)
    assert Archive(path).was_finished
    assert verify(path).is_sound
    LOSSES[loss](path)
    archive, lazy = Archive(path), cast("Any", residua.analysis.array(Archive(path), SITE))
    assert not verify(path).is_sound
    assert any("commits/" in problem.path for problem in verify(path).problems)
    doors: dict[str, Callable[[], object]] = {
        "rows": lambda: archive[SITE][:],
        "torch": lambda: archive[SITE].torch(),
        "group": lambda: archive.group[NODE][:],  # type: ignore[index]  # zarr's union of groups and arrays
        "loader": lambda: next(iter(archive.loader(SITE, batch_size=4))),
        "stats": lambda: residua.stats(archive, SITE),
        "top": lambda: residua.top(archive, SITE, channel=1, k=2),
        "table": lambda: table(archive, "position > 0"),
        "dask": lambda: lazy.sum().compute(),
        "mean edit": lambda: mean_rows(archive, SITE, [None]),
        "mean edit of ranges": lambda: mean_rows(archive, SITE, [range(len(archive.example_table))]),
    }
    for name, read in doors.items():
        with pytest.raises(DamagedArchiveError, match=r"lost|missing|records"):
            pytest.fail(f"{name} gave {read()!r}")
    assert main(["verify", str(path)]) == 1
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    assert "damaged" in capsys.readouterr().out
    with (
        pytest.raises(DamagedArchiveError, match="same capture again")
        if not open_size
        else pytest.raises(DamagedArchiveError, match=r"from a copy$")
    ):
        archive.captured_rows()


def test_the_same_capture_again_makes_it_whole(tmp_path: Path) -> None:
    model, data, out = TINY["llama"](), [[5 + i] * 20 for i in range(5)], tmp_path / "a.zarr"
    options: dict[str, Any] = {"out": out, "sites": "embed", "rows_per_shard": 32}
    expected = capture_dataset(model, data, **options).archive["embed"][:]
    metadata = (out / "zarr.json").read_bytes()
    for loss in (lose_record, lose_all, lose_files, lambda path: (path / RECORD).unlink()):
        loss(out)
        assert not verify(out).is_sound or verify(out).notes
        again = capture_dataset(model, data, **options)
        assert again.resumed
        assert verify(out).is_sound
        assert np.array_equal(again.archive["embed"][:], expected)
        assert (out / "zarr.json").read_bytes() == metadata


def read_with_zarr(archive: Archive, rows: slice) -> Any:
    array: Any = archive.group[NODE]
    return array[rows]


def read_in_another_process(archive: Archive, rows: slice) -> Any:
    array: Any = pickle.loads(pickle.dumps(archive.group[NODE]))  # noqa: S301  # our own
    return array[rows]


def read_with_dask(archive: Archive, rows: slice) -> Any:
    make: Any = da.from_zarr
    return make(archive.group[NODE])[rows].compute(scheduler="threads", num_workers=2)


@pytest.mark.parametrize("read", [read_with_zarr, read_in_another_process, read_with_dask])
@pytest.mark.parametrize("codec", ["raw", "fast"])
def test_a_zarr_group_gives_what_is_there_and_raises_for_what_is_not(
    codec: str, read: Callable[[Archive, slice], Any], tmp_path: Path
) -> None:
    path = make_archive(tmp_path / "a.zarr", codec)
    expected = Archive(path)[SITE][:]
    assert np.array_equal(read(Archive(path), slice(None)), expected)
    take_back(path, 1)
    unfinished = Archive(path)
    for rows in (slice(0, HEIGHT), slice(3, 9), slice(2 * HEIGHT, N_ROWS)):
        assert np.array_equal(read(unfinished, rows), expected[rows])
    for rows in (LOST, slice(None), slice(HEIGHT + 2, HEIGHT + 3)):  # the file is there, but no record says it is whole
        with pytest.raises(NotCapturedError, match="rows from 16 on"):
            read(unfinished, rows)


@pytest.mark.parametrize("read", [read_with_zarr, read_with_dask])
def test_a_zarr_group_names_a_file_that_is_lost(read: Callable[[Archive, slice], Any], tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr")
    file = path / NODE / "c/1/0"
    file.unlink()
    for rows in (LOST, slice(None)):
        with pytest.raises(DamagedArchiveError, match=f"{file} is missing"):
            read(Archive(path), rows)
    assert read(Archive(path), slice(0, HEIGHT)).any()
    assert not verify(path).is_sound


def test_a_zarr_group_cannot_be_written_to(tmp_path: Path) -> None:
    array: Any = Archive(make_archive(tmp_path / "a.zarr")).group[NODE]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_the_reader_and_verify_name_the_same_rows_of_a_damaged_chunk(tmp_path: Path) -> None:
    model, out = TINY["llama"](), tmp_path / "a.zarr"
    capture_dataset(model, [[7] * 50] * 40, out=out, sites="resid_post.1", rows_per_shard=256)
    for shard, rows in ((0, "rows 0 to 255"), (3, "rows 768 to 1,023"), (7, "rows 1,792 to 1,999")):
        file = out / f"sites/resid_post/1/c/{shard}/0"
        sound = file.read_bytes()
        file.write_bytes(bytes([*sound[:900], sound[900] ^ 1, *sound[901:]]))
        with pytest.raises(DamagedArchiveError, match=rf"\({rows}\)"):
            Archive(out)["resid_post.1"][:]
        assert f"({rows})" in verify(out).problems[0].what
        file.write_bytes(sound)
