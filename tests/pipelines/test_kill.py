"""kill -9 at random moments and at chosen steps: nothing that was committed is lost, and the end is the same."""

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from residua.store.archive import Archive
from residua.store.metadata import is_archive
from residua.store.shard import shard_path
from residua.store.verify import verify
from tests.pipelines.forking import Forks
from tests.ragged import capture_words, write_dataset

N_KILLS = 20
SITES = ("--sites", "resid_post.3,q.2,pattern.0", "--dtype", "bfloat16")
LOSSY = ("--sites", "attn_out.3,final", "--codec", "int8-block32")


def content(archive: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the root's metadata, which holds the command line and so the place."""
    return {
        path.relative_to(archive).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in archive.rglob("*")
        if path.is_file() and path != archive / "zarr.json"
    }


def committed(path: Path) -> dict[str, tuple[str, int]]:
    """Return SHA-256 and time of every file of a committed shard, its record included."""
    archive = Archive(path)
    files = [path / "commits" / commit.name for commit in archive.commits.values()]
    files += [shard_path(path, spec, shard) for spec in archive.plan.arrays for shard in archive.commits]
    return {str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


def check_stop(path: Path, before: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Check what a kill left behind against what was committed before it; return what is committed now."""
    if not is_archive(path):
        assert not path.exists(), "an archive appears whole or not at all"
        return {}
    assert verify(path).problems == []
    now = committed(path)
    assert before.items() <= now.items()
    return now


def check_end(path: Path, reference: Path) -> None:
    """Check that a capture that was killed ended as the one that was not."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing is left beside the archive"
    assert content(path) == content(reference)
    assert Archive(path).plan.digest == Archive(reference).plan.digest
    report = verify(path)
    assert (report.problems, report.notes) == ([], [])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 18)


def test_killed_at_twenty_random_moments(forks: Forks, dataset: Path, tmp_path: Path) -> None:
    slow = 0.005
    started = time.monotonic()
    reference = tmp_path / "reference.zarr"
    assert forks.run(capture_words(dataset, reference, *SITES), slow=slow).code == 0
    seconds = time.monotonic() - started
    moments = random.Random(20)
    n_kills = n_archives = 0
    while n_kills < N_KILLS:
        n_archives += 1
        out = tmp_path / f"{n_archives}" / "a.zarr"
        out.parent.mkdir()
        code, files = -signal.SIGKILL, dict[str, tuple[str, int]]()
        while code == -signal.SIGKILL and n_kills < N_KILLS:
            child = forks.start(capture_words(dataset, out, *SITES), slow=slow)
            time.sleep(moments.uniform(0, 0.7 * seconds))
            child.send_signal(signal.SIGKILL)
            code = child.wait().code
            n_kills += code == -signal.SIGKILL
            files = check_stop(out, files)
        assert forks.run(capture_words(dataset, out, *SITES)).code == 0
        assert files.items() <= committed(out).items()
        check_end(out, reference)


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
