"""Objects behind real servers: S3 (SeaweedFS), and a web server with faults."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError

from residua.store.base.errors import StorageError
from residua.store.storage.objects import ObjectFolder
from tests.servers.files import FileServer, serving_files
from tests.servers.proxy import Fault, proxied
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "numbers").write_bytes(bytes(range(256)))
    with serving_files(tmp_path) as server:
        yield server


@pytest.mark.parametrize("name", ["round/trip", ".hidden/trip", "a space/a=b"])
def test_what_is_written_to_a_bucket_is_read_back(s3: S3Server, name: str) -> None:
    folder = ObjectFolder(s3.address(name), s3.options)
    ObjectFolder(s3.address(f"{name}ped"), s3.options).write("beside", [b"1"])
    folder.write("x/y", [b"abc", memoryview(b"defg")])
    folder.write("z", [b""])
    assert folder.read("x/y", 7) == b"abcdefg"
    assert folder.read_range("x/y", 4, 6).tobytes() == b"ef"
    assert [(entry.name, entry.n_bytes) for entry in folder.list()] == [("x/y", 7), ("z", 0)]
    assert (folder.size("x/y"), folder.size("nothing")) == (7, None)
    folder.delete(["x/y", "nothing"])
    assert [entry.name for entry in folder.list()] == ["z"]
    folder.copy("z", "copies/z")
    above, _, last = name.partition("/")
    there = {entry.name for entry in ObjectFolder(s3.address(above), s3.options).list()}
    assert there >= {f"{last}/z", f"{last}/copies/z", f"{last}ped/beside"}
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301
    assert again.read("copies/z", 0) == b""


def test_an_object_is_created_once(s3: S3Server) -> None:
    folder = ObjectFolder(s3.address("once"), s3.options)
    folder.create("record", b"mine")
    folder.create("record", b"mine")
    for other in (b"longer than mine", b"less", b""):
        with pytest.raises(FileExistsError, match="once/record"):
            folder.create("record", other)
    assert folder.read("record", 4) == b"mine"


def test_a_conflict_with_nothing_there_is_tried_again(s3: S3Server) -> None:
    """As some servers answer when two writers meet: 409, and neither object is there."""
    folder, put, conflicts = ObjectFolder(s3.address("conflict"), s3.options), obstore.put, [1, 2]

    def unlucky(*args: object, **options: object) -> object:
        if conflicts:
            conflicts.pop()
            raise AlreadyExistsError("409 Conflict")
        return put(*args, **options)  # type: ignore[arg-type]

    with mock.patch.object(obstore, "put", unlucky):
        folder.create("record", b"mine")
    assert folder.read("record", 4) == b"mine"


def test_an_answer_that_got_lost_is_found_to_be_done(s3: S3Server) -> None:
    folder, put = ObjectFolder(s3.address("lost answer"), s3.options), obstore.put

    def twice(*args: object, **options: object) -> object:
        put(*args, **options)  # type: ignore[arg-type]
        return put(*args, **options)  # type: ignore[arg-type]

    with mock.patch.object(obstore, "put", twice):
        folder.create("record", b"mine")


def test_errors_name_the_object_and_what_to_do(s3: S3Server) -> None:
    folder = ObjectFolder(s3.address("errors"), s3.options)
    folder.write("x", [b"12345"])
    with pytest.raises(FileNotFoundError, match="s3://acts/errors/gone"):
        folder.read("gone", 1)
    with pytest.raises(StorageError, match=r"errors/x has 5 bytes.* 4 "):
        folder.read("x", 4)
    with pytest.raises(StorageError, match=r"bytes 3 to 9"):
        folder.read_range("x", 3, 9)
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        ObjectFolder("s3://no-such-bucket/a", s3.options).read("x", 1)
    with pytest.raises(StorageError, match="nonsense"):
        ObjectFolder(s3.address("a"), {**s3.options, "nonsense": "1"})


def test_a_web_server_with_passing_faults(server: FileServer) -> None:
    server.faults = [503, "cut", 500]
    folder = ObjectFolder(server.url + "/a")
    assert folder.read("numbers", 256) == bytes(range(256))
    server.faults = [500, "cut"]
    assert folder.read_range("numbers", 200, 210).tobytes() == bytes(range(200, 210))


def test_a_listing_that_breaks_off_goes_on_where_it_was(s3: S3Server) -> None:
    names = [f"part/{number:04}" for number in range(1_002)]  # two pages
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: ObjectFolder(s3.address("many"), s3.options).write(name, [b"x"]), names))
    asked: list[str] = []

    def every_second(method: str, path: str) -> Fault | None:
        asked.append(path)
        return "cut" if len(asked) % 2 else None

    with proxied(s3.options["endpoint"]) as proxy:
        proxy.fault = every_second
        found = list(ObjectFolder(s3.address("many"), {**s3.options, "endpoint": proxy.url}).list())
    assert [(one.name, one.n_bytes) for one in found] == [(name, 1) for name in names]
    assert len(asked) == 4


def test_a_web_server_without_ranges_is_said_to_be_one(server: FileServer) -> None:
    server.ranges = False
    folder = ObjectFolder(server.url + "/a")
    with pytest.raises(StorageError, match="range"):
        folder.read_range("numbers", 10, 20)


def test_what_is_not_allowed_says_so_and_holds_no_secret(server: FileServer) -> None:
    server.token = "right"  # noqa: S105
    for options in ({}, {"client_options": {"default_headers": {"Authorization": "Bearer wrong secret"}}}):
        folder = ObjectFolder(server.url + "/a?signature=secret", options)
        with pytest.raises(StorageError, match=r"not allowed.*storage_options") as refused:
            folder.read("numbers", 256)
        assert "secret" not in str(refused.value)
