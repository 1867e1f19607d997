"""Where an archive is written: what a disk and a bucket have in common, and what a bucket survives."""

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from residua.store.base.errors import PlanError, StorageError
from residua.store.storage.destination import (
    MEMORY_BYTES,
    PART_BYTES,
    THREAD_BYTES,
    BucketFolder,
    Destination,
    DiskFolder,
)
from residua.store.storage.place import try_archive_place
from tests.servers.proxy import Fault, Proxy, proxied
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(120)
QUICK = {"max_retries": 3, "backoff": {"init_backoff": timedelta(milliseconds=1)}}


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with proxied(s3.options["endpoint"]) as found:
        yield found


def bucket(server: S3Server, name: str, proxy: Proxy | None = None) -> BucketFolder:
    options: dict[str, Any] = dict(server.options)
    if proxy is not None:
        options |= {"endpoint": proxy.url, "retry_config": QUICK}
    return BucketFolder(server.address(name), options)


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_both_do_the_same(s3: S3Server, tmp_path: Path, kind: str) -> None:
    out: Destination = DiskFolder(tmp_path / "a") if kind == "disk" else bucket(s3, "same")
    assert out.write("sites/q/c/0", [b"abc", np.arange(3, dtype="<u2")]) == 9
    assert out.write("sites/q/c/0", [b"again"]) == 5
    assert out.create("commits/1.json", b"{}")
    assert not out.create("commits/1.json", b"{}")
    with pytest.raises(FileExistsError, match=r"commits/1\.json"):
        out.create("commits/1.json", b"other")
    assert (out.n_bytes("sites/q/c/0"), out.n_bytes("sites/q/c/1")) == (5, None)
    assert (out.sizes()("sites/q/c/0"), out.sizes()("nothing")) == (5, None)
    assert (out.names("commits"), out.names("sites"), out.names("nothing")) == (["1.json"], [], [])
    assert (out.path / "commits/1.json").read_bytes() == b"{}"
    out.remove(["commits/1.json"])
    assert out.names("commits") == []
    out.remove_all()
    assert out.n_bytes("sites/q/c/0") is None


def test_a_file_goes_up_in_parts_while_it_is_made(s3: S3Server, proxy: Proxy) -> None:
    out, memory = bucket(s3, "parts", proxy), np.empty(3 * 2**20, np.uint8)

    def pieces() -> Iterator[npt.NDArray[np.uint8]]:
        for number in range(9):
            memory[:] = number
            yield memory  # one memory for all: what was taken is copied

    assert out.write("long", pieces()) == 27 * 2**20 > 3 * PART_BYTES
    data = np.frombuffer(out.objects.read("long", 2**30), np.uint8)
    assert np.array_equal(data, np.repeat(np.arange(9, dtype=np.uint8), 3 * 2**20))
    assert proxy.requests["PUT"] == 4, "parts of 8 MiB"


def test_memory_is_shared_among_threads(s3: S3Server) -> None:
    out = bucket(s3, "memory")
    assert out.writer_threads(1) == 4
    out.use_memory(40 * 2**20, 2**40)
    assert out.writer_threads(8) == 2
    out.use_memory(1000, 1000)
    assert out.writer_threads(1) == 1
    out.use_memory(2**40, 2**40)
    assert out.memory_bytes == MEMORY_BYTES
    with pytest.raises(PlanError, match="16,777,000"):
        out.use_memory(216, 2**40)


def test_an_upload_holds_no_more_than_its_memory(s3: S3Server) -> None:
    out = bucket(s3, "held")
    out.memory_bytes = THREAD_BYTES
    assert out.writer_threads(1) == 1
    tracemalloc.start()
    try:
        out.write("long", (np.zeros(2**18, np.uint8) for _ in range(6 * PART_BYTES // 2**18)))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1.5 * PART_BYTES < most < THREAD_BYTES + 2**20, "a part is let go when it is sent"


def of(method: str, *faults: Fault | None) -> Callable[[str, str], Fault | None]:
    """Return what makes the first requests of a method fail, one after the other."""
    left = list(faults)
    return lambda asked, _path: left.pop(0) if asked == method and left else None


@pytest.mark.parametrize(
    ("size", "faults"),
    [
        (1000, (500, 503, 503)),
        (1000, ("drop",)),
        (1000, ("lost", "drop")),
        (9 * 2**20, (None, "lost", 500)),
        (9 * 2**20, ("slow", "drop")),
    ],
)
def test_a_write_survives(s3: S3Server, proxy: Proxy, size: int, faults: tuple[Fault | None, ...]) -> None:
    out = bucket(s3, f"survives-{size}-{'-'.join(map(str, faults))}", proxy)
    proxy.fault = of("PUT", *faults)
    data = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    assert out.write("x", [data[: size // 3], data[size // 3 :]]) == size
    assert out.objects.read("x", size) == data.tobytes()


@pytest.mark.parametrize(
    "faults", [(500, 503), ("drop",), ("lost",), ("lost", 503, "drop"), (409,), (409, 409, "lost")]
)
def test_a_record_is_created_once_whatever_goes_wrong(s3: S3Server, proxy: Proxy, faults: tuple[Fault, ...]) -> None:
    """412 after one's own write, a conflict with nothing there, answers that never came."""
    out = bucket(s3, f"record-{'-'.join(map(str, faults))}", proxy)
    proxy.fault = of("PUT", *faults)
    out.create("commits/0.json", b"mine")
    proxy.fault = of("PUT", *faults)
    with pytest.raises(FileExistsError, match=r"commits/0\.json"):
        out.create("commits/0.json", b"other")
    assert out.objects.read("commits/0.json", 4) == b"mine"


def test_what_never_ends_is_an_error_with_its_cause(s3: S3Server, proxy: Proxy) -> None:
    out = bucket(s3, "never", proxy)
    proxy.fault = lambda method, _path: 503 if method == "PUT" else None
    with pytest.raises(StorageError, match=r"never/x.*503"):
        out.write("x", [b"1"])
    proxy.fault = lambda method, _path: "drop" if method == "PUT" else None
    with pytest.raises(StorageError, match="never/y"):
        out.create("y", b"1")
    assert proxy.requests["PUT"] < 60


def test_temporary_folders_of_killed_processes_go(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = bucket(s3, "temporary")
    (tmp_path / "residua-writing-killed" / "files").mkdir(parents=True)
    second = bucket(s3, "temporary")
    assert {folder.path.parent for folder in (first, second)} == set(tmp_path.iterdir())
    with ThreadPoolExecutor(8) as pool:  # several that begin at once leave each other's alone
        many = list(pool.map(lambda _: bucket(s3, "temporary"), range(40)))
    assert all(each.path.is_dir() for each in many)
    del first, second, many
    assert list(tmp_path.iterdir()) == []


def test_a_place_in_a_bucket_is_tried(s3: S3Server, proxy: Proxy) -> None:
    place = try_archive_place(s3.address("tried"), s3.options)
    assert isinstance(place.out, BucketFolder)
    assert (place.notes, list(place.out.objects.list())) == ((), [])
    place.out.write("notes.txt", [b"mine"])
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        try_archive_place(s3.address("tried"), s3.options)
    proxy.fault = lambda method, _path: 403 if method == "PUT" else None
    with pytest.raises(StorageError, match=r"denied.*not allowed"):
        try_archive_place(s3.address("denied"), {**s3.options, "endpoint": proxy.url})
    for address, found in (
        ("s3://no-such-bucket/a.zarr", (StorageError, "no-such-bucket")),
        ("hf://datasets/org/acts", (PlanError, "hf")),
        ("https://example.org/acts.zarr", (PlanError, "https")),
    ):
        with pytest.raises(found[0], match=found[1]):
            try_archive_place(address, s3.options)


def test_a_service_that_does_not_keep_runs_apart_is_noted(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "residua.store.storage.objects.ObjectFolder.create", lambda self, name, data: self.write(name, [data])
    )
    [note] = try_archive_place(s3.address("careless"), s3.options).notes
    assert "another run" in note
