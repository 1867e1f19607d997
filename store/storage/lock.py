"""One run at a time: a lock beside the archive, with the name of who holds it.

The lock is a file, `.NAME.lock`, with an flock on it. The kernel drops that with the process, so what a dead run
leaves behind is no obstacle. On a file system without locks the file itself counts while its process lives; of a
process on another machine nobody can tell, and the message says what to do.
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
from residua.store.storage.files import is_alive

_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who is at work on an archive.

    Attributes:
        host: Name of the machine.
        pid: Number of the process there.
        since: When it began, as people write it.
        join: What another run needs to join, or None if that is not possible.
    """

    host: str
    pid: int
    since: str
    join: Mapping[str, Any] | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class ArchiveInUseError(BlockingIOError):
    """Another run is at work on the archive.

    Attributes:
        owner: Who, if the lock says.
    """

    def __init__(self, archive: Path, owner: Owner | None, advice: str) -> None:
        who = f": {owner}" if owner else ""
        super().__init__(errno.EWOULDBLOCK, f"another run is at work on {archive}{who}. {advice}")
        self.owner = owner

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def locked(archive: Path, *, join: Mapping[str, Json] | None = None) -> Iterator[None]:
    """Keep other runs off `archive` inside.

    Args:
        archive: Folder of the archive; it need not exist.
        join: What another run needs to join this one.

    Raises:
        ArchiveInUseError: Another run holds it.
        OSError: The folder above cannot be written.
    """
    path = _path(archive)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, archive)
    except ArchiveInUseError:
        raise
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make an archive at {archive}: {error.strerror}. Choose a folder that is writable."
        ) from error
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with suppress(OSError):  # a full disk: the lock holds without a name, and the capture will say more
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({**owner, "join": join}).encode(), 0)
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def read_owner(archive: Path) -> Owner | None:
    """Return what the lock of `archive` says, whether or not its owner lives; None if it says nothing."""
    try:
        with _path(archive).open("rb") as file:
            values = json.loads(file.read(_MAX_BYTES))
        join = values["join"]
        return Owner(
            host=str(values["host"]),
            pid=int(values["pid"]),
            since=str(values["since"]),
            join=dict(join) if join else None,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _path(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.lock")


def _acquire(path: Path, archive: Path) -> int:
    """Return a descriptor of the lock file, locked; the file may be replaced while we wait for none."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, archive)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, archive: Path) -> None:
    wait = "Wait for it, stop it, or start both so that they share the work (--join)."
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArchiveInUseError(archive, read_owner(archive), wait) from None
    except OSError:  # a file system without locks
        owner = read_owner(archive)
        if owner is None or owner.pid == os.getpid():
            return
        if owner.host != socket.gethostname():
            raise ArchiveInUseError(
                archive, owner, f"If it is dead, remove {_path(archive)}: this file system cannot tell."
            ) from None
        if is_alive(owner.pid):
            raise ArchiveInUseError(archive, owner, wait) from None
