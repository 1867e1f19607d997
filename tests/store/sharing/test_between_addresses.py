"""Archives copied from one address to another, and repacked from one: each byte as it was, checked on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

import residua
from residua.pipelines.copies.repack import repack
from residua.store.base.errors import DamagedArchiveError, PlanError
from residua.store.read.archive import Archive
from residua.store.sharing.copy import copy
from residua.store.sharing.push import push
from tests.servers.clouds import serving_cloud
from tests.servers.files import FileServer, serving_files
from tests.servers.hub import HubServer, serving_hub
from tests.servers.hub_client import use_hub
from tests.servers.objects import files, objects
from tests.store.sharing.test_stacks import stacked
from tests.store.small_archive import make_archive

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own requests
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("source")
    archive = Archive(make_archive(found / "a.zarr"))
    archive.annotate({"example": [1], "mark": ["x"]}, name="judge")
    return found


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving_hub(tmp_path) as running:
        use_hub(monkeypatch, running)
        running.publish("org/there", folder)
        yield running


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving_files(folder) as running:
        yield running


@contextmanager
def opened(kind: str, folder: Path, hub: HubServer, server: FileServer) -> Iterator[residua.Archive]:
    """Give the archive at an address of each kind."""
    if kind == "az":
        with serving_cloud("az") as cloud:
            push(folder / "a.zarr", cloud.address("a.zarr"), storage_options=cloud.options)
            yield residua.open(cloud.address("a.zarr"), storage_options=cloud.options)
    else:
        address = f"{server.url}/a.zarr" if kind == "http" else "hf://datasets/org/there/a.zarr"
        yield residua.open(address, cache=False)


def without_records(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.startswith("commits/")}


@pytest.mark.parametrize("kind", ["az", "http", "hf"])
def test_a_bucket_gets_the_same_bytes_and_each_shard_is_asked_for_once(
    kind: str, folder: Path, hub: HubServer, server: FileServer, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    with opened(kind, folder, hub, server) as source, serving_cloud("gs") as cloud:
        source["q.1"][:16]  # what was read before, and is fetched ahead, changes nothing
        server.forget()
        address, options = cloud.address("copy.zarr"), cloud.options
        copied = copy(source, address, storage_options=options, on_bytes=lambda *step: steps.append(step))
        assert objects(address, options) == without_records(files(folder / "a.zarr"))
        assert (copied.sent_bytes, steps[-1]) == (copied.n_bytes, (copied.n_bytes, copied.n_bytes))
        assert {n for path, n in server.requests.items() if "/c/" in path} <= {1}
        again = copy(source, address, storage_options=options)
        assert again.sent_bytes < copied.sent_bytes
        assert residua.verify(address, storage_options=options).problems == []
        larger = repack(source, tmp_path / "large.zarr", shard_bytes=40 * 4 * 32)
    assert files(larger.path) == files(repack(folder / "a.zarr", tmp_path / "same.zarr", shard_bytes=40 * 4 * 32).path)


def test_a_repository_gets_an_archive_from_an_address(
    folder: Path, hub: HubServer, server: FileServer, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    push(f"{server.url}/a.zarr", "hf://datasets/org/copy", on_bytes=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    there = hub.repositories["datasets/org/copy"].files()
    expected = without_records(files(folder / "a.zarr"))
    assert {name: hub.content(there[name]) for name in expected} == expected
    assert residua.verify("hf://datasets/org/copy").is_sound


def test_the_archives_of_several_stacks(tmp_path: Path) -> None:
    stacked(tmp_path / "web" / "m.zarr")
    with serving_files(tmp_path / "web") as web, serving_cloud("gs") as cloud:
        options: Any = {"storage_options": cloud.options}
        copy(residua.open(f"{web.url}/m.zarr", cache=False), cloud.address("m.zarr"), **options)
        assert residua.verify(cloud.address("m.zarr"), **options).is_sound
        there = objects(cloud.address("m.zarr"), cloud.options)
    found = files(tmp_path / "web" / "m.zarr")
    assert there == {name: data for name, data in found.items() if "commits/" not in name}


@pytest.mark.parametrize("name", ["0", "part-00000.parquet", "commits.index"])
def test_what_was_altered_does_not_travel(name: str, folder: Path, server: FileServer) -> None:
    server.altered.add(name)
    with serving_cloud("gs") as cloud:
        with pytest.raises(DamagedArchiveError, match=rf"{server.url}/a\.zarr/.*{name}"):
            copy(f"{server.url}/a.zarr", cloud.address("copy.zarr"), storage_options=cloud.options)
        assert "copy.zarr/zarr.json" not in cloud.objects


def test_what_cannot_be_copied_is_said_first(folder: Path, server: FileServer, tmp_path: Path) -> None:
    address = f"{server.url}/a.zarr"
    with pytest.raises(PlanError, match=r"q\.\*|extract"):
        copy(address, "s3://bucket/x", sites="q.*")
    with pytest.raises(PlanError, match=r"https://example\.org/x.*own tools"):
        copy(folder / "a.zarr", "https://example.org/x")
    with pytest.raises(PlanError, match="are folders"):
        copy(folder / "a.zarr", tmp_path / "b.zarr")
    with pytest.raises(PlanError, match=r"pull"):
        residua.pack(address)
    with pytest.raises(PlanError, match=r"s3://bucket/x"):
        residua.overlay(folder / "a.zarr", "s3://bucket/x")
