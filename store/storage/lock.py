"""One run at a time: a lock next to the archive, which says who holds it.

The lock is a file, `.NAME.lock`, with an flock on it. The kernel drops the flock together with the process, so the file
of a dead run does not block anybody. On a file system without locks, the file itself counts as the lock while its
process lives. Whether a process on another machine lives cannot be known; the message then says what to do.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residua.store.base.canonical import Json
from residua.store.base.naming import named

_MAX_BYTES = 64 * 1024
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The run that holds the lock of an archive.

    Attributes:
        host: Name of the machine.
        pid: Process number there.
        since: Time when it started, for people.
        join: What another run needs to join this one; None if that is not possible.
    """

    host: str
    pid: int
    since: str
    join: Mapping[str, Any] | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class ArchiveInUseError(BlockingIOError):
    """Another run holds the lock of the archive.

    Attributes:
        owner: That run, if the lock names it.
    """

    def __init__(self, archive: Path | str, owner: Owner | None, advice: str) -> None:
        who = f": {owner}" if owner else ""
        super().__init__(errno.EWOULDBLOCK, f"another run is at work on {archive}{who}. {advice}")
        self.owner = owner

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def locked(archive: Path, *, join: Mapping[str, Json] | None = None, name_seconds: float = 5.0) -> Iterator[None]:
    """Hold the lock of `archive` inside the `with` block.

    Args:
        archive: Folder of the archive; it need not exist.
        join: What another run needs to join this one.
        name_seconds: Time for a run that has the lock to write who it is.

    Raises:
        ArchiveInUseError: Another run holds the lock.
        OSError: The parent folder cannot be written.
    """
    path = _path(archive)
    with naming_archive(archive):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, archive, name_seconds)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with suppress(OSError):  # a full disk: the lock holds without a name, and writing the archive will fail
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({**owner, "join": join}).encode(), 0)
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


@contextmanager
def naming_archive(archive: Path) -> Iterator[None]:
    """Turn an OSError inside into one that names the archive that cannot be made."""
    try:
        yield
    except ArchiveInUseError:
        raise
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make an archive at {archive}: {error.strerror}. Choose a folder that is writable."
        ) from error


def read_owner(archive: Path) -> Owner | None:
    """Return the owner that the lock of `archive` names, alive or not; None if it names none."""
    try:
        with _path(archive).open("rb") as file:
            return owner_of(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None


def in_use_advice() -> str:
    """Return what to do while another run is at work."""
    return f"Wait for it, stop it, or start both so that they share the work ({named('join', True)})."


def owner_of(data: bytes) -> Owner | None:
    """Return the owner that a lock or a lease names; None if it names none."""
    try:
        values = json.loads(data)
        join = values["join"]
        return Owner(
            host=str(values["host"]),
            pid=int(values["pid"]),
            since=str(values["since"]),
            join=dict(join) if join else None,
        )
    except (ValueError, KeyError, TypeError):
        return None


def try_flock(descriptor: int) -> bool | None:
    """Take the exclusive flock of an open file or folder, without waiting.

    Returns:
        True if it is taken now, False if another process holds it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_alive(pid: int) -> bool:
    """Say whether a process with that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _path(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.lock")


def _acquire(path: Path, archive: Path, name_seconds: float) -> int:
    """Return a descriptor of the lock file, locked; a file that its owner removed meanwhile is opened again."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, archive, name_seconds)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, archive: Path, name_seconds: float) -> None:
    """Take the lock, or raise ArchiveInUseError; a run that has just taken it gets a moment to write its name."""
    deadline = time.monotonic() + name_seconds
    while not (is_taken := try_flock(descriptor)):
        owner = read_owner(archive)
        if is_taken is None:
            _lock_by_file(archive, owner)
            return
        is_named = owner is not None and not (owner.host == socket.gethostname() and not is_alive(owner.pid))
        if is_named or time.monotonic() > deadline:
            raise ArchiveInUseError(archive, owner if is_named else None, in_use_advice())
        time.sleep(_POLL_SECONDS)


def _lock_by_file(archive: Path, owner: Owner | None) -> None:
    """Raise ArchiveInUseError if the file names another run that may live; for file systems without locks."""
    if owner is None:
        return
    if owner.host != socket.gethostname():
        advice = f"If that process is dead, remove {_path(archive)}: this file system has no locks."
        raise ArchiveInUseError(archive, owner, advice)
    if owner.pid != os.getpid() and is_alive(owner.pid):
        raise ArchiveInUseError(archive, owner, in_use_advice())
