"""A worker_group: all run what the leader takes, and a shard is committed once every part of it is on the disk."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from residua.capture.runtime.compat import TCPStore
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.work_queue import Run
from residua.capture.scheduling.worker_group import GroupCommits, WorkerGroup
from residua.store.base.errors import CaptureError
from residua.store.format.commits import Commit, ShardFile, committed_shards, read_commits
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import ShardWriter

PLAN = Plan(
    model={},
    dataset={},
    rules={},
    sites=tuple(SitePlan(name=f"resid_post.{i}", row_shape=(4,), dtype="float32", codec="raw") for i in range(2)),
    rows_per_shard=8,
    n_rows=16,
)
RUNS = [Run(range(3), frozenset({1})), None, Run(range(3, 5), frozenset())]


@pytest.fixture
def members() -> Iterator[list[Membership]]:
    """Three workers, of which the second leads the third."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    with ExitStack() as stack:
        yield [stack.enter_context(Membership(store, number, 3)) for number in range(3)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "commits").mkdir()
    return tmp_path


def files_of(shard: int, *paths: str) -> Commit:
    files = {path: ShardFile(n_bytes=len(path), digest="ab" * 32) for path in paths}
    return Commit(plan=PLAN.digest, shard=shard, rows=(8 * shard, 8 * shard + 8), arrays=files)


MINE = ("sites/resid_post/0", "rows/token", "rows/position", "rows/example")
THEIRS = ("sites/resid_post/1",)


def test_all_do_the_leaders_runs_and_end_with_it(members: list[Membership]) -> None:
    leader, follower = WorkerGroup(members[1], [1, 2]), WorkerGroup(members[2], [1, 2])
    assert (leader.is_leader, follower.is_leader) == (True, False)
    followed = follower.in_lockstep(iter([]), waits=True)
    assert next(followed) is None, "there may be work later"
    assert list(leader.in_lockstep(iter(RUNS), waits=True)) == RUNS
    assert list(followed) == [RUNS[0], RUNS[2]]


def test_where_nobody_waits_nothing_to_take_is_the_end(members: list[Membership]) -> None:
    leader, follower = WorkerGroup(members[1], [1, 2]), WorkerGroup(members[2], [1, 2])
    assert list(leader.in_lockstep(iter(RUNS), waits=False)) == RUNS[:1]
    assert list(follower.in_lockstep(iter([]), waits=False)) == RUNS[:1]


def test_without_the_leader_nobody_goes_on(members: list[Membership]) -> None:
    followed = WorkerGroup(members[2], [1, 2]).in_lockstep(iter([]), waits=True)
    members[1].report_now(state="left", why="its disk is full")
    with pytest.raises(CaptureError, match=r"worker 1 .* is gone: its disk is full"):
        next(followed)


def test_a_shard_is_committed_when_all_its_parts_are_reported(members: list[Membership], archive: Path) -> None:
    ours, theirs = (GroupCommits(WorkerGroup(members[number], [1, 2]), PLAN) for number in (1, 2))
    writer = ShardWriter(archive, PLAN, report=ours.report)
    theirs.report(files_of(1, *THEIRS))
    assert not ours.publish(writer), "the leader has not begun it"
    ours.report(files_of(0, *MINE))
    ours.report(files_of(1, *MINE))
    assert ours.publish(writer)
    assert committed_shards(archive) == {1}
    theirs.report(files_of(0, *THEIRS))
    ours.finish(writer, after_error=False)
    commits = read_commits(archive, PLAN.digest)
    assert sorted(commits) == [0, 1]
    assert all(commit.arrays.keys() == {*MINE, *THEIRS} for commit in commits.values())
    assert writer.n_rows == 16
    alone = replace(files_of(0, *sorted([*MINE, *THEIRS])), writer=0)
    assert commits[0] == alone, "the record does not show how many workers wrote the shard"


def test_a_shard_whose_other_writer_is_gone_is_not_committed(members: list[Membership], archive: Path) -> None:
    ours = GroupCommits(WorkerGroup(members[1], [1, 2]), PLAN)
    writer = ShardWriter(archive, PLAN, report=ours.report)
    ours.report(files_of(0, *MINE))
    members[2].report_now(state="left", why="it was killed")
    with pytest.raises(CaptureError, match=r"worker 2 .* is gone: it was killed"):
        ours.finish(writer, after_error=False)
    assert committed_shards(archive) == set()
