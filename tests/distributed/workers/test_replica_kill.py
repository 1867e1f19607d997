"""kill -9 any of four workers at random moments: no committed shard is lost, nobody hangs, one archive."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from residua.store.format.archive_metadata import is_archive
from residua.store.read.archive import Archive
from residua.store.storage.lock import read_owner
from tests.forking import LOST_SECONDS, SOON, ForkedWorkers, Start, launched
from tests.ragged import capture_words, write_dataset
from tests.stopped import SECONDS, await_commits, check_end, check_stop, committed

N_KILLS = 10
N_WORKERS = 4
SITES = ("--sites", "resid_post.3,q.2,pattern.0", "--dtype", "bfloat16")
SLOW = 0.03


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 60, seed=1)


@pytest.fixture(scope="module")
def reference(forked_workers: ForkedWorkers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that one process wrote."""
    out = tmp_path_factory.mktemp("one") / "a.zarr"
    [ended] = forked_workers.run([Start(words=capture_words(dataset, out, *SITES), env={})])
    assert ended.code == 0, ended.output
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_one_of_four_killed_at_ten_random_moments(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    """Survivors finish what the dead one left, or, if it kept the store, end with an error; then the run goes on."""
    timed = tmp_path / "timed.zarr"
    forked_workers.start(launched(capture_words(dataset, timed, *SITES), N_WORKERS, slow=SLOW))
    await_rendezvous(forked_workers, timed)
    started = time.monotonic()
    assert [end.code for end in forked_workers.wait()] == [0] * N_WORKERS
    seconds = time.monotonic() - started
    moments = random.Random(7)
    n_kills = n_archives = 0
    outcomes = set()
    while n_kills < N_KILLS:
        n_archives += 1
        out = tmp_path / f"{n_archives}" / "a.zarr"
        out.parent.mkdir()
        files: dict[str, tuple[str, int]] = {}
        while n_kills < N_KILLS and not (is_archive(out) and Archive(out).was_finished):
            forked_workers.start(launched(capture_words(dataset, out, *SITES), N_WORKERS, slow=SLOW))
            await_rendezvous(forked_workers, out)
            time.sleep(moments.uniform(0, 0.9) * seconds)
            victim = moments.randrange(N_WORKERS)
            forked_workers.kill(victim)
            ended = forked_workers.wait(LOST_SECONDS + SOON)
            files = check_stop(out, files)
            n_kills += ended[victim].code == -signal.SIGKILL
            others = {end.code for worker, end in enumerate(ended) if worker != victim}
            assert others <= {0, 1}, ended
            outcomes |= others
        if is_archive(out) and Archive(out).was_finished:
            for left in out.parent.glob(".*"):
                assert left.name == ".a.zarr.lock", "worker 0 was killed at the very end"
                left.unlink()
            check_end(out, reference)
        else:
            resume_with_each_number(forked_workers, dataset, out, reference)
    assert 0 in outcomes, "some survivors finished the archive"


def await_rendezvous(forked_workers: ForkedWorkers, out: Path) -> None:
    """Return once the workers have found each other: then worker 0 takes the lock.

    Before that, a worker waits for a store host that was killed, since it could still be about to start.
    """
    deadline = time.monotonic() + SECONDS
    while (owner := read_owner(out)) is None or owner.pid != forked_workers.pids[0]:
        assert time.monotonic() < deadline, "the workers did not find each other"
        time.sleep(0.01)


def resume_with_each_number(forked_workers: ForkedWorkers, dataset: Path, half_done: Path, reference: Path) -> None:
    for n in (1, 2, 4):
        out = half_done.parent / f"resumed by {n}" / half_done.name
        out.parent.mkdir()
        if half_done.exists():
            shutil.copytree(half_done, out)
        before = committed(out) if is_archive(out) else {}
        ended = forked_workers.run(launched(capture_words(dataset, out, *SITES), n))
        assert [end.code for end in ended] == [0] * n, ended
        assert before.items() <= committed(out).items()
        check_end(out, reference)


@pytest.mark.timeout(900)
def test_all_four_killed_half_way_and_resumed_by_one_two_and_four(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    forked_workers.start(launched(capture_words(dataset, out, *SITES), N_WORKERS, slow=0.1))
    await_commits(out, 12)
    for worker in range(N_WORKERS):
        forked_workers.kill(worker)
    assert {end.code for end in forked_workers.wait()} == {-signal.SIGKILL}
    assert not Archive(out).is_sealed
    check_stop(out, {})
    resume_with_each_number(forked_workers, dataset, out, reference)


@pytest.mark.timeout(600)
def test_without_the_worker_that_keeps_the_store_the_others_end_within_seconds(
    forked_workers: ForkedWorkers, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    forked_workers.start(launched(capture_words(dataset, out, *SITES), 3, slow=0.2))
    await_commits(out)
    forked_workers.kill(0)
    ended = forked_workers.wait(SOON)
    assert [end.code for end in ended] == [-signal.SIGKILL, 1, 1], ended
    for end in ended[1:]:
        assert "run the same command again" in end.output
    check_stop(out, {})


@pytest.mark.timeout(600)
def test_a_stopped_worker_is_taken_for_dead_and_does_no_harm_when_it_wakes(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    """Its shards are done by others meanwhile; what it writes afterwards is the same."""
    out = tmp_path / "woken" / "a.zarr"
    out.parent.mkdir()
    forked_workers.start(launched(capture_words(dataset, out, *SITES), 3, slow=0.1))
    await_commits(out)
    deadline = time.monotonic() + SECONDS
    forked_workers.kill(1, signal.SIGSTOP)
    while not Archive(out).is_sealed:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    forked_workers.kill(1, signal.SIGCONT)
    codes = [end.code for end in forked_workers.wait(SOON)]
    assert codes[0] == codes[2] == 0
    assert codes[1] in (0, 1)
    check_end(out, reference)
