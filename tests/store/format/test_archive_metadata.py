"""The root group's entry: comes back as written, and changed or forged entries are refused."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.canonical import digest_of
from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.format.archive_metadata import (
    FORMAT,
    ROOT,
    Metadata,
    is_archive,
    read_metadata,
    sidecar_digests,
    write_metadata,
)
from tests.store.base.test_canonical import VALUES
from tests.store.format.test_plan import HOSTILE, make_plan, paths_into

METADATA = Metadata(
    plan=make_plan(),
    provenance={"model": {"id": "tiny/é"}, "versions": {"torch": "2.13.0"}, "command": None},
    files={"examples/part-00000.parquet": "ab" * 32, "head/head.json": "cd" * 32},
    sealed={"n_rows": 5, "n_examples": 2, "examples": "ef" * 32},
)


def entry_of(archive: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((archive / ROOT).read_bytes())["attributes"]["residua"]
    return entry


def write_entry(archive: Path, entry: object, *, sign: bool = True) -> None:
    """Write a forged entry with a right SHA-256."""
    if sign and isinstance(entry, dict):
        body = {key: value for key, value in entry.items() if key != "sha256"}
        entry = {**body, "sha256": digest_of(body)}
    root = {"zarr_format": 3, "node_type": "group", "attributes": {"residua": entry}}
    (archive / ROOT).write_text(json.dumps(root))


@pytest.mark.parametrize("sealed", [None, METADATA.sealed])
def test_metadata_comes_back(tmp_path: Path, sealed: dict[str, Any] | None) -> None:
    metadata = Metadata(plan=METADATA.plan, provenance=METADATA.provenance, files=METADATA.files, sealed=sealed)
    write_metadata(tmp_path, metadata)
    assert read_metadata(tmp_path) == metadata
    assert is_archive(tmp_path)


def test_the_digest_in_the_entry_is_of_all_else(tmp_path: Path) -> None:
    write_metadata(tmp_path, METADATA)
    entry = entry_of(tmp_path)
    assert entry.pop("sha256") == digest_of(entry)
    assert entry["digest"] == METADATA.plan.digest == digest_of(entry["plan"])


def test_a_folder_without_an_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("residua")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert not is_archive(path)
        with pytest.raises(FileNotFoundError, match="is not an archive"):
            read_metadata(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ROOT)
    assert not is_archive(tmp_path)


def test_a_plain_zarr_group_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / ROOT).write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert not is_archive(tmp_path)
    with pytest.raises(UnsafeArchiveError, match="not a Residua archive"):
        read_metadata(tmp_path)


@settings(max_examples=200)
@given(st.data())
def test_a_changed_byte_never_changes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    archive = tmp_path_factory.mktemp("archive")
    write_metadata(archive, METADATA)
    text = bytearray((archive / ROOT).read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    (archive / ROOT).write_bytes(text)
    try:
        found = read_metadata(archive)
    except (DamagedArchiveError, UnsafeArchiveError) as error:
        assert str(archive) in str(error)  # noqa: PT017  # either outcome is right for some bytes
    else:
        assert found == METADATA, "only white space, or Zarr's own fields, may change unnoticed"


@given(st.data())
def test_a_forged_entry_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    archive = tmp_path_factory.mktemp("archive")
    entry: Any = deepcopy(METADATA.to_json())
    path = data.draw(st.sampled_from([path for path in paths_into(entry)[1:] if path[0] != "sha256"]))
    parent = entry
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(VALUES | HOSTILE.filter(lambda value: value == value and value != "\ud800"))
    write_entry(archive, entry)
    try:
        read_metadata(archive)
    except UnsafeArchiveError:
        return
    assert entry["plan"] == METADATA.plan.to_json(), "a changed plan has another digest"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "examples/../../x", "examples", "commits/x", "zarr.json", "", "head/\0"]
)
def test_names_cannot_leave_the_sidecar_folders(tmp_path: Path, name: str) -> None:
    write_entry(tmp_path, {**METADATA.to_json(), "files": {name: "ab" * 32}})
    with pytest.raises(UnsafeArchiveError) as caught:
        read_metadata(tmp_path)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "2.0"}, f"format 2.0, this version reads {FORMAT}: update residua"),
        ({"format": 1.0}, "not an entry"),
        ({"digest": "00" * 32}, "digest"),
        ({"provenance": []}, "provenance"),
        ({"files": ["head/head.json"]}, "files"),
        ({"files": {"head/head.json": 1}}, "head/head.json"),
        ({"sealed": 3}, "sealed"),
        ({"sealed": {"n_rows": -1}}, "sealed rows: -1"),
    ],
)
def test_an_entry_that_residua_does_not_write_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_entry(tmp_path, {**METADATA.to_json(), **changes})
    with pytest.raises(UnsafeArchiveError) as caught:
        read_metadata(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    write_entry(tmp_path, {**METADATA.to_json(), "format": "1.7", "news": [1]})
    assert read_metadata(tmp_path) == METADATA


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\udc80", "[" * 10**5, "9" * 5000, '{"attributes": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ROOT).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises((DamagedArchiveError, UnsafeArchiveError), match=ROOT):
        read_metadata(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"', "[" * 400 + "]" * 400, "[" * 900 + "]" * 900])
@pytest.mark.parametrize("key", ["provenance", "plan"])
def test_values_beyond_strict_json_are_refused(tmp_path: Path, key: str, value: str) -> None:
    document = json.dumps({"attributes": {"residua": {"format": FORMAT, key: {"x": 0}}}})
    (tmp_path / ROOT).write_text(document.replace('{"x": 0}', f'{{"x": {value}}}'))
    with pytest.raises((DamagedArchiveError, UnsafeArchiveError), match=ROOT):
        read_metadata(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / ROOT).open("wb") as file:
        file.truncate(2**40)
    assert is_archive(tmp_path), "so that nobody takes the folder for a free place"
    with pytest.raises(UnsafeArchiveError, match="256 MiB"):
        read_metadata(tmp_path)


def test_side_files_are_found_by_content_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("examples/part-00000.parquet", "tokenizer/deep/er.json", "head/.x.1-00000000.tmp", "other/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sidecar_digests(tmp_path) == {"examples/part-00000.parquet": abc, "tokenizer/deep/er.json": abc}
