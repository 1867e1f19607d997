"""Creating an archive: complete or not at all, never over the user's files, and one capture at a time."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import zarr

from residua.store.format.archive_metadata import is_archive, read_metadata
from residua.store.format.array_metadata import open_array
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import SitePlan
from tests.store.format.test_plan import make_plan

SITES = (
    SitePlan(name="resid_post.0", row_shape=(8,), dtype="float32", codec="fast"),
    SitePlan(name="q.0", row_shape=(2, 40), dtype="bfloat16", codec="int8-block32"),
    SitePlan(name="k.0", row_shape=(2, 4), dtype="float32", codec="bitround7"),
)


def make(destination: Path, **changes: Any) -> None:
    plan = make_plan(**{"sites": SITES, "rows_per_shard": 8, "n_rows": 20, **changes})
    with workspace(destination) as folder:
        (folder / "head").mkdir()
        (folder / "head" / "head.json").write_text("{}")
        create_archive(folder, destination, plan, {"by": "test"})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_archive_has_what_the_plan_says_and_nothing_is_left_next_to_it(tmp_path: Path) -> None:
    make(tmp_path / "a.zarr")
    assert names_in(tmp_path) == ["a.zarr"]
    metadata = read_metadata(tmp_path / "a.zarr")
    assert list(metadata.files) == ["head/head.json"]
    assert (tmp_path / "a.zarr" / "commits").is_dir()
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
    arrays = {spec.path: root[spec.path] for spec in metadata.plan.arrays}
    shapes = {path: array.shape for path, array in arrays.items() if isinstance(array, zarr.Array)}
    assert shapes == {
        "sites/resid_post/0": (20, 8),
        "sites/q/0": (20, 2, 40),
        "scales/q/0": (20, 2, 2),
        "sites/k/0": (20, 2, 4),
        "rows/token": (20,),
        "rows/position": (20,),
        "rows/example": (20,),
    }
    _, _, attributes = open_array(tmp_path / "a.zarr", "sites/q/0")
    assert attributes["quantised"] == {
        "scheme": "int8-block32",
        "scales": "scales/q/0",
        "logical_dtype": "bfloat16",
    }


def test_an_empty_folder_may_become_the_archive(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    make(tmp_path / "a.zarr")
    assert is_archive(tmp_path / "a.zarr")


@pytest.mark.parametrize("occupied_by", ["file", "folder", "archive"])
def test_nothing_of_the_users_is_overwritten(tmp_path: Path, occupied_by: str) -> None:
    destination = tmp_path / "a.zarr"
    if occupied_by == "file":
        destination.write_text("mine")
    elif occupied_by == "folder":
        destination.mkdir()
        (destination / "mine").write_text("mine")
    else:
        make(destination)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="choose another place"):
        make(destination)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"), workspace(tmp_path):
        pytest.fail("the work began")


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with workspace(tmp_path / "a.zarr") as folder:
            (folder / "examples").mkdir()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot make an archive at .*file/a\.zarr") as caught,
        workspace(tmp_path / "file" / "a.zarr"),
    ):
        pytest.fail("the work began")
    assert caught.value.errno


def _hold(destination: Path, ready: Any) -> None:
    with workspace(destination) as folder:
        (folder / "half").mkdir()
        (folder / "half" / "file").write_text("x")
        ready.set()
        signal.pause()


def test_a_second_capture_leaves_the_first_alone_and_clears_up_after_a_dead_one(tmp_path: Path) -> None:
    destination = tmp_path / "a.zarr"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    first = context.Process(target=_hold, args=(destination, ready))
    first.start()
    assert ready.wait(timeout=120)
    half = tmp_path / ".a.zarr.making" / "half" / "file"
    with pytest.raises(BlockingIOError, match="another capture is making"), workspace(destination):
        pytest.fail("the work began")
    assert half.read_text() == "x"
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join(timeout=60)
    assert half.is_file(), "a killed run removes nothing"
    with workspace(destination) as folder:
        assert names_in(folder) == []
    assert names_in(tmp_path) == []
