"""The verification of a long archive: shared by threads, of a sample, and going on where it was stopped."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.sealing.packed_index import INDEX, PackedIndex
from residua.store.verification.checkpoint import Checkpoint
from residua.store.verification.verify import verify
from tests.servers.files import serving_files
from tests.store.forging import without_index
from tests.store.small_archive import N_SHARDS, make_archive


def damage(path: Path, *shards: int) -> None:
    for shard in shards:
        file = path / f"sites/q/1/c/{shard}/0/0"
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_finds_the_same_in_the_same_order(threads: int, copy: Path) -> None:
    damage(copy, 0, 2)
    (copy / "rows/token/c/1").unlink()
    steps: list[tuple[int, int]] = []
    found = verify(copy, threads=threads, on_shard=lambda *step: steps.append(step))
    assert found == verify(copy, threads=3)
    assert [problem.path for problem in found.problems] == [
        "sites/q/1/c/0/0/0",
        "rows/token/c/1",
        "sites/q/1/c/2/0/0",
    ]
    assert steps == [(done, N_SHARDS) for done in (1, 2, 3)]


class LateFirst:
    """Runs jobs as a cluster does: pickled, and the last one first."""

    n_workers = 2

    def __init__(self) -> None:
        self.n_jobs = 0

    def map(self, function: Any, jobs: Any, *, label: str) -> Iterator[tuple[int, Any]]:
        self.n_jobs = len(jobs)
        for number, job in reversed(list(enumerate(jobs))):
            work, argument = pickle.loads(pickle.dumps((function, job)))  # noqa: S301
            yield number, pickle.loads(pickle.dumps(work(argument)))  # noqa: S301


def test_the_workers_of_a_cluster_find_the_same_in_the_same_order(copy: Path) -> None:
    cluster, steps = LateFirst(), list[tuple[int, int]]()
    assert verify(copy, cluster=cluster).is_sound
    assert cluster.n_jobs == N_SHARDS
    damage(copy, 0, 2)
    (copy / "rows/token/c/1").unlink()
    assert verify(copy, cluster=cluster, on_shard=lambda *step: steps.append(step)) == verify(copy, threads=1)
    assert steps == [(done, N_SHARDS) for done in (1, 2, 3)]


def test_an_address_is_verified_by_a_cluster_and_goes_on_after_a_stop(copy: Path, tmp_path: Path) -> None:
    damage(copy, 0)
    file, steps = tmp_path / "stopped.json", list[int]()
    with serving_files(copy) as server:
        expected = verify(server.url, cluster=LateFirst())
        assert [problem.path for problem in expected.problems] == ["sites/q/1/c/0/0/0"]
        assert expected == verify(residua.open(server.url, cache=False))
        with pytest.raises(StopError):
            verify(server.url, checkpoint=file, on_shard=stop_after)
        server.forget()
        assert verify(server.url, checkpoint=file, on_shard=lambda done, _: steps.append(done)) == expected
        assert server.requests["/sites/q/1/c/0/0/0"] == 0
    assert steps == [1, 2, 3]
    assert not file.exists()


def test_a_sample_says_what_it_is(copy: Path) -> None:
    damage(copy, 0, 1, 2)
    found = verify(copy, sample=1)
    assert len(found.problems) == 1
    assert any("1 of 3 shards" in note for note in found.notes)
    assert len(verify(copy, sample=9).problems) == 3
    assert verify(copy, sample=0).is_sound
    refused: list[tuple[Any, str]] = [
        ({"sample": -1}, "sample=-1.*at least 0"),
        ({"threads": 0}, "threads=0.*at least 1"),
    ]
    for options, words in refused:
        with pytest.raises(PlanError, match=words):
            verify(copy, **options)


class StopError(Exception):
    pass


def stop_after(done: int, _: int) -> None:
    if done == 2:
        raise StopError


@pytest.mark.parametrize("is_written", [True, False], ids=["it is time to write", "it is not"])
def test_a_checkpoint_is_written_now_and_then_and_when_it_is_stopped(
    is_written: bool, copy: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cache/stopped.json"

    def stop_in(checkpoint: Checkpoint) -> None:
        with checkpoint:
            checkpoint.save({"n_shards": 1})
            assert file.exists() == is_written
            raise StopError

    with pytest.raises(StopError):
        stop_in(Checkpoint(path=file, archive=copy, seconds=-1.0 if is_written else 1e9))
    assert Checkpoint(path=file, archive=copy).state == {"n_shards": 1}


def test_a_verification_that_was_stopped_goes_on(copy: Path, tmp_path: Path) -> None:
    damage(copy, 0)
    expected, file = verify(copy), tmp_path / "cache/stopped.json"
    with pytest.raises(StopError):
        verify(copy, checkpoint=file, on_shard=stop_after)
    assert Checkpoint(path=file, archive=copy).state["n_shards"] == 1
    damage(copy, 0)  # as it was, and not looked at again
    steps: list[int] = []
    assert verify(copy, checkpoint=file, on_shard=lambda done, _: steps.append(done)) == expected
    assert steps == [1, 2, 3], "with what was done before"
    assert not file.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"archive": "x", "state": {}}', '{"state": {"n_shards": 2}}'])
def test_what_something_else_left_is_ignored(content: str, copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "stopped.json"
    file.write_text(content)
    damage(copy, 0)
    assert len(verify(copy, checkpoint=file).problems) == 1
    with pytest.raises(StopError):
        verify(copy, checkpoint=file, on_shard=stop_after)
    other = make_archive(tmp_path / "other.zarr", seed=3)
    assert verify(other, checkpoint=file).n_chunks == 5 * N_SHARDS
    found = json.loads((copy / "zarr.json").read_text())
    (copy / "zarr.json").write_text(json.dumps({**found, "attributes": {**found["attributes"], "mine": 1}}))
    assert len(verify(copy, checkpoint=file).problems) == 1


def test_the_command_goes_on_and_begins_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("residua.pipelines.cli.progress.StepProgress.step", lambda _, *step: stop_after(*step))
    with pytest.raises(StopError):
        main(["verify", str(copy)])
    (file,) = (tmp_path / "cache/residua").iterdir()
    damage(copy, 0)
    monkeypatch.setattr("residua.pipelines.cli.progress.StepProgress.step", lambda *_: None)
    stopped = file.read_bytes()
    assert main(["verify", str(copy)]) == 0
    file.write_bytes(stopped)
    assert main(["verify", str(copy), "--restart"]) == 1
    assert main(["verify", str(copy), "--sample", "0", "--threads", "2"]) == 0
    assert "0 of 3 shards" in capsys.readouterr().out


def test_the_command_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_archive(tmp_path / "a.zarr")
    without_index(path)
    assert main(["pack", str(path), "--json"]) == 0
    assert INDEX in capsys.readouterr().out
    assert isinstance(Archive(path).commits, PackedIndex)
    residua.pack(str(path))
    assert main(["pack", str(path)]) == 0
