"""Ranks of one launch meet for the jobs that all of them run, whatever some of them ran before."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from residua.capture.runtime.compat import TCPStore
from residua.capture.scheduling.membership import Launch
from residua.pipelines.jobs import rendezvous as module
from residua.store.base.errors import CaptureError

Job = tuple[str | None, str]


def prefixes(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return where a fresh process meets others for each of some jobs."""
    monkeypatch.setattr(module, "_jobs", Counter())
    used: list[str] = []

    def launched(job: str) -> tuple[Launch | None, None]:
        used.append(module._prefix(job))
        return None, None

    monkeypatch.setattr(module, "_launch", launched)
    for out, job in jobs:
        with module.rendezvous(None if out is None else Path(out), join=False, job=job):
            pass
    return used


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("a.zarr", ""), ("b.zarr", "")], [("b.zarr", "")]),
        ([(None, "fidelity a.zarr"), ("b.zarr", "replay")], [("b.zarr", "replay")]),
        ([(None, "fidelity a.zarr"), (None, "fidelity b.zarr")], [(None, "fidelity b.zarr")]),
        ([("b.zarr", ""), ("b.zarr", "replay")], [("b.zarr", "replay")]),
    ],
)
def test_a_job_of_one_rank_alone_does_not_mix_up_the_next(
    first: list[Job], second: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prefixes(first, monkeypatch)[-1] == prefixes(second, monkeypatch)[-1]
    assert len(set(prefixes([*first, *first], monkeypatch))) == 2 * len(first), "and each job has keys of its own"


Ranks = Callable[[Callable[[int], None]], list[BaseException | None]]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Run a function as both ranks of a launch, in two threads that share a store; return what each one raised."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    own = threading.local()
    own_counters = Counters(own)
    monkeypatch.setattr(module, "torch_rendezvous", lambda *_, **_options: iter([(store, own.rank, 2)]))
    monkeypatch.setattr(module, "_jobs", own_counters)
    monkeypatch.setattr(module, "_calls", own_counters)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def run(program: Callable[[int], None]) -> list[BaseException | None]:
        def start(rank: int) -> None:
            own.rank = rank
            program(rank)

        with ThreadPoolExecutor(2) as pool:
            return [future.exception() for future in [pool.submit(start, rank) for rank in range(2)]]

    return run


class Counters:
    """A counter in each thread, as each process has one."""

    def __init__(self, own: threading.local) -> None:
        self._own = own

    def __getitem__(self, key: str) -> int:
        return int(vars(self._own).get(key, 0))

    def __setitem__(self, key: str, value: int) -> None:
        vars(self._own)[key] = value


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_name_other_folders_in_one_call_fail_at_once(ranks: Ranks, tmp_path: Path, first: int) -> None:
    begun, over = threading.Event(), threading.Event()

    def program(rank: int) -> None:
        if rank == first:
            threading.Timer(0.2, begun.set).start()
        else:
            assert begun.wait(60)
        try:
            with module.rendezvous(tmp_path / f"of {rank}", join=False):
                assert over.wait(60), "rank 1 waits for ever"
        finally:
            if rank:
                over.set()

    found = ranks(program)
    assert isinstance(found[1], CaptureError), found
    assert all(str(tmp_path / name) in str(found[1]) for name in ("of 0", "of 1"))
    assert found[0] is None or isinstance(found[0], CaptureError)


def test_a_job_of_rank_0_alone_is_another_call_than_the_next(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1 is at the second call before rank 0 has begun the first; in a loop, one is a step ahead of the other."""
    waits = threading.Event()

    def program(rank: int) -> None:
        if rank == 0:
            assert waits.wait(60)
            with module.rendezvous(tmp_path / "alone", join=False):
                pass
        else:
            threading.Timer(0.2, waits.set).start()
        for step in range(3):
            with module.rendezvous(tmp_path / f"{step}", join=False) as membership:
                assert membership is not None
                assert membership.number == rank

    assert ranks(program) == [None, None]
