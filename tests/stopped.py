"""Checks of an interrupted capture: what it leaves behind, and what the resumed capture has at the end.

The resumed capture must equal one that was never interrupted.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from residua.store.encoding.shard import shard_path
from residua.store.format.archive_metadata import is_archive, read_metadata, write_metadata
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify

SECONDS = 300  # finds hangs, and is long enough for busy machines


def await_commits(archive: Path, n: int = 1, *, is_running: Callable[[], bool] = lambda: True) -> None:
    """Return once `n` shards are committed; fail after `SECONDS`, or if the capture does not run any more."""
    deadline = time.monotonic() + SECONDS
    while len(list(archive.glob("commits/*.json"))) < n:
        assert time.monotonic() < deadline, f"{n} shards were never committed"
        assert is_running()
        time.sleep(0.005)


def content(archive: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the root's metadata, where the command line holds the path."""
    return {
        path.relative_to(archive).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in archive.rglob("*")
        if path.is_file() and path != archive / "zarr.json"
    }


def committed(path: Path) -> dict[str, tuple[str, int]]:
    """Return SHA-256 and modification time of every file of the committed shards, and of their records."""
    archive = Archive(path)
    files = [path / "commits" / commit.name for commit in archive.commits.values()]
    files += [shard_path(path, spec, shard) for spec in archive.plan.arrays for shard in archive.commits]
    return {str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


def check_stop(path: Path, before: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Check that a killed capture kept what was committed before, and return what is committed now."""
    if not is_archive(path):
        assert not path.exists(), "an archive appears complete or not at all"
        return {}
    assert verify(path).problems == []
    now = committed(path)
    assert before.items() <= now.items()
    return now


def check_end(path: Path, reference: Path) -> None:
    """Check that a capture equals `reference`, and that no other file is left."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "there are other files next to the archive"
    assert content(path) == content(reference)
    assert Archive(path).plan.digest == Archive(reference).plan.digest
    report = verify(path)
    assert (report.problems, report.notes) == ([], [])


def take_back(path: Path, *shards: int) -> None:
    """Turn a finished archive into one that was never finished, and whose capture has not reached `shards`."""
    metadata = read_metadata(path)
    write_metadata(path, replace(metadata, sealed=None))
    for shard in shards:
        (path / "commits" / f"{shard:08d}-0000.json").unlink()
