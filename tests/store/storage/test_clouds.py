"""Google Cloud Storage and Azure Blob Storage, as obstore speaks with them; and what all services refuse."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.store.base.errors import StorageError
from residua.store.storage.destination import BucketFolder
from residua.store.storage.lease import LEASE, leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from residua.store.storage.place import try_archive_place
from residua.store.verification.verify import verify
from tests.servers.azurite import is_installed, serving_azurite
from tests.servers.clouds import CloudServer, serving_cloud
from tests.servers.proxy import Proxy, proxied
from tests.servers.s3 import S3Server
from tests.store.small_archive import make_archive
from tests.store.storage.asking import WAYS

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[CloudServer]:
    with serving_cloud(request.param) as server:
        yield server


@pytest.fixture(scope="module", params=["gs", "az", "azurite"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """Give our servers, and Microsoft's own where it is installed. Emulators of Google's lack what obstore asks for."""
    if request.param != "azurite":
        with serving_cloud(request.param) as server:
            yield server
    elif not is_installed():
        pytest.skip("Azurite is not installed: npm install -g azurite")
    else:
        with serving_azurite(tmp_path_factory.mktemp("azurite")) as server:
            yield server


def test_objects_are_written_once_replaced_by_version_listed_and_removed(service: CloudServer) -> None:
    folder = ObjectFolder(service.address("objects"), service.options)
    assert folder.create("a b/x", b"mine")
    assert not folder.create("a b/x", b"mine")
    with pytest.raises(FileExistsError, match="a b/x"):
        folder.create("a b/x", b"other")
    data, version = folder.read_tagged("a b/x", 10)
    folder.replace("a b/x", data + b"2", version)
    with pytest.raises(FileExistsError):
        folder.replace("a b/x", b"late", version)
    names = [f"many/{i:03}" for i in range(120)]  # of several pages
    for name in names:
        folder.write(name, [name.encode()])
    assert [entry.name for entry in folder.list("many")] == names
    assert folder.read_range("many/017", 5, 8).tobytes() == b"017"
    assert (folder.size("a b/x"), folder.size("gone")) == (5, None)
    folder.delete(["gone", *names, "gone as well"])
    assert [entry.name for entry in folder.list()] == ["a b/x"]


def test_a_large_file_goes_in_parts(service: CloudServer) -> None:
    folder, content = BucketFolder(service.address("parts"), service.options), np.arange(3_000_000, dtype="<u4")
    assert folder.write("sites/x", [content[:7], content[7:]]) == content.nbytes
    assert folder.objects.read("sites/x", content.nbytes) == content.tobytes()
    assert not service.parts


def test_one_run_at_a_time(service: CloudServer) -> None:
    place = try_archive_place(service.address("run"), service.options)
    assert place.notes == ()
    folder = ObjectFolder(service.address("run"), service.options)
    with leased(folder) as lease:
        lease._renew()
        lease.check()
        with pytest.raises(ArchiveInUseError), leased(folder):
            pass
    assert folder.size(LEASE) is None


def test_an_archive_is_pushed_read_and_pulled(service: CloudServer, untouched: Path, tmp_path: Path) -> None:
    address = service.address("a.zarr")
    residua.push(untouched, address, storage_options=service.options)
    assert residua.push(untouched, address, storage_options=service.options).sent_bytes < 200_000
    here, there = residua.open(untouched), residua.open(address, storage_options=service.options)
    assert np.array_equal(there["q.1"][3:30], here["q.1"][3:30])
    assert verify(address, storage_options=service.options).is_sound
    residua.pull(address, tmp_path / "back.zarr", storage_options=service.options)
    assert verify(tmp_path / "back.zarr").is_sound
    with pytest.raises(residua.ResiduaError, match="another archive"):
        residua.push(make_archive(tmp_path / "other.zarr", seed=3), address, storage_options=service.options)


def test_a_list_that_lags_behind_loses_nothing(cloud: CloudServer, untouched: Path) -> None:
    address = cloud.address("lagging.zarr")
    cloud.lag = 12
    try:
        residua.push(untouched, address, storage_options=cloud.options)
        again = residua.push(untouched, address, storage_options=cloud.options)
        assert again.n_files
        assert verify(address, storage_options=cloud.options).is_sound
    finally:
        cloud.lag = 0
    there = {name.removeprefix("lagging.zarr/") for name in cloud.objects if name.startswith("lagging.zarr/")}
    here = {path.relative_to(untouched).as_posix() for path in untouched.rglob("*") if path.is_file()}
    assert there == {name for name in here if not name.startswith("commits/")}


@pytest.mark.parametrize("way", WAYS)
def test_a_bucket_that_is_not_there_and_one_that_is_closed(cloud: CloudServer, way: str) -> None:
    with pytest.raises(StorageError, match=r"no bucket elsewhere.*name"):
        WAYS[way](f"{cloud.scheme}://elsewhere/a.zarr", cloud.options)
    login = "bearer_token" if cloud.scheme == "gs" else "account_name"
    with pytest.raises(StorageError, match=rf"{cloud.scheme}://acts/a.*not allowed.*403.*storage_options") as refused:
        WAYS[way](cloud.address("a.zarr"), {**cloud.options, login: "secret"})
    assert "secret" not in str(refused.value)


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with proxied(s3.options["endpoint"]) as proxy:
        yield proxy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((403, "AccessDenied"), r"not allowed.*AccessDenied.*storage_options"),
        ((400, "ExpiredToken"), r"not allowed.*ExpiredToken.*credentials"),
        ((403, "InvalidAccessKeyId"), r"not allowed.*InvalidAccessKeyId.*credentials"),
        ((403, "RequestTimeTooSkewed"), r"not allowed.*RequestTimeTooSkewed"),
        ((404, "NoSuchBucket"), r"no bucket acts.*name"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_s3_refuses_says_why_and_what_to_do(
    proxy: Proxy, s3: S3Server, way: str, fault: tuple[int, str], says: str
) -> None:
    proxy.fault = lambda _method, _path: fault
    options = {**s3.options, "endpoint": proxy.url, "access_key_id": "AKID", "secret_access_key": "hush"}
    proxy.requests.clear()
    with pytest.raises(StorageError, match=rf"s3://acts/refused.*{says}") as refused:
        WAYS[way](s3.address("refused"), {**options, "skip_signature": False})
    assert "hush" not in str(refused.value)
    assert "AKID" not in str(refused.value)
    assert proxy.requests.total() == (2 if way == "open" else 1)  # at once, and no time is lost with more of them


def test_where_there_are_no_credentials_it_says_so() -> None:
    options = {"metadata_endpoint": "http://127.0.0.1:9", "retry_config": {"max_retries": 0}, "region": "us-east-1"}
    with pytest.raises(StorageError, match=r"s3://acts/a.*no credentials.*skip_signature"):
        residua.open("s3://acts/a", storage_options=options)
    with pytest.raises(StorageError, match=r"az://acts/a.*account_name"):
        residua.open("az://acts/a")
