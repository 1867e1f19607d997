"""Replicas of two ranks each, from the command line: killed, stopped, resumed; the archive is the same bit for bit."""

import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.distributed.workers.test_replicas import summary
from tests.forking import SOON, ForkedWorkers, Start, launched
from tests.ragged import capture_words, write_dataset
from tests.stopped import await_commits, check_end, check_stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SITES = ("--sites", "resid_post.3,q.2,mlp_act.1,pattern.0", "--dtype", "bfloat16", "--tp", "2")
BOUND = 1e-5
STAGES = ("--sites", "embed,resid_post.*,q.2,mlp_act.1,z.4,pattern.3,logits_top3", "--tp", "2", "--pp", "2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 24, seed=3)


@pytest.fixture(scope="module")
def reference(forked_workers: ForkedWorkers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that one replica of two ranks wrote."""
    out = tmp_path_factory.mktemp("one replica") / "a.zarr"
    ended = forked_workers.run(launched(capture_words(dataset, out, *SITES), 2))
    assert [end.code for end in ended] == [0, 0], ended
    report = verify(out)
    assert (report.problems, report.notes) == ([], [])
    return out


def start_slowly(forked_workers: ForkedWorkers, dataset: Path, out: Path, n: int, sites: Sequence[str] = SITES) -> None:
    """Begin `n` ranks, and return once some shards are committed."""
    forked_workers.start(launched(capture_words(dataset, out, *sites), n, slow=0.2))
    await_commits(out, 3)


def resume(
    forked_workers: ForkedWorkers, dataset: Path, out: Path, reference: Path, n: int, sites: Sequence[str] = SITES
) -> None:
    assert not Archive(out).is_sealed
    check_stop(out, {})
    ended = forked_workers.run(launched(capture_words(dataset, out, *sites), n))
    assert [end.code for end in ended] == [0] * n, ended
    check_end(out, reference)


def test_two_replicas_of_two_write_the_same_bytes_as_one(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    ended = forked_workers.run(launched(capture_words(dataset, out, *SITES, "--json"), 4, slow=0.02))
    assert [end.code for end in ended] == [0] * 4, ended
    check_end(out, reference)
    stats = [worker["stats"] for worker in summary(ended[0])["workers"]]
    assert [s["committed_rows"] > 0 for s in stats] == [True, False, True, False], "leaders commit"
    assert all(s["stored_bytes"] and s["offloaded_bytes"] and s["sent_bytes"] for s in stats), "all write"


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_a_replica_is_killed_the_other_ends_and_the_run_can_go_on(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "a.zarr"
    start_slowly(forked_workers, dataset, out, 2)
    forked_workers.kill(victim)
    ended = forked_workers.wait(SOON)
    assert ended[victim].code == -signal.SIGKILL
    assert ended[1 - victim].code == 1, ended
    assert "run the same command again to go on" in ended[1 - victim].output.replace("\n", " ")
    resume(forked_workers, dataset, out, reference, (2, 4)[victim])


def test_another_replica_finishes_what_one_with_a_dead_rank_left(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    start_slowly(forked_workers, dataset, out, 4)
    forked_workers.kill(3)
    codes = [end.code for end in forked_workers.wait(SOON)]
    assert codes == [0, 0, 1, -signal.SIGKILL]
    check_end(out, reference)


def test_stages_in_parallel_write_what_one_process_does_and_go_on_after_a_kill(
    forked_workers: ForkedWorkers, dataset: Path, tmp_path: Path
) -> None:
    whole, one, out = (tmp_path / name / "a.zarr" for name in ("whole", "one", "killed"))
    for path in (whole, one, out):
        path.parent.mkdir()
    for words, n in ((capture_words(dataset, whole, *STAGES), 4), (capture_words(dataset, one, *STAGES[:2]), 1)):
        ended = forked_workers.run(launched(words, n))
        assert [end.code for end in ended] == [0] * n, ended
    found, wanted = Archive(whole), Archive(one)
    assert found.provenance["model"]["layout"] == "pipeline 2 x tensor parallel 2"  # type: ignore[index]
    assert found.plan == wanted.plan
    for site in wanted.sites:
        ours, theirs = (np.asarray(archive[site].numpy(), np.float64) for archive in (found, wanted))
        assert np.abs(ours - theirs).max() <= BOUND * np.abs(theirs).max(), site
    start_slowly(forked_workers, dataset, out, 4, STAGES)
    forked_workers.kill(3)
    ended = forked_workers.wait(SOON)
    assert [end.code for end in ended] == [1, 1, 1, -signal.SIGKILL], ended
    resume(forked_workers, dataset, out, whole, 4, STAGES)


def test_all_stop_in_time_when_they_are_told_to(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    start_slowly(forked_workers, dataset, out, 2)
    for worker in range(2):
        forked_workers.kill(worker, signal.SIGTERM)
    ended = forked_workers.wait(SOON)
    assert 130 in [end.code for end in ended], ended
    assert {end.code for end in ended} <= {130, 1}, "who waits for a stopped one in a collective sees it go"
    resume(forked_workers, dataset, out, reference, 2)


def test_a_launch_joins_a_launch_and_each_keeps_its_own_replicas(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--json", "--join")
    late = [Start(words=words, env=start.env, slow=0.05, after=str(out / "zarr.json")) for start in launched(words, 2)]
    ended = forked_workers.run([*launched(words, 2, slow=0.1), *late])
    assert [end.code for end in ended] == [0] * 4, ended
    check_end(out, reference)
    assert sum(worker["stats"]["committed_rows"] > 0 for worker in summary(ended[0])["workers"]) == 2


def test_ranks_that_do_not_make_whole_replicas_are_refused(
    forked_workers: ForkedWorkers, dataset: Path, tmp_path: Path
) -> None:
    words = capture_words(dataset, tmp_path / "a.zarr", *SITES)
    [alone] = forked_workers.run([Start(words=words, env={})])
    assert alone.code == 2
    assert "--tp 2 splits a model over 2 processes, and this process is alone" in alone.output
    ended = forked_workers.run(launched(words, 3))
    assert ended[0].code == 2
    assert "3 were launched together" in ended[0].output
    assert {end.code for end in ended} <= {1, 2}, "or the store is gone before a late one has read why"
