"""One run at a time: a second run is refused while the first lives, and free to start when it is dead."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from residua.store.storage.lock import ArchiveInUseError, locked, read_owner

HOLD = """
import sys, time
from pathlib import Path
from residua.store.storage.lock import locked
with locked(Path(sys.argv[1]), join={"port": 7}):
    print("held", flush=True)
    time.sleep(600)
"""


def refusal(archive: Path, match: str, *, name_seconds: float = 5.0) -> ArchiveInUseError:
    """Return the error that a second run gets."""
    with pytest.raises(ArchiveInUseError, match=match) as caught, locked(archive, name_seconds=name_seconds):
        pytest.fail("two runs")
    return caught.value


def test_a_second_run_is_refused_with_the_name_of_the_first_until_that_one_is_killed(tmp_path: Path) -> None:
    archive = tmp_path / "a.zarr"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        owner = refusal(archive, rf"a\.zarr: process {process.pid} on .*join=").owner
        assert owner is not None
        assert (owner.host, owner.pid, owner.join) == (socket.gethostname(), process.pid, {"port": 7})
        process.send_signal(signal.SIGKILL)
    assert read_owner(archive) == owner, "the file of the dead run is still there"
    with locked(archive):
        assert (found := read_owner(archive)) is not None
        assert (found.pid, found.join) == (os.getpid(), None)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_removed_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "a.zarr"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a.zarr"), locked(tmp_path / "b.zarr"):
        pass


@pytest.mark.parametrize("stale", ["", "{", "a dead run"])
def test_a_run_that_has_just_taken_the_lock_gets_a_moment_to_write_its_name(tmp_path: Path, stale: str) -> None:
    """A late worker of --join needs the address there, and never that of a dead run before."""
    path = tmp_path / ".a.zarr.lock"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = {"host": socket.gethostname(), "since": "now", "pid": os.getppid(), "join": {"port": 7}}
    path.write_text(json.dumps({**here, "pid": ended.pid, "join": {"port": 6}}) if stale == "a dead run" else stale)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: path.write_text(json.dumps(here)))
        timer.start()
        owner = refusal(tmp_path / "a.zarr", "another run is at work on").owner
        timer.join()
    assert owner is not None
    assert owner.join == {"port": 7}


def test_a_lock_whose_run_ends_before_it_has_a_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / ".a.zarr.lock"
    path.write_text("")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with locked(tmp_path / "a.zarr"):
            timer.join()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"host": "a", "pid": "x", "since": "", "join": 3}'])
def test_a_lock_with_an_unreadable_owner_still_locks(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".a.zarr.lock"
    path.write_text(text)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refusal(tmp_path / "a.zarr", r"another run is at work on .*a\.zarr\. ", name_seconds=0.1)
    with locked(tmp_path / "a.zarr"):
        pass


def test_without_locks_the_file_counts_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    def left_by(host: str, pid: int) -> None:
        values = {"host": host, "pid": pid, "since": "then", "join": None}
        (tmp_path / ".a.zarr.lock").write_text(json.dumps(values))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left_by(socket.gethostname(), ended.pid)
    with locked(tmp_path / "a.zarr"):
        pass
    left_by(socket.gethostname(), 1)
    refusal(tmp_path / "a.zarr", "process 1 on")
    for number in (12, os.getpid()):  # containers number their processes alike
        left_by("elsewhere", number)
        refusal(tmp_path / "a.zarr", f"process {number} on elsewhere.*remove .*lock")
