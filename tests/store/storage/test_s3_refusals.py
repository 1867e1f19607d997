"""What S3 refuses, by a server that knows users: wrong keys, missing rights, objects that are there."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import residua
from residua.store.base.errors import StorageError
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.servers.moto import serving_moto
from tests.servers.s3 import S3Server
from tests.store.storage.asking import WAYS

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def users() -> Iterator[Mapping[str, S3Server]]:
    with serving_moto() as found:
        yield found


@pytest.mark.parametrize("way", WAYS)
def test_a_login_that_is_wrong_is_named_and_holds_no_secret(users: Mapping[str, S3Server], way: str) -> None:
    writer = users["writer"]
    for change, code in (
        ({"access_key_id": "AKIAIOSFODNN7EXAMPLE"}, "InvalidAccessKeyId"),
        ({"secret_access_key": "hush"}, "SignatureDoesNotMatch"),
    ):
        options = {**writer.options, **change}
        with pytest.raises(StorageError, match=rf"s3://acts/a.*not allowed.*{code}.*credentials") as refused:
            WAYS[way](writer.address("a.zarr"), options)
        assert not [key for key in ("access_key_id", "secret_access_key") if options[key] in str(refused.value)]


@pytest.mark.parametrize("way", WAYS)
def test_a_user_without_the_right_is_told_so(users: Mapping[str, S3Server], way: str) -> None:
    nobody = users["nobody"]
    with pytest.raises(StorageError, match=r"s3://acts/a.*not allowed.*AccessDenied.*storage_options"):
        WAYS[way](nobody.address("a.zarr"), nobody.options)


def test_who_may_only_read_opens_an_archive_and_pushes_none(
    users: Mapping[str, S3Server], untouched: Path, tmp_path: Path
) -> None:
    writer, reader = users["writer"], users["reader"]
    residua.push(untouched, writer.address("a.zarr"), storage_options=writer.options)
    residua.pull(writer.address("a.zarr"), tmp_path / "a.zarr", storage_options=reader.options)
    assert verify(tmp_path / "a.zarr").problems == []
    with pytest.raises(StorageError, match=r"s3://acts/b.*not allowed.*AccessDenied"):
        residua.push(untouched, reader.address("b.zarr"), storage_options=reader.options)
    assert list(ObjectFolder(reader.address("b.zarr"), reader.options).list()) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_bucket_that_is_not_there_is_named(users: Mapping[str, S3Server], way: str) -> None:
    writer = users["writer"]
    with pytest.raises(StorageError, match=r"no bucket elsewhere.*name"):
        WAYS[way]("s3://elsewhere/a.zarr", writer.options)


def test_an_object_is_created_once(users: Mapping[str, S3Server]) -> None:
    writer = users["writer"]
    folder = ObjectFolder(writer.address("once"), writer.options)
    assert folder.create("x", b"mine")
    assert not folder.create("x", b"mine"), "these bytes are there"
    with pytest.raises(FileExistsError, match="once/x"):
        folder.create("x", b"other")
    with pytest.raises(FileNotFoundError, match="once/gone"):
        folder.read("gone", 1)
    assert folder.read("x", 4) == b"mine"
