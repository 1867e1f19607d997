"""A web server that means harm: it redirects, sends more than was asked for, and claims what cannot be."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from residua.store.base.canonical import digest_of
from residua.store.base.errors import ResiduaError, StorageError, UnsafeArchiveError
from residua.store.format.archive_metadata import ROOT
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import INDEX
from residua.store.sharing.pull import pull
from tests.servers.files import FileServer, serving_files
from tests.store.small_archive import make_archive

pytestmark = pytest.mark.timeout(120)
QUICK = {"retry_config": {"max_retries": 0}}
FEW_BYTES = 64 * 2**20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    make_archive(tmp_path / "a.zarr")
    with serving_files(tmp_path) as server:
        yield server


def opened(server: FileServer, **options: object) -> RemoteArchive:
    return RemoteArchive(f"{server.url}/a.zarr", storage_options={**QUICK, **options}, cache=False)


def test_a_login_does_not_follow_a_redirect_to_another_host(server: FileServer) -> None:
    """Public archives do lie behind redirects, so they are followed; what comes is compared like anything else."""
    login = {"client_options": {"default_headers": {"Authorization": "Bearer secret"}}}
    with serving_files(server.folder, elsewhere=server.url.replace("127.0.0.1", "localhost")) as door:
        there = opened(door, **login)
        assert np.array_equal(there["q.1"][:], Archive(server.folder / "a.zarr")["q.1"][:])
        assert door.logins == {"Bearer secret"}
        assert server.logins == {None}
        server.altered = {"0"}
        with pytest.raises(ResiduaError, match=r"q/1/c/0/0/0.*damaged"):
            opened(door)["q.1"][:]


def test_a_circle_of_redirects_is_an_error_that_names_the_object(server: FileServer) -> None:
    server.elsewhere = server.url
    with pytest.raises(StorageError, match=r"a\.zarr/zarr\.json.*redirect"):
        opened(server)


@pytest.mark.parametrize("fault", ["endless", "claims"])
def test_the_root_is_not_taken_at_any_length(server: FileServer, fault: str) -> None:
    server.faults, server.faulty = [fault], ROOT
    with pytest.raises(StorageError, match=r"zarr\.json has 1,152,921,504,606,846,976 bytes, and at most"):
        opened(server)
    assert server.n_bytes < FEW_BYTES


def test_ranges_are_not_taken_at_any_length(server: FileServer) -> None:
    there = opened(server)
    there["q.1"][:1]
    server.forget()
    server.faults = ["endless"] * 5
    with pytest.raises(StorageError, match=r"q/1/c/1/0/0.*bytes 0 to .* more came"):
        there["q.1"][20:22]
    assert server.n_bytes < FEW_BYTES


def test_an_index_that_comes_with_its_head_is_not_taken_at_any_length(server: FileServer) -> None:
    server.faults, server.faulty = ["endless"] * 5, INDEX
    with pytest.raises(StorageError, match=rf"{INDEX}.*more came"):
        opened(server)
    assert server.n_bytes < FEW_BYTES


def test_pages_of_the_index_are_not_taken_at_any_length(server: FileServer) -> None:
    there = RemoteArchive(f"{server.url}/a.zarr", storage_options=QUICK, cache=False, index_bytes=0)
    server.forget()
    server.faults = ["endless"] * 5
    with pytest.raises(StorageError, match=rf"{INDEX}.*more came"):
        there["q.1"][:]
    assert server.n_bytes < FEW_BYTES


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "tokenizer/../../outside", "C:\\outside"])
def test_names_in_the_metadata_do_not_lead_out_of_the_archive(server: FileServer, name: str, tmp_path: Path) -> None:
    """Neither on the server nor, when the archive is pulled, on this disk; the digest of the forged root is right."""
    root = server.folder / "a.zarr" / ROOT
    found = json.loads(root.read_text())
    entry = found["attributes"]["residua"]
    entry["files"][name] = "0" * 64
    entry["sha256"] = digest_of({key: value for key, value in entry.items() if key != "sha256"})
    root.write_text(json.dumps(found))
    with pytest.raises(UnsafeArchiveError):
        opened(server)
    with pytest.raises(UnsafeArchiveError):
        pull(f"{server.url}/a.zarr", tmp_path / "pulled.zarr")
    assert set(server.requests) <= {f"/a.zarr/{name}" for name in (ROOT, INDEX)}
