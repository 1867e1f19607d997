"""kill -9 at random moments and at chosen steps: nothing that was committed is lost, and the end is the same."""

import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from residua.store.format.archive_metadata import is_archive
from tests.forking import Forks
from tests.ragged import capture_words, write_dataset
from tests.servers.objects import check_same, files, objects
from tests.servers.s3 import S3Server
from tests.stopped import check_end, check_stop, committed

N_KILLS = 20
SLOW = 0.005
SITES = ("--sites", "resid_post.3,q.2,pattern.0", "--dtype", "bfloat16")
LOSSY = ("--sites", "attn_out.3,final", "--codec", "int8-block32")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 18)


class Reference(NamedTuple):
    """An archive whose capture nobody stopped, and how long that took."""

    path: Path
    seconds: float


@pytest.fixture(scope="module")
def reference(forks: Forks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    started, path = time.monotonic(), tmp_path_factory.mktemp("reference") / "a.zarr"
    assert forks.run(capture_words(dataset, path, *SITES), slow=SLOW).code == 0
    return Reference(path, time.monotonic() - started)


def test_killed_at_twenty_random_moments(forks: Forks, dataset: Path, reference: Reference, tmp_path: Path) -> None:
    moments = random.Random(20)
    n_kills = n_archives = 0
    while n_kills < N_KILLS:
        n_archives += 1
        out = tmp_path / f"{n_archives}" / "a.zarr"
        out.parent.mkdir()
        code, files = -signal.SIGKILL, dict[str, tuple[str, int]]()
        while code == -signal.SIGKILL and n_kills < N_KILLS:
            child = forks.start(capture_words(dataset, out, *SITES), slow=SLOW)
            time.sleep(moments.uniform(0, 0.7 * reference.seconds))
            child.send_signal(signal.SIGKILL)
            code = child.wait().code
            n_kills += code == -signal.SIGKILL
            files = check_stop(out, files)
        assert forks.run(capture_words(dataset, out, *SITES)).code == 0
        assert files.items() <= committed(out).items()
        check_end(out, reference.path)


def test_killed_at_twenty_random_moments_on_the_way_into_a_bucket(
    forks: Forks, dataset: Path, reference: Reference, s3: S3Server
) -> None:
    moments, n_kills, n_archives = random.Random(21), 0, 0
    while n_kills < N_KILLS:
        n_archives += 1
        address, kept = s3.address(f"killed/{n_archives}.zarr"), dict[str, bytes]()
        words, code = capture_words(dataset, address, *SITES), -signal.SIGKILL
        while code == -signal.SIGKILL and n_kills < N_KILLS:
            child = forks.start(words, slow=SLOW, env=s3.environment)
            time.sleep(moments.uniform(0, 0.9 * reference.seconds))
            child.send_signal(signal.SIGKILL)
            code = child.wait().code
            n_kills += code == -signal.SIGKILL
            there = objects(address, s3.options)
            assert kept.items() <= there.items(), "what was committed stays"
            kept = {name: data for name, data in there.items() if name.startswith("commits/")}
        assert forks.run(words, env=s3.environment).code == 0
        check_same(objects(address, s3.options), files(reference.path))


def test_killed_at_each_of_many_steps(forks: Forks, dataset: Path, tmp_path: Path) -> None:
    """Every run dies at a later step than the one before, from the first folder to the last commit."""
    reference, out = tmp_path / "reference.zarr", tmp_path / "killed" / "a.zarr"
    out.parent.mkdir()
    n_steps = forks.run(capture_words(dataset, reference, *LOSSY)).n_steps
    assert n_steps > 200
    files: dict[str, tuple[str, int]] = {}
    n_without = 0
    for die_at in sorted(random.Random(3).sample(range(1, 60), 8) + random.Random(4).sample(range(60, 200), 6)):
        assert forks.run(capture_words(dataset, out, *LOSSY), die_at=die_at).code == -signal.SIGKILL
        files = check_stop(out, files)
        n_without += not is_archive(out)
    assert 0 < n_without < 14, "some die while the archive is made, some while it is filled"
    assert forks.run(capture_words(dataset, out, *LOSSY)).code == 0
    check_end(out, reference)
