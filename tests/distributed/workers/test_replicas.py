"""Replicas that share a capture write the same archive as one process, byte for byte."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.forking import SOON, Ended, ForkedWorkers, Start, launched
from tests.ragged import capture_words, write_dataset
from tests.stopped import await_commits, check_end

pytestmark = pytest.mark.timeout(900)
SITES = ("--sites", "resid_post.3,q.2,pattern.0", "--dtype", "bfloat16")
LOSSY = ("--sites", "attn_out.3,final", "--codec", "int8-block32")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 40)


@pytest.fixture(scope="module")
def reference(forked_workers: ForkedWorkers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that one process wrote."""
    out = tmp_path_factory.mktemp("one") / "a.zarr"
    [ended] = forked_workers.run([Start(words=capture_words(dataset, out, *SITES), env={})])
    assert ended.code == 0, ended.output
    return out


def codes(ended: list[Ended]) -> list[int]:
    return [end.code for end in ended]


def summary(ended: Ended) -> dict[str, Any]:
    """Return what ``--json`` printed."""
    found: dict[str, Any] = json.loads(next(line for line in ended.output.splitlines() if line.startswith("{")))
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_the_archive_is_the_one_that_one_process_writes(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path, n: int
) -> None:
    out = tmp_path / "a.zarr"
    ended = forked_workers.run(launched(capture_words(dataset, out, *SITES, "--json"), n, slow=0.02))
    assert codes(ended) == [0] * n, ended
    check_end(out, reference)
    said = summary(ended[0])
    assert said["run"]["committed_rows"] == Archive(out).n_rows
    assert [worker["worker"] for worker in said["workers"]] == list(range(n))
    per_worker = [worker["stats"] for worker in said["workers"]]
    assert sum(stats["stored_bytes"] for stats in per_worker) == said["run"]["stored_bytes"]
    assert sum(stats["logical_bytes"] for stats in per_worker) == said["run"]["logical_bytes"]
    assert all(stats["committed_rows"] > 0 for stats in per_worker), "each took a part"
    assert not any("{" in end.output for end in ended[1:]), "worker 0 alone reports"


def test_measured_errors_of_lossy_sites_are_those_of_one_process(
    forked_workers: ForkedWorkers, dataset: Path, tmp_path: Path
) -> None:
    for name, n in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        ended = forked_workers.run(launched(capture_words(dataset, tmp_path / name / "a.zarr", *LOSSY), n))
        assert codes(ended) == [0] * n, ended
    check_end(tmp_path / "three" / "a.zarr", tmp_path / "one" / "a.zarr")


def test_a_worker_that_is_told_to_stop_leaves_its_shards_to_the_others(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    workers = launched(capture_words(dataset, out, *SITES), 3, slow=0.1)
    forked_workers.start(workers)
    await_commits(out, 2)
    forked_workers.kill(1, signal.SIGTERM)
    ended = forked_workers.wait(SOON)
    assert codes(ended) == [0, 130, 0], ended
    check_end(out, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_stop_in_time_when_they_are_told_to(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "a.zarr"
    forked_workers.start(launched(capture_words(dataset, out, *SITES), 3, slow=0.1))
    await_commits(out, 2)
    for worker in range(3):
        forked_workers.kill(worker, number)
    ended = forked_workers.wait(SOON)
    assert codes(ended) == [130] * 3, ended
    assert "captured and safe" in ended[0].output
    assert verify(out).problems == []
    assert codes(forked_workers.run(launched(capture_words(dataset, out, *SITES), 2))) == [0, 0]
    check_end(out, reference)


def test_a_second_run_is_refused(forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES)
    first = Start(words=words, env={}, slow=0.1)
    lock = str(tmp_path / ".a.zarr.lock")
    second = Start(words=words, env={}, after=lock)
    late_worker = Start(words=[*words, "--join"], env={}, after=lock)
    launch = [Start(words=words, env=start.env, after=lock) for start in launched(words, 2)]
    ended = forked_workers.run([first, second, late_worker, *launch])
    assert codes(ended) == [0, 2, 2, 2, 1], ended
    for refused in ended[1:]:
        assert "another run is at work on" in refused.output
    check_end(out, reference)


def test_a_second_run_that_is_meant_to_joins_the_first(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--json", "--join")
    first = Start(
        words=words, env={}, slow=0.5
    )  # so that shards are left for those who come later, on a busy machine too
    ended = forked_workers.run([first, *[Start(words=words, env={}, slow=0.1, after=str(out / "zarr.json"))] * 2])
    assert codes(ended) == [0, 0, 0], ended
    check_end(out, reference)
    said = [summary(end) for end in ended]
    assert said[0]["workers"] == said[1]["workers"] == said[2]["workers"]
    assert len(said[0]["workers"]) == 3
    assert all(worker["stats"]["committed_rows"] for worker in said[0]["workers"])


def test_a_launch_joins_a_launch(forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--json", "--join")
    late = [Start(words=words, env=start.env, slow=0.1, after=str(out / "zarr.json")) for start in launched(words, 2)]
    ended = forked_workers.run([*launched(words, 2, slow=0.5), *late])
    assert codes(ended) == [0] * 4, ended
    check_end(out, reference)
    assert len(summary(ended[0])["workers"]) == 4


def test_who_joins_with_other_settings_is_told_and_the_others_go_on(
    forked_workers: ForkedWorkers, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--join")
    other = Start(words=[*words, "--batch-tokens", "80"], env={}, after=str(out / "zarr.json"))
    ended = forked_workers.run([Start(words=words, env={}, slow=0.1), other])
    assert codes(ended) == [0, 2], ended
    assert "batch_tokens" in ended[1].output
    check_end(out, reference)


def test_when_the_plan_cannot_be_made_nobody_waits(forked_workers: ForkedWorkers, tmp_path: Path) -> None:
    words = capture_words(tmp_path / "no such file.jsonl", tmp_path / "a.zarr", *SITES)
    ended = forked_workers.run(launched(words, 3), 60)
    assert [end.code for end in ended] == [2, 1, 1], ended
    for end in ended:
        assert "no such file" in end.output
