"""Archives that somebody made on purpose: an error in the user's words, at once, and no memory taken for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.store.archive import Archive
from residua.store.arrays import create_array, open_array, resize_array
from residua.store.files import write_file
from residua.store.metadata import read_metadata
from residua.store.shard import ShardEncoder, shard_path
from residua.store.stored import StoredArray
from residua.store.summary import summarise
from residua.store.verify import verify
from tests.store.forging import (
    in_a_row,
    little_memory,
    load,
    refused,
    sign_array,
    sign_commit,
    sign_root,
    sign_shard,
    sign_side_file,
)
from tests.store.small_archive import HEIGHT, N_ROWS, make_archive, read_everything

HUGE = 2**48 - HEIGHT
SITE = "resid_post.0"
READS: dict[str, Callable[[StoredArray], object]] = {
    "all": lambda array: array[...],
    "backwards": lambda array: array[::-1],
    "here and there": lambda array: array[:: HUGE // 8],
    "the last": lambda array: array[-1],
    "a list": lambda array: array[[0, HUGE - 1]],
    "numpy": lambda array: array.__array__(),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("sound") / "a.zarr")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "a.zarr"))


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


def problems(archive: Path) -> str:
    with little_memory():
        return "\n".join(f"{problem.path}: {problem.what}" for problem in verify(archive).problems)


class TestHugeShapes:
    @pytest.mark.parametrize("read", READS)
    @pytest.mark.parametrize("name", [SITE, "rows/token"])
    def test_rows_that_are_not_there_take_no_memory(self, huge: Path, name: str, read: str) -> None:
        archive = Archive(huge)
        array = archive[name] if name == SITE else archive.rows.token
        words = refused(READS[read], array)
        assert f"are not captured yet (32 of {HUGE:,} are)" in words

    def test_everything_else_says_what_is_wrong(self, huge: Path) -> None:
        with little_memory():
            archive = Archive(huge)
            assert archive.progress == (32, HUGE, 2, HUGE // HEIGHT)
            assert archive[SITE].shape == (HUGE, 40)
            assert f"{HUGE:,} rows" in repr(archive)
        assert f"the examples have {N_ROWS} rows, but the archive has {HUGE:,}" in refused(lambda: archive.examples)
        assert "copy it again" in refused(summarise, archive)
        assert "more records are missing" in problems(huge)

    def test_a_shard_of_forty_gigabytes_with_a_record_is_opened_first(self, copy: Path) -> None:
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
            assert "resid_post/0/c/0/0: the shard's index is damaged, or the file was cut" in refused(
                read, archive[SITE]
            )
        assert "resid_post/0/c/0/0: " in problems(copy)

    def test_more_rows_than_there_is_memory_for(self, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        array = Archive(sound)[SITE]

        def too_large(*_: object) -> None:
            raise MemoryError("Unable to allocate 8.00 EiB")

        monkeypatch.setattr("residua.store.reader.ArrayReader.read", too_large)
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
    def test_an_array_of_impossible_shape(self, copy: Path, name: str, change: Any) -> None:
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
    def test_a_plan_of_impossible_sizes(self, copy: Path, key: str, value: object) -> None:
        document = load(copy / "zarr.json")
        document["attributes"]["residua"]["plan"][key] = value
        sign_root(copy, document)
        assert f"{copy}/zarr.json: the archive's plan is not one that Residua writes" in refused(Archive, copy)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "../../etc",
            "resid_post.../..",
            "resid_post.-1",
            "module:../../x@output",
            "module:/etc@output",
            "/etc",
            "module:a\0@output",
        ],
    )
    def test_a_site_that_leads_out(self, copy: Path, name: str) -> None:
        document = load(copy / "zarr.json")
        document["attributes"]["residua"]["plan"]["sites"][0]["name"] = name
        sign_root(copy, document)
        words = refused(Archive, copy)
        assert str(copy / "zarr.json") in words
        assert repr(name) in words or name in words

    @pytest.mark.parametrize("name", ["../zarr.json", "/etc/passwd", "part-00000.parquet/../../x", "part-0.parquet"])
    def test_an_example_part_that_leads_out(self, copy: Path, name: str) -> None:
        path = copy / "commits/00000001-0000.json"
        sign_commit(path, {**load(path)["record"], "examples": {name: "0" * 64}})
        for read in (lambda: Archive(copy).examples, lambda: Archive(copy)[SITE][0]):
            words = refused(read)
            assert str(path) in words
            assert repr(name) in words

    @pytest.mark.parametrize(
        "name",
        [
            "zarr.json",
            "commits",
            "commits/00000001-0000.json",
            "examples",
            "examples/part-00000.parquet",
            "tokenizer",
            "tokenizer/tokenizer.json",
            "sites",
            "sites/q/1/zarr.json",
            "sites/q/1/c",
            "sites/q/1/c/1/0/0",
            "rows/token/c/1",
        ],
    )
    def test_a_link_that_leads_out_is_not_followed(self, copy: Path, tmp_path: Path, name: str) -> None:
        """What lies outside is the very file: were the link followed, all would be well."""
        (copy / name).rename(tmp_path / "outside")
        (copy / name).symlink_to(tmp_path / "outside")
        errors = [str(value) for value in read_everything(copy).values() if isinstance(value, Exception)]
        assert errors
        for words in (errors[0], problems(copy)):
            assert f"{copy / name}" in words
            assert "is a link that leads out of the archive, to " in words

    @pytest.mark.parametrize("name", ["head/head.safetensors", "examples/more"])
    def test_other_links_that_lead_out_are_named(self, copy: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "outside").mkdir()
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(tmp_path / "outside")
        assert f"{name} is a link that leads out" in problems(copy)

    def test_links_that_stay_inside_or_lead_to_the_archive_are_followed(self, copy: Path, tmp_path: Path) -> None:
        before = read_everything(copy)
        (copy / "sites/q/1/c/1/0/0").rename(copy / "sites/q/1/c/1/0/real")
        (copy / "sites/q/1/c/1/0/0").symlink_to("real")
        (tmp_path / "link").symlink_to(copy)
        assert read_everything(tmp_path / "link") == before


SMALL_FILES = [
    "zarr.json",
    "sites/q/zarr.json",
    "sites/q/1/zarr.json",
    "commits/00000001-0000.json",
    "examples/part-00000.parquet",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_file_of_a_terabyte_of_nothing_is_not_read(copy: Path, name: str) -> None:
    with (copy / name).open("wb") as file:
        file.truncate(2**40)
    with little_memory():
        errors = [str(value) for value in read_everything(copy).values() if isinstance(value, Exception)]
    assert all(str(copy / name) in words for words in errors)
    assert errors or name == "sites/q/zarr.json"
    assert name in problems(copy)


@pytest.mark.parametrize("name", SMALL_FILES[1:])
def test_a_pipe_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    errors = [str(value) for value in read_everything(copy).values() if isinstance(value, Exception)]
    assert all(str(copy / name) in words for words in errors)
    assert name in problems(copy)


@pytest.mark.parametrize("name", ["part-00001.parquet", "part-00007.parquet"])
def test_a_foreign_part_of_examples_is_refused(copy: Path, name: str) -> None:
    shutil.copy(copy / "examples/part-00000.parquet", copy / "examples" / name)
    assert str(copy / "examples") in refused(lambda: Archive(copy).examples)
    assert "examples" in problems(copy)


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


@pytest.mark.parametrize(("column", "value"), [("example", 4), ("example", -1), ("position", 20), ("position", -1)])
def test_rows_that_name_no_token(copy: Path, column: str, value: int) -> None:
    spec, _, _ = open_array(copy, f"rows/{column}")
    values = Archive(copy).rows._asdict()[column][:HEIGHT]
    values[3] = value
    write_file(shard_path(copy, spec, 0), ShardEncoder(np.ascontiguousarray(values), spec))
    words = refused(Archive(copy).text, 3)
    assert f"{copy}: row 3 is said to be position" in words


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", "[" * 10**5, '{"version": "1.0"}', '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}'],
)
def test_a_tokenizer_that_is_none(copy: Path, text: str) -> None:
    sign_side_file(copy, "tokenizer/tokenizer.json", text.encode())
    assert "tokenizer/tokenizer.json is not a tokenizer" in refused(Archive(copy).text, 0)
