"""Hostile names, links and files: an error in the user's words, at once, before memory is taken."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from residua.store.encoding.shard import ShardEncoder, shard_path
from residua.store.format.array_metadata import open_array
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file
from tests.store.forging import (
    little_memory,
    load,
    problems,
    refused,
    sign_commit,
    sign_root,
    sign_sidecar,
    without_index,
)
from tests.store.small_archive import HEIGHT, read_everything

SITE = "resid_post.0"
UNREAD = ("commits", "commits/00000001-0000.json", "sites/q/1/zarr.json")  # by readers of a packed archive


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
            "commits.index",
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
        if name in UNREAD:
            without_index(copy)
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
    "commits.index",
    "examples/part-00000.parquet",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_sparse_file_of_a_terabyte_is_not_read(copy: Path, name: str) -> None:
    if name in UNREAD:
        without_index(copy)
    with (copy / name).open("wb") as file:
        file.truncate(2**40)
    with little_memory():
        errors = [str(value) for value in read_everything(copy).values() if isinstance(value, Exception)]
    assert all(str(copy / name) in words for words in errors)
    assert errors or name == "sites/q/zarr.json"
    assert name in problems(copy)


@pytest.mark.parametrize("name", SMALL_FILES[1:])
def test_a_pipe_does_not_block(copy: Path, name: str) -> None:
    if name in UNREAD:
        without_index(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    errors = [str(value) for value in read_everything(copy).values() if isinstance(value, Exception)]
    assert all(str(copy / name) in words for words in errors)
    assert name in problems(copy)


@pytest.mark.parametrize("name", ["part-00001.parquet", "part-00007.parquet"])
def test_an_unknown_part_of_examples_is_refused(copy: Path, name: str) -> None:
    shutil.copy(copy / "examples/part-00000.parquet", copy / "examples" / name)
    assert str(copy / "examples") in refused(lambda: Archive(copy).examples)
    assert "examples" in problems(copy)


@pytest.mark.parametrize(("column", "value"), [("example", 4), ("example", -1), ("position", 20), ("position", -1)])
def test_rows_without_a_token(copy: Path, column: str, value: int) -> None:
    spec, _, _ = open_array(copy, f"rows/{column}")
    values = Archive(copy).rows._asdict()[column][:HEIGHT]
    values[3] = value
    write_file(shard_path(copy, spec, 0), ShardEncoder(np.ascontiguousarray(values), spec))
    words = refused(Archive(copy).text, 3)
    assert f"{copy}: row 3 should be position" in words


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", "[" * 10**5, '{"version": "1.0"}', '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}'],
)
def test_a_file_that_is_no_tokenizer(copy: Path, text: str) -> None:
    sign_sidecar(copy, "tokenizer/tokenizer.json", text.encode())
    assert "tokenizer/tokenizer.json cannot be read as a tokenizer" in refused(Archive(copy).text, 0)
