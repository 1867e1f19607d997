"""The lease on a folder in a bucket: one holder at a time, whatever becomes of it."""

import json
import threading
import time
from typing import Any

import pytest

from residua.store.base.errors import StorageError
from residua.store.storage.destination import BucketFolder
from residua.store.storage.lease import LEASE, LeaseTimes, leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(120)
QUICK = LeaseTimes(expire=1.0, renew=0.2, poll=0.05)


def written(folder: ObjectFolder, **changes: Any) -> dict[str, Any]:
    """Return the lease that is there; with changes, as if another process had written it."""
    values: dict[str, Any] = json.loads(folder.read(LEASE, 2**16))
    if changes:
        folder.write(LEASE, [json.dumps({**values, "token": "another", **changes}).encode()])
    return values


def test_a_second_run_is_told_who_holds_it_and_the_next_finds_nothing(s3: S3Server) -> None:
    folder = ObjectFolder(s3.address("lease-one"), s3.options)
    with leased(folder, join={"port": 7}):
        with pytest.raises(ArchiveInUseError, match="lease-one") as caught, leased(folder):
            pass
        assert caught.value.owner is not None
        assert caught.value.owner.join == {"port": 7}
    assert list(folder.list()) == []


@pytest.mark.parametrize(
    ("changes", "waits"),
    [({"pid": 2**22 + 1}, False), ({"started": "1"}, False), ({"machine": "another"}, True)],
    ids=["its process is gone", "its number is another process's", "another machine's"],
)
def test_a_lease_whose_holder_is_gone_is_taken_over(s3: S3Server, changes: dict[str, Any], waits: bool) -> None:
    folder = ObjectFolder(s3.address(f"lease-gone-{next(iter(changes))}"), s3.options)
    with leased(folder, times=QUICK):
        values = written(folder)
    folder.write(LEASE, [json.dumps({**values, **changes, "token": "old"}).encode()])
    began = time.monotonic()
    with leased(folder, times=QUICK):
        assert (time.monotonic() - began > QUICK.expire) is waits
        assert written(folder)["token"] not in ("old", values["token"])


def test_a_lease_that_is_renewed_elsewhere_is_not_taken(s3: S3Server) -> None:
    folder = ObjectFolder(s3.address("lease-elsewhere"), s3.options)
    with leased(folder, times=QUICK):
        values = written(folder)
    stop = threading.Event()

    def renew() -> None:
        n = 0
        while not stop.wait(0.2):
            n += 1
            folder.write(LEASE, [json.dumps({**values, "machine": "another", "host": "far", "renewed": n}).encode()])

    folder.write(LEASE, [json.dumps({**values, "machine": "another"}).encode()])
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ArchiveInUseError, match="far"), leased(folder, times=QUICK):
            pass
    finally:
        stop.set()
        thread.join()


def test_who_lost_the_lease_writes_no_more_and_leaves_it_alone(s3: S3Server) -> None:
    out = BucketFolder(s3.address("lease-lost"), s3.options, lease_times=QUICK)
    with out.locked():
        out.write("first", [b"1"])
        written(out.objects, host="the-other")
        time.sleep(3 * QUICK.renew)
        for refused in (
            lambda: out.write("second", [b"2"]),
            lambda: out.create("commits/1", b"2"),
            lambda: out.remove(["first"]),
        ):
            with pytest.raises(StorageError, match="the-other"):
                refused()
    assert written(out.objects)["host"] == "the-other"
    assert sorted(out.names("")) == []
    assert out.n_bytes("second") is None


def test_workers_of_a_run_that_lost_the_lease_write_no_more(s3: S3Server) -> None:
    out, worker = (BucketFolder(s3.address("lease-followed"), s3.options, lease_times=QUICK) for _ in range(2))
    with out.locked():
        with worker.following(out.lease):
            assert worker.write("first", [b"1"]) == 1
            time.sleep(2 * QUICK.renew)
            assert worker.create("commits/0", b"1")
            written(out.objects, host="the-other")
            time.sleep(2 * QUICK.renew)
            for refused in (
                lambda: worker.write("second", [b"2"]),
                lambda: worker.create("commits/1", b"2"),
                lambda: worker.upload([]),
            ):
                with pytest.raises(StorageError, match="the-other"):
                    refused()
        assert out.n_bytes("second") is None
        out.objects.delete([LEASE])
        with worker.following(out.lease), pytest.raises(StorageError, match="removed"):
            worker.write("third", [b"3"])
    assert worker.write("third", [b"3"]) == 1


def test_of_many_that_take_over_at_once_one_wins(s3: S3Server) -> None:
    folder = ObjectFolder(s3.address("lease-race"), s3.options)
    with leased(folder, times=QUICK):
        values = written(folder)
    folder.write(LEASE, [json.dumps({**values, "pid": 2**22 + 1, "token": "old"}).encode()])
    outcomes: list[str] = []
    done = threading.Event()

    def take() -> None:
        try:
            with leased(folder, times=QUICK):
                outcomes.append("held")
                done.wait(60)
        except ArchiveInUseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    while outcomes.count("refused") < 5 and len(outcomes) < 6:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 5
