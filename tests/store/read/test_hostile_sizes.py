"""Archives that claim more than they have: an error at once, before memory is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from residua.store.encoding.shard import shard_path
from residua.store.format.archive_metadata import read_metadata
from residua.store.format.array_metadata import create_array, resize_array
from residua.store.read.archive import Archive
from residua.store.read.array import ArchiveArray
from residua.store.read.summary import summarise
from tests.store.forging import (
    in_a_row,
    little_memory,
    load,
    problems,
    refused,
    sign_array,
    sign_commit,
    sign_root,
    sign_shard,
)
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive, read_everything

SITE = "resid_post.0"
HUGE = 2**48 - HEIGHT
READS: dict[str, Callable[[ArchiveArray], object]] = {
    "all": lambda array: array[...],
    "backwards": lambda array: array[::-1],
    "here and there": lambda array: array[:: HUGE // 8],
    "the last": lambda array: array[-1],
    "a list": lambda array: array[[0, HUGE - 1]],
    "numpy": lambda array: array.__array__(),
}


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive that claims to be sealed with 2**48 rows, of which it has 32."""
    path = make_archive(tmp_path_factory.mktemp("huge") / "a.zarr", open_size=True)
    (path / "commits/00000002-0000.json").unlink()
    document = load(path / "zarr.json")
    document["attributes"]["residua"]["sealed"]["n_rows"] = HUGE
    sign_root(path, document)
    for spec in read_metadata(path).plan.arrays:
        resize_array(path, spec, HUGE)
    return path


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", [SITE, "rows/token"])
def test_rows_that_are_not_there_take_no_memory(huge: Path, name: str, read: str) -> None:
    archive = Archive(huge)
    array = archive[name] if name == SITE else archive.rows.token
    words = refused(READS[read], array)
    assert "has lost shards" in words
    assert str(huge) in words


def test_its_other_claims_are_reported(huge: Path) -> None:
    with little_memory():
        archive = Archive(huge)
        assert archive.progress == (32, HUGE, 2, HUGE // HEIGHT)
        assert archive[SITE].shape == (HUGE, 40)
        assert f"{HUGE:,} rows" in repr(archive)
    assert f"the examples have {N_ROWS} rows, but the archive has {HUGE:,}" in refused(lambda: archive.examples)
    assert "copy the archive again" in refused(summarise, archive)
    assert "more records are missing" in problems(huge)


def test_a_committed_shard_that_claims_forty_gigabytes_is_opened_before_memory_is_taken(copy: Path) -> None:
    height = 2**28
    document = load(copy / "zarr.json")
    plan = document["attributes"]["residua"]["plan"]
    plan["rows_per_shard"] = plan["n_rows"] = height
    record = load(copy / "commits/00000000-0000.json")["record"]
    for path in (copy / "commits").iterdir():
        path.unlink()
    sign_commit(copy / "commits/00000000-0000.json", {**record, "rows": [0, height]})
    sign_root(copy, document)
    for spec in read_metadata(copy).plan.arrays:
        create_array(copy, spec, height)
    archive = Archive(copy)
    assert archive.is_sealed
    for read in (READS["all"], READS["the last"]):
        assert "resid_post/0/c/0/0: the shard's index is damaged, or the file was cut" in refused(read, archive[SITE])
    assert "resid_post/0/c/0/0: " in problems(copy)


def test_more_rows_than_there_is_memory_for(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = Archive(untouched)[SITE]

    def too_large(*_: object) -> None:
        raise MemoryError("Unable to allocate 8.00 EiB")

    monkeypatch.setattr("residua.store.read.rows_in_shards.ArrayReader.read", too_large)
    words = refused(READS["all"], array)
    assert words.startswith("resid_post.0 has 38 rows of 160 bytes, and there is too little memory")
    assert words.endswith("8.00 EiB): read fewer at a time")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", [-5, 40]),
        ("shape", [2**63, 40]),
        ("shape", [N_ROWS, 2**40]),
        ("shape", [N_ROWS, -40]),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [2**40, 40]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [0, 40]}}),
    ],
)
def test_an_array_of_impossible_shape(copy: Path, name: str, change: Any) -> None:
    path = copy / "sites/resid_post/0/zarr.json"
    sign_array(path, {**load(path), name: change})
    assert str(path) in refused(Archive, copy)
    assert str(path) in problems(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows_per_shard", 2**31),
        ("rows_per_shard", -16),
        ("n_rows", -1),
        ("n_rows", 2**63),
        ("n_rows", 1e300),
        ("sites", [{"name": SITE, "row_shape": [2**31, 2**31], "dtype": "float32", "codec": "raw"}]),
        ("sites", [{"name": SITE, "row_shape": [-40], "dtype": "float32", "codec": "raw"}]),
        ("sites", [{"name": SITE, "row_shape": [40], "dtype": "object", "codec": "raw"}]),
        ("sites", [{"name": SITE, "row_shape": [40], "dtype": "float32", "codec": "pickle"}]),
    ],
)
def test_a_plan_of_impossible_sizes(copy: Path, key: str, value: object) -> None:
    document = load(copy / "zarr.json")
    document["attributes"]["residua"]["plan"][key] = value
    sign_root(copy, document)
    assert f"{copy}/zarr.json: the archive's plan is not one that Residua writes" in refused(Archive, copy)


@pytest.mark.parametrize("codec", ["raw", "fast", "int8-block32"])
@pytest.mark.parametrize(
    "shift",
    [lambda at, size: (2**64 - size, size), lambda at, size: (at, size), lambda at, size: (0, 2**63)],
    ids=["negative", "past a gap", "huge"],
)
def test_a_signed_index_of_impossible_chunks(codec: str, shift: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.zarr", codec)
    (spec, *_) = read_metadata(archive).plan.site(SITE).arrays(HEIGHT)
    path = shard_path(archive, spec, 1)
    half = path.read_bytes()[: -16 * spec.chunks_per_shard - 4]
    chunks = [half[:-4]]
    sign_shard(path, chunks, in_a_row(chunks), spec.chunks_per_shard)
    assert read_everything(archive)[SITE] == read_everything(make_archive(tmp_path / "b.zarr", codec))[SITE]
    sign_shard(path, chunks, [shift(*entry) for entry in in_a_row(chunks * 2)[1:]], spec.chunks_per_shard)
    words = refused(lambda: Archive(archive)[SITE][...])
    assert f"{path}: the index puts chunk 0 at byte" in words
    assert "the index puts chunk 0" in problems(archive)
