"""Work queues: every run is claimed once, and the runs of a lost worker are claimed again."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from residua.capture.runtime.compat import TCPStore
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.work_queue import WorkQueue, shared_queue, unit_runs, units_left
from residua.store.base.errors import CaptureError
from residua.store.format.commits import committed_shards

RUNS = [range(3), range(3, 5), range(5, 6)]


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "commits").mkdir()
    return tmp_path


def commit(archive: Path, *shards: int) -> None:
    for shard in shards:
        (archive / "commits" / f"{shard:08d}-0000.json").touch()


def queue_of(membership: Membership, archive: Path) -> WorkQueue:
    return shared_queue(membership, RUNS, partial(committed_shards, archive), max_wait_seconds=0)


def test_every_run_is_given_once_and_it_is_over_when_all_is_committed(store: TCPStore, archive: Path) -> None:
    with Membership(store, 0, 2) as one, Membership(store, 1, 2) as two:
        first, second = queue_of(one, archive), queue_of(two, archive)
        assert [next(first), next(second), next(first)] == RUNS
        assert next(first) is None
        assert next(second) is None
        commit(archive, *range(5))
        assert next(second) is None
        commit(archive, 5)
        assert next(second, "over") == "over"


def test_runs_that_come_later_are_numbered_alike_by_all(store: TCPStore, archive: Path) -> None:
    """The second worker learns of both runs at once; the first waits for them one by one."""
    slow, fast = iter([None, [RUNS[0]], None, RUNS[1:]]), iter([[RUNS[0]], RUNS[1:]])
    done = partial(committed_shards, archive)
    with Membership(store, 0, 2) as one, Membership(store, 1, 2) as two:
        first = shared_queue(one, (), done, more=slow, max_wait_seconds=0)
        second = shared_queue(two, (), done, more=fast, max_wait_seconds=0)
        assert next(first) is None
        assert next(second) is None
        assert next(second) == RUNS[1]
        assert [next(first), next(first), next(first)] == [RUNS[0], None, RUNS[2]]
        assert next(second) is None
        commit(archive, *range(6))
        assert next(first, "over") == next(second, "over") == "over"


def test_a_worker_that_comes_late_numbers_the_units_as_the_others_do(store: TCPStore) -> None:
    done: set[int] = set()
    with Membership(store, 0, 2) as one, Membership(store, 1, 2) as two:
        early = units_left(unit_runs(one, 5, lambda: done, name="generate"))
        done.update(unit for unit in (next(early), next(early)) if unit is not None)
        late = units_left(unit_runs(two, 5, lambda: done, name="generate"))
        given = [next(late), next(early), next(late)]
        assert sorted([*done, *(unit for unit in given if unit is not None)]) == list(range(5))
        done.update(range(5))
        assert next(early, "over") == next(late, "over") == "over"
    assert list(units_left(unit_runs(None, 5, lambda: {1, 3}))) == [0, 2, 4]


def test_what_is_not_committed_of_a_worker_that_left_is_taken_over_once(store: TCPStore, archive: Path) -> None:
    with Membership(store, 0, 3) as one, Membership(store, 1, 3) as two:
        three = Membership(store, 2, 3)
        with three:
            leaving = queue_of(three, archive)
            assert [next(leaving), next(leaving), next(leaving)] == RUNS
            first = queue_of(one, archive)
            assert next(first) is None, "its owner lives"
            three.report_now(state="left")
        commit(archive, 0, 1, 2, 3)
        second = queue_of(two, archive)
        assert next(first) == RUNS[1], "half of it is missing"
        assert next(second) == RUNS[2]
        assert next(first) is None
        assert next(second) is None


def test_a_worker_without_heartbeats_is_lost(store: TCPStore, archive: Path) -> None:
    silent = Membership(store, 1, 2, lost_seconds=0.0)
    silent._heartbeat()
    with Membership(store, 0, 2, lost_seconds=0.0) as membership:
        assert [next(queue_of(silent, archive)) for _ in range(3)] == RUNS
        queue = queue_of(membership, archive)
        taken = [next(queue) for _ in range(6)]
        assert [run for run in taken if run is not None] == RUNS


def test_runs_of_an_earlier_attempt_belong_to_nobody(store: TCPStore, archive: Path) -> None:
    """A launcher may keep its store when it starts the workers again under the same numbers."""
    with Membership(store, 0, 1) as before:
        assert next(queue_of(before, archive)) == RUNS[0]
        store.add("runs", 5)
    with Membership(store, 0, 1) as after:
        queue = queue_of(after, archive)
        assert [next(queue), next(queue), next(queue)] == RUNS
        assert next(queue) is None


def test_a_worker_that_died_between_counting_a_run_and_claiming_it_loses_it(store: TCPStore, archive: Path) -> None:
    with Membership(store, 0, 2) as membership:
        membership.count("runs")
        queue = queue_of(membership, archive)
        assert [next(queue) for _ in range(3)] == [RUNS[1], RUNS[2], RUNS[0]]


def test_without_the_store_the_queue_says_so(archive: Path) -> None:
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    client = TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=60))
    with Membership(client, 0, 1) as membership:
        del server
        with pytest.raises(CaptureError, match=r"store .* does not answer.*finished before is safe"):
            next(queue_of(membership, archive))


def test_waiting_for_worker_0_reports_why_it_left_or_that_it_never_came(store: TCPStore) -> None:
    with Membership(store, 1, 2) as membership:
        with pytest.raises(CaptureError, match="did not appear within 0 s"):
            membership.await_message("plan", patience=0)
        with pytest.raises(OSError, match="full"), Membership(store, 0, 2, lost_seconds=0.0):
            raise OSError("the disk is full")
        with pytest.raises(CaptureError, match=r"worker 0 .* is gone: the disk is full"):
            membership.await_message("plan", patience=0)
