"""What a copy says of the machine that it came from."""

import json
from pathlib import Path
from typing import Any

import pytest

from residua.store.base.local_paths import without_local_paths
from residua.store.format.archive_metadata import ROOT, read_metadata, write_metadata
from residua.store.read.archive import Archive
from residua.store.sharing.push import push
from residua.store.verification.verify import verify
from tests.servers.clouds import serving_cloud
from tests.servers.hub import serving_hub
from tests.servers.hub_client import use_hub
from tests.store.small_archive import make_archive


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/anna/models/llama", "llama"),
        ("/home/anna/My Models/llama 3", "llama 3"),
        ("~/models/llama/", "llama"),
        ("~anna/llama", "llama"),
        (r"C:\Users\anna\llama", "llama"),
        ("D:/models/llama", "llama"),
        (
            "residua capture --model /home/anna/m --dataset='/data/x.jsonl' --out a",
            "residua capture --model m --dataset='x.jsonl' --out a",
        ),
        ("--out=/home/anna/a.zarr", "--out=a.zarr"),
        ("read from /data/x.jsonl, and (/data/y)", "read from x.jsonl, and (y)"),
    ],
)
def test_absolute_paths_are_shortened(text: str, expected: str) -> None:
    found: dict[str, str] = {}
    assert without_local_paths({"a": [text]}, found) == {"a": [expected]}
    assert all("anna" in path or "data" in path or "models" in path for path in found)


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B",
        "hf://datasets/org/acts",
        "https://example.org/a/b",
        "s3://bucket/a.zarr",
        "tokens/s and rows/s",
        "models/pydoc-1m",
        "../data/x.jsonl",
        "a / b",
        "",
        "/",
        "10:30 and/or 5/6",
    ],
)
def test_other_texts_stay(text: str) -> None:
    found: dict[str, str] = {}
    assert without_local_paths([text, 3, None, 1.5, True], found) == [text, 3, None, 1.5, True]
    assert not found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = make_archive(tmp_path / "a.zarr")
    metadata: Any = read_metadata(path)
    told = {"model": {"id": "/home/anna/m"}, "command": "residua capture --model /home/anna/m --out a", "seed": 3}
    write_metadata(path, type(metadata)(**{**vars(metadata), "provenance": {**metadata.provenance, **told}}))
    return path


@pytest.mark.parametrize("keep", [False, True])
def test_a_copy_has_no_paths_of_this_machine_unless_asked(source: Path, keep: bool) -> None:
    before = (source / ROOT).read_bytes()
    with serving_cloud("gs") as cloud:
        address = cloud.address("a.zarr")
        copied = push(source, address, storage_options=cloud.options, keep_paths=keep)
        again = push(source, address, storage_options=cloud.options, keep_paths=keep)
        sent = cloud.objects["a.zarr/zarr.json"].data
        assert (b"anna" in sent, sent == before) == (keep, keep)
        assert [("anna" in note, "keep_paths" in note) for note in copied.notes] == [(True, True)] * (not keep)
        assert again.notes == copied.notes
        report = verify(address, storage_options=cloud.options)
    assert report.is_sound
    assert (source / ROOT).read_bytes() == before
    found, mine = json.loads(sent), json.loads(before)
    assert found["attributes"]["residua"]["digest"] == mine["attributes"]["residua"]["digest"]
    assert found["attributes"]["residua"]["provenance"]["seed"] == 3


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_hub_gets_no_paths_either(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    with serving_hub(tmp_path / "hub") as hub:
        use_hub(monkeypatch, hub)
        copied = push(source, "hf://datasets/org/acts", storage_options=hub.options)
        assert any("/home/anna/m" in note for note in copied.notes)
        files = hub.repositories["datasets/org/acts"].files()
        assert not any(b"anna" in hub.content(file) for file in files.values())
        assert push(source, "hf://datasets/org/acts", storage_options=hub.options).sent_bytes == 0
        assert Archive(source).provenance["model"] == {"id": "/home/anna/m"}
