"""Workers that capture into a bucket together, and are killed with kill -9: one archive, the one of a disk."""

import json
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.store.storage.lease import LEASE
from residua.store.storage.objects import ObjectFolder
from tests.forking import LOST_SECONDS, SOON, ForkedWorkers, Start, launched
from tests.ragged import capture_words, write_dataset
from tests.servers.objects import check_same, files, objects
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(900)

N_KILLS = 6
SECONDS = 240.0
"""Time in which the kills have to happen."""
SITES = ("--sites", "resid_post.3,q.2", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 18, seed=1)


@pytest.fixture(scope="module")
def reference(forked_workers: ForkedWorkers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "a.zarr"
    [ended] = forked_workers.run([Start(words=capture_words(dataset, out, *SITES), env={})])
    assert ended.code == 0, ended.output
    return out


def joined(words: Sequence[str], n: int, *, slow: float = 0) -> list[Start]:
    return [Start(words=[*words, "--join"], env={}, slow=slow) for _ in range(n)]


def started(workers: Sequence[Start], server: S3Server) -> list[Start]:
    found = [{**vars(worker), "env": {**worker.env, **server.environment}} for worker in workers]
    return [Start(**values) for values in found]


@pytest.mark.parametrize("how", [launched, joined])
def test_two_workers_share_the_work(
    forked_workers: ForkedWorkers, s3: S3Server, dataset: Path, reference: Path, how: Any
) -> None:
    name = f"{how.__name__}.zarr"
    words = capture_words(dataset, s3.address(name), *SITES, "--json")
    ended = forked_workers.run(started(how(words, 2, slow=0.05), s3))
    assert [end.code for end in ended] == [0, 0], ended
    check_same(objects(s3.address(name), s3.options), files(reference))
    workers = next(json.loads(end.output)["workers"] for end in ended if end.output.startswith("{"))
    assert [worker["stats"]["committed_rows"] > 0 for worker in workers] == [True, True]


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_by_other_numbers_of_workers(
    forked_workers: ForkedWorkers, s3: S3Server, dataset: Path, reference: Path
) -> None:
    words = capture_words(dataset, s3.address("killed.zarr"), *SITES)
    folder = ObjectFolder(s3.address("killed.zarr"), s3.options)
    moments, deadline, rows = random.Random(5), time.monotonic() + SECONDS, 0
    for number in range(N_KILLS):
        how = (launched, joined)[number % 2]
        forked_workers.start(started(how(words, 1 + number % 3, slow=0.05), s3))
        time.sleep(moments.uniform(0.2, 3))
        for worker in range(len(forked_workers.pids)):
            forked_workers.kill(worker)
        codes = {end.code for end in forked_workers.wait(LOST_SECONDS + SOON)}
        assert codes <= {-signal.SIGKILL, 0, 1}, codes
        if folder.size("zarr.json") is not None:
            progress = residua.open(s3.address("killed.zarr"), storage_options=s3.options).progress
            assert progress.rows >= rows, "what was committed stays"
            rows = progress.rows
        if time.monotonic() > deadline:
            break
    [ended] = forked_workers.run(started([Start(words=words, env={})], s3))
    assert ended.code == 0, ended.output
    assert folder.size(LEASE) is None
    check_same(objects(s3.address("killed.zarr"), s3.options), files(reference))
