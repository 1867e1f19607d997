"""Replicas that share a job over an archive write the same results as one process."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from residua.store.verification.verify import verify
from tests.forking import SECONDS, SOON, Ended, ForkedWorkers, Start, launched
from tests.pipelines.replay.test_replay import contents
from tests.ragged import MODEL, capture_words, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EDITS = [
    {"edit": "zero", "site": "attn_out.4"},
    {"edit": "mean", "site": "resid_post.3", "positions": "1:3"},
    {"edit": "swap", "site": "resid_post.3", "source": 3, "positions": [0]},
    {"edit": "noise", "site": "mlp_out.4", "std": 0.1},
]


@pytest.fixture(scope="module")
def archive(forked_workers: ForkedWorkers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset = write_dataset(folder / "ragged.jsonl", 40)
    (folder / "edits.yaml").write_text(yaml.safe_dump(EDITS))
    pairs = [
        {"clean": [5 + i, 40, 7, *range(60, 63 + i)], "corrupted": [5 + i, 41, 8, *range(60, 63 + i)], "answer": 7}
        for i in range(7)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    for name, options in (
        ("acts.zarr", ["--sites", "resid_post.3,resid_post.5"]),
        ("lossy.zarr", ["--sites", "resid_post.3,resid_post.5", "--codec", "int8-block32"]),
    ):
        [ended] = forked_workers.run([Start(words=capture_words(dataset, folder / name, *options), env={})])
        assert ended.code == 0, ended.output
    return folder / "acts.zarr"


def replay_words(archive: Path, out: Path, *more: str) -> list[str]:
    job = ["replay", str(archive), "--model", str(MODEL), "--edit", str(archive.parent / "edits.yaml")]
    chosen = ["--at", "resid_post.3", "--tokens", "7,9", "--examples", "1-30", "--capture", "resid_post.4,final"]
    return [*job, *chosen, "--out", str(out), *more]


@pytest.fixture(scope="module")
def reference(
    forked_workers: ForkedWorkers, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """What one process wrote and printed."""
    out = tmp_path_factory.mktemp("one") / "replayed"
    [ended] = forked_workers.run([Start(words=replay_words(archive, out, "--json"), env={})])
    assert ended.code == 0, ended.output
    return out, ended.output


def summary(ended: Ended | str) -> dict[str, Any]:
    output = ended if isinstance(ended, str) else ended.output
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    del found["folder"]
    found.pop("archive", None)
    return found


def n_parts(out: Path) -> int:
    return len(list(out.glob("examples/part-*.parquet")))


def await_parts(out: Path, n: int) -> None:
    deadline = time.monotonic() + SECONDS
    while n_parts(out) < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_tables_are_those_that_one_process_writes(
    forked_workers: ForkedWorkers, archive: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "replayed"
    ended = forked_workers.run(launched(replay_words(archive, out, "--json"), 3, slow=0.02))
    assert [end.code for end in ended] == [0] * 3, ended
    assert contents(out) == contents(reference[0])
    assert summary(ended[0]) == summary(reference[1]), "the notes too"
    assert not any("{" in end.output for end in ended[1:]), "the first process alone reports"
    assert [path.name for path in tmp_path.iterdir()] == ["replayed"], "nothing else is left next to the tables"


def test_killed_at_once_it_goes_on_with_another_number_of_processes(
    forked_workers: ForkedWorkers, archive: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    out, whole = tmp_path / "replayed", reference[0]
    forked_workers.start(launched(replay_words(archive, out), 3, slow=0.1))
    await_parts(out, 4)
    for worker in range(3):
        forked_workers.kill(worker)
    assert {end.code for end in forked_workers.wait()} == {-signal.SIGKILL}
    assert 4 <= n_parts(out) < n_parts(whole)
    for n in (1, 2):
        again = tmp_path / f"by {n}"
        shutil.copytree(out, again)
        before = {path: path.stat().st_mtime_ns for path in again.glob("examples/part-*.parquet")}
        ended = forked_workers.run(launched(replay_words(archive, again), n))
        assert [end.code for end in ended] == [0] * n, ended
        assert contents(again) == contents(whole)
        assert {path: path.stat().st_mtime_ns for path in before} == before, "finished parts are not made again"
    ended = forked_workers.run(launched(replay_words(archive, out, "--tokens", "8"), 2))
    assert [end.code for end in ended] == [2, 1], ended
    assert all("holds the results of another request" in end.output for end in ended)


def test_shards_of_one_that_is_killed_are_taken_over(
    forked_workers: ForkedWorkers, archive: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "replayed"
    shutil.copytree(reference[0], out)
    shutil.rmtree(out / "acts.zarr")
    forked_workers.start(launched(replay_words(archive, out), 3, slow=0.1))
    deadline = time.monotonic() + SECONDS
    while len(list(out.glob("acts.zarr/commits/*.json"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    forked_workers.kill(2)
    ended = forked_workers.wait(SOON)
    assert [end.code for end in ended] == [0, 0, -signal.SIGKILL], ended
    assert contents(out) == contents(reference[0])
    assert verify(out / "acts.zarr").problems == []


def test_parts_of_one_that_is_killed_are_taken_over(
    forked_workers: ForkedWorkers, archive: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "replayed"
    forked_workers.start(launched(replay_words(archive, out), 3, slow=0.1))
    await_parts(out, 3)
    forked_workers.kill(2)
    ended = forked_workers.wait(SOON)
    assert [end.code for end in ended] == [0, 0, -signal.SIGKILL], ended
    assert contents(out) == contents(reference[0])


def shared_jobs(archive: Path, out: Path) -> dict[str, list[str]]:
    """Jobs other than the replay of a full archive, and the results that each writes to `out`."""
    model, pairs = ["--model", str(MODEL)], ["--pairs", str(archive.parent / "pairs.jsonl"), "--metric", "loss"]
    repeats = ["--examples", "6", "--period", "9", "--out", str(out / "repeats.zarr"), "--scheduler", "inline"]
    sweep = [*model, *pairs, "--sites", "attn_out.*", "--json"]
    return {
        "patch": ["patch", *sweep, "--positions", "1-3,-1", "--out", str(out / "patched")],
        "attribute": ["attribute", *sweep, "--out", str(out / "attributed")],
        "fidelity": ["fidelity", str(archive.parent / "lossy.zarr"), *model, "--batches", "9", "--json"],
        "induction": ["induction", *model, *repeats, "--json"],
    }


def test_sweeps_and_samples_are_shared_too(forked_workers: ForkedWorkers, archive: Path, tmp_path: Path) -> None:
    measured, results = archive.parent / "lossy.zarr/fidelity.json", {}
    for n in (1, 2):
        (tmp_path / f"{n}").mkdir()
        for job, words in shared_jobs(archive, tmp_path / f"{n}").items():
            ended = forked_workers.run(launched(words, n, slow=0.01))
            assert [end.code for end in ended] == [0] * n, ended
            assert not any("{" in end.output for end in ended[1:]), "the first process alone reports"
            said = json.loads(next(line for line in ended[0].output.splitlines() if line.startswith("{")))
            results[job, n] = {key: value for key, value in said.items() if key not in ("folder", "archive")}
            assert results[job, n] == results[job, 1]
        measured.rename(tmp_path / f"{n}/fidelity.json")
    written = [contents(tmp_path / f"{n}") for n in (1, 2)]
    names = {"patched/cells.parquet", "patched/cells.png", "fidelity.json", "repeats-heads/heads.parquet"}
    assert names < set(written[0])
    assert {name for name, found in written[0].items() if written[1][name] != found} == {"repeats.zarr/zarr.json"}


def test_who_was_asked_for_something_else_is_told_and_the_others_go_on(
    forked_workers: ForkedWorkers, archive: Path, tmp_path: Path
) -> None:
    words = shared_jobs(archive, tmp_path)["patch"]
    first, second = launched(words, 2, slow=0.02)
    other = Start(words=[*words, "--positions", "1"], env=second.env)
    ended = forked_workers.run([first, other])
    assert [end.code for end in ended] == [0, 2], ended
    assert "different requests" in ended[1].output
