"""Growing captures into a bucket of a real S3 server: parts of the examples are there before the shards that need them.

The archive is the one that a disk gets from a capture that read everything first.
"""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import residua
from residua.capture.recording.stats import RecordStats
from residua.pipelines.capture import growing
from residua.pipelines.capture.add_sites import add_sites
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import DatasetError, StorageError
from residua.store.examples import growing as examples_of
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.forking import Forks
from tests.models.tiny import TINY
from tests.pipelines.capture.growing_samples import PART_BYTES, capture, make_rows, write_long_labels
from tests.ragged import capture_words
from tests.servers.objects import check_same, files, objects
from tests.servers.proxy import proxied
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "FIRST_PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing, "FIRST_PART_BYTES", PART_BYTES)
        patch.setattr(growing.ExamplesAhead, "go_on", _reading_all(growing.ExamplesAhead.go_on))
        capture(TINY["llama"](), make_rows(), out)
    return out


def _reading_all(go_on: Any) -> Any:
    def and_wait(ahead: growing.ExamplesAhead, *args: Any, **more: Any) -> None:
        go_on(ahead, *args, **more)
        ahead.finish()

    return and_wait


class _StopError(Exception):
    """What ends captures in these tests."""


def _stop_at_commit(stats: RecordStats) -> None:
    if stats.committed_rows:
        raise _StopError


def test_a_stopped_capture_is_read_as_far_as_it_is_and_goes_on(
    s3: S3Server, llama: PreTrainedModel, reference: Path
) -> None:
    address = s3.address("grown.zarr")
    options: dict[str, Any] = {"storage_options": s3.options}
    stopped = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()):
            if number == 450 and not stopped.is_set():
                stopped.wait(60)
            yield row

    def on_batch(stats: RecordStats) -> None:
        if stats.committed_rows:
            stopped.set()
            raise _StopError

    with pytest.raises(_StopError):
        capture(llama, rows(), address, **options, on_batch=on_batch)
    archive, whole = residua.open(address, **options), residua.open(reference)
    n_rows, n_examples = archive.n_rows, len(archive.example_table)
    assert 0 < n_rows < whole.n_rows
    assert whole.plan.dataset["begins"] == archive.plan.dataset["begins"]
    assert len(archive.example_table.part_digests) > 1, "the metadata name the first part alone"
    assert archive.examples == whole.examples.slice(0, n_examples)
    assert (archive["resid_post.1"][:n_rows] == whole["resid_post.1"][:n_rows]).all()
    assert verify(address, storage_options=s3.options).is_sound
    again = capture(llama, rows(), address, **options)
    assert (again.resumed, again.stats.committed_rows) == (True, whole.n_rows - n_rows)
    check_same(objects(address, s3.options), files(reference))
    assert not verify(address, storage_options=s3.options).problems
    added = add_sites(llama, rows(), out=address, settings=CaptureSettings(sites="resid_post.0"), **options).archive
    assert (added["resid_post.1"][:] == whole["resid_post.1"][:]).all()
    assert added["resid_post.0"].shape == whole["resid_post.1"].shape
    assert added.examples == whole.examples
    assert not verify(address, storage_options=s3.options).problems


def test_another_dataset_is_refused(s3: S3Server, llama: PreTrainedModel, reference: Path) -> None:
    address = s3.address("others.zarr")
    capture(llama, make_rows(), address, storage_options=s3.options)
    before = objects(address, s3.options)
    check_same(before, files(reference))
    with pytest.raises(DatasetError, match=r"others\.zarr was begun with another dataset"):
        capture(llama, make_rows()[:-1], address, storage_options=s3.options)
    assert objects(address, s3.options) == before


def test_a_part_that_cannot_be_sent_ends_the_capture(s3: S3Server, llama: PreTrainedModel, reference: Path) -> None:
    address = s3.address("refused.zarr")
    with proxied(s3.options["endpoint"]) as proxy:
        proxy.fault = lambda method, path: 503 if method == "PUT" and "part-00002" in path else None
        options = {**s3.options, "endpoint": proxy.url, "retry_config": {"max_retries": 0}}
        with pytest.raises(StorageError, match=r"part-00002.*503"):
            capture(llama, make_rows(), address, storage_options=options)
    capture(llama, make_rows(), address, storage_options=s3.options)
    check_same(objects(address, s3.options), files(reference))


def test_a_start_that_fails_leaves_nothing(s3: S3Server, llama: PreTrainedModel) -> None:
    def stop(_: RecordStats) -> None:
        raise _StopError

    with pytest.raises(_StopError):
        capture(llama, make_rows(), s3.address("nothing.zarr"), storage_options=s3.options, on_batch=stop)
    assert objects(s3.address("nothing.zarr"), s3.options) == {}


def test_a_second_worker_sees_parts_that_come(
    s3: S3Server, llama: PreTrainedModel, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_of, "_LOOK_SECONDS", 0.05)
    address, ran = s3.address("shared.zarr"), threading.Event()
    found: list[CaptureResult] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(make_rows()):
            if number == 450:
                assert ran.wait(200)
            yield row

    def after(stats: RecordStats) -> None:
        if stats.rows:
            ran.set()

    def join() -> None:
        found.append(capture(TINY["llama"](), None, address, storage_options=s3.options, join=True, on_batch=after))

    other = threading.Thread(target=join)
    settings: dict[str, Any] = {"join": True, "storage_options": s3.options}
    first = capture(
        llama, rows(), address, **settings, on_plan=lambda *_: other.start(), on_batch=lambda _: ran.wait(200)
    )
    other.join()
    assert [worker.worker for worker in first.workers] == [0, 1]
    assert all(worker.stats.committed_rows for worker in first.workers)
    assert found[0].dataset == first.dataset
    check_same(objects(address, s3.options), files(reference))


def await_shards(folder: ObjectFolder, n: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.list("commits"))) < n:
        assert time.monotonic() < deadline, f"{n} shards were never committed"
        time.sleep(0.05)


def check_killed(folder: ObjectFolder) -> int:
    """Check what a killed capture left, and return how many shards that has."""
    if folder.size("zarr.json") is None:
        return 0
    archive = residua.open(folder.address, storage_options=folder.options)
    n_of_examples = archive.example_table.index().total_rows
    assert all(stop <= n_of_examples for _, stop in archive.captured_rows()), "a shard came before its examples"
    assert verify(folder.address, storage_options=folder.options).problems == []
    return archive.progress.shards


def test_killed_captures_go_on(forks: Forks, s3: S3Server, tmp_path: Path) -> None:
    dataset, folder = write_long_labels(tmp_path / "rows.jsonl"), ObjectFolder(s3.address("a.zarr"), s3.options)

    def words(out: Path | str) -> list[str]:
        return capture_words(dataset, out, "--grow", "--sites", "resid_post.3")

    ended = forks.run(words(tmp_path / "a.zarr"))
    assert ended.code == 0, ended.output
    for die_at in (25, 35, 45):  # before the archive is there, and while parts come
        killed = forks.run(words(folder.address), die_at=die_at, env=s3.environment)
        assert killed.code == -signal.SIGKILL, killed.output
        check_killed(folder)
    for n_shards in (1, 4):
        child = forks.start(words(folder.address), slow=0.1, env=s3.environment)
        await_shards(folder, n_shards)
        child.send_signal(signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
        assert check_killed(folder) >= n_shards
    ended = forks.run(words(folder.address), env=s3.environment)
    assert ended.code == 0, ended.output
    check_same(objects(folder.address, s3.options), files(tmp_path / "a.zarr"))
