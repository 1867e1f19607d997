"""An archive on the Hub: few requests, whatever is read, and one commit for as long as it is open."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.summary import summarise
from residua.store.verification.verify import verify
from tests.servers.hub import HubServer, serving_hub
from tests.store.small_archive import N_ROWS, N_SHARDS, make_archive

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("source") / "a.zarr"))


@pytest.fixture
def hub(source: Archive, tmp_path: Path) -> Iterator[HubServer]:
    with serving_hub(tmp_path) as hub:
        hub.publish("org/acts", source.path)
        yield hub


def test_requests_grow_with_files_and_not_with_reads(source: Archive, hub: HubServer) -> None:
    there = RemoteArchive("hf://datasets/org/acts", storage_options={"endpoint": hub.url}, cache=False)
    assert (hub.requests["resolve"], hub.requests.total() <= 3) == (2, True)
    for row in np.random.default_rng(0).integers(0, N_ROWS, 100).tolist():
        for site in source.sites:
            assert np.array_equal(there[site][row], source[site][row])
    assert hub.requests["resolve"] <= 2 + len(source.sites) * N_SHARDS
    assert hub.requests["storage"] > 100


def test_an_open_archive_does_not_change(source: Archive, hub: HubServer, tmp_path: Path) -> None:
    options = {"endpoint": hub.url}
    there = RemoteArchive("hf://datasets/org/acts", storage_options=options, cache=False)
    commit = hub.repositories["datasets/org/acts"].branches["main"]
    assert there.place == summarise(there).path == f"hf://datasets/org/acts@{commit}"
    (tmp_path / "other").mkdir()
    other = hub.publish("org/other", make_archive(tmp_path / "other" / "b.zarr", seed=1))
    hub.repositories["datasets/org/acts"].commit(other.files())
    for archive in (there, RemoteArchive(there.place, storage_options=options, cache=False)):
        assert np.array_equal(archive["q.1"][:], source["q.1"][:])
        assert archive.examples.equals(source.examples)
    moved = pickle.loads(pickle.dumps(there.chunks)).folder  # noqa: S301
    assert moved.commit == commit
    assert verify(there.place, storage_options=options).problems == []
    changed = RemoteArchive("hf://datasets/org/acts", storage_options=options, cache=False)
    assert not np.array_equal(changed["q.1"][:], source["q.1"][:])
