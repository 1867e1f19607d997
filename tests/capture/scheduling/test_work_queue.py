"""Handing out runs: each once, those of the living are theirs, those of the gone are taken over."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from residua.capture.scheduling.membership import Crew
from residua.capture.scheduling.work_queue import HandOut
from residua.store.base.errors import CaptureError
from residua.store.format.commits import committed_shards

RUNS = [range(3), range(3, 5), range(5, 6)]


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "commits").mkdir()
    return tmp_path


def commit(archive: Path, *shards: int) -> None:
    for shard in shards:
        (archive / "commits" / f"{shard:08d}-0000.json").touch()


def handed_out(crew: Crew, archive: Path) -> HandOut:
    return HandOut(crew, RUNS, partial(committed_shards, archive))


def look_again(hand_out: HandOut) -> range | None:
    hand_out._next_look = 0.0
    return hand_out.take()


def test_every_run_is_given_once_and_it_is_over_when_all_is_committed(store: TCPStore, archive: Path) -> None:
    with Crew(store, 0, 2) as one, Crew(store, 1, 2) as two:
        first, second = handed_out(one, archive), handed_out(two, archive)
        assert [first.take(), second.take(), first.take()] == RUNS
        assert first.take() is None
        assert second.take() is None
        assert not first.is_over()
        commit(archive, *range(5))
        assert look_again(second) is None
        assert not second.is_over()
        commit(archive, 5)
        assert look_again(second) is None
        assert second.is_over()


def test_what_is_not_committed_of_a_worker_that_left_is_taken_over_once(store: TCPStore, archive: Path) -> None:
    with Crew(store, 0, 3) as one, Crew(store, 1, 3) as two:
        three = Crew(store, 2, 3)
        with three:
            leaving = handed_out(three, archive)
            assert [leaving.take(), leaving.take(), leaving.take()] == RUNS
            first = handed_out(one, archive)
            assert first.take() is None, "its owner lives"
            three.tell_now(state="left")
        commit(archive, 0, 1, 2, 3)
        second = handed_out(two, archive)
        assert look_again(first) == RUNS[1], "half of it is missing"
        assert second.take() == RUNS[2]
        assert look_again(first) is None
        assert look_again(second) is None


def test_a_worker_that_gives_no_sign_is_lost(store: TCPStore, archive: Path) -> None:
    silent = Crew(store, 1, 2, lost_seconds=0.0)
    silent._beat()
    with Crew(store, 0, 2, lost_seconds=0.0) as crew:
        assert [handed_out(silent, archive).take() for _ in range(3)] == RUNS
        hand_out = handed_out(crew, archive)
        taken = [hand_out.take()] + [look_again(hand_out) for _ in range(5)]
        assert [run for run in taken if run is not None] == RUNS


def test_runs_of_an_earlier_attempt_belong_to_nobody(store: TCPStore, archive: Path) -> None:
    """A launcher may keep its store when it starts the workers again under the same numbers."""
    with Crew(store, 0, 1) as before:
        assert handed_out(before, archive).take() == RUNS[0]
        store.add("runs", 5)
    with Crew(store, 0, 1) as after:
        hand_out = handed_out(after, archive)
        assert [hand_out.take(), look_again(hand_out), look_again(hand_out)] == RUNS
        assert look_again(hand_out) is None


def test_a_worker_that_died_between_taking_a_run_and_writing_its_name_loses_it(store: TCPStore, archive: Path) -> None:
    with Crew(store, 0, 2) as crew:
        crew.count("runs")
        hand_out = handed_out(crew, archive)
        assert [hand_out.take() for _ in range(3)] == [RUNS[1], RUNS[2], RUNS[0]]


def test_without_the_store_every_call_says_so(archive: Path) -> None:
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    client = TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=10))
    with Crew(client, 0, 1) as crew:
        del server
        with pytest.raises(CaptureError, match=r"store does not answer.*finished before is safe"):
            handed_out(crew, archive).take()


def test_who_waits_for_worker_0_is_told_why_it_left_or_that_it_never_came(store: TCPStore) -> None:
    with Crew(store, 1, 2) as crew:
        with pytest.raises(CaptureError, match="did not appear within 0 s"):
            crew.await_message("plan", patience=0)
        with pytest.raises(OSError, match="full"), Crew(store, 0, 2, lost_seconds=0.0):
            raise OSError("the disk is full")
        with pytest.raises(CaptureError, match=r"worker 0 .* is gone: the disk is full"):
            crew.await_message("plan", patience=0)
