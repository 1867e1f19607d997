"""Durable files: what `write_file` and `publish` wrote survives a power cut and is never seen half-written.

Bytes go to a temporary file next to the target, are flushed to the disk, and only then get the real name; after that
the folder is flushed as well. Temporary files are removed on any error. Those of a killed writer keep their name,
`.NAME.PID-HEX.tmp`, until `sweep` removes them: a live writer holds a lock on its temporary file, and the kernel drops
the lock together with the process. Every error names the file and says what to do.
"""

import errno
import fcntl
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np

from residua.store.base.errors import ResiduaError
from residua.store.storage.crc import Buffer
from residua.store.storage.direct import LEAST_BYTES, set_direct, write_all
from residua.store.storage.lock import is_alive, try_flock

_TEMPORARY = re.compile(r"^\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.tmp$")
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space or raise the quota",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EACCES: "this user may not write there: change the permissions or choose another place",
    errno.EPERM: "this user may not write there: change the permissions or choose another place",
    errno.EFBIG: "the file is larger than the file system or the user's limit allows: use smaller shards",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENOTDIR: "part of the path is a file, not a folder: choose another place",
    errno.EISDIR: "a folder of that name is in the way: remove it",
    errno.EIO: "the disk reported a fault: check it, and choose another place",
}
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_NO_LINKS = "this file system has no hard links, which commits need: choose another place"


class _NoLinksError(OSError):
    """The file system has no hard links; its error number has other causes elsewhere."""


def write_file(path: Path, buffers: Iterable[Buffer], *, direct_bytes: int | None = LEAST_BYTES) -> int:
    """Write `buffers`, one after the other, as the file `path`: durable and complete, or not at all.

    Missing folders are created. An existing file is replaced in one step.

    Args:
        path: The file.
        buffers: Bytes or C-contiguous numpy arrays; large ones are not copied.
        direct_bytes: Files of this size or more bypass the page cache; None: no file does.

    Returns:
        The bytes written.

    Raises:
        OSError: The file could not be written; `errno` is kept, and no temporary file stays.
    """
    return _write(path, buffers, os.replace, direct_bytes)


def publish(path: Path, data: bytes) -> None:
    """Create the file `path` with `data`, durably, and never over an existing one.

    Of several writers that publish the same name, exactly one succeeds.

    Raises:
        FileExistsError: `path` exists; it stays as it is.
        OSError: The file could not be written; `errno` is kept, and no temporary file stays.
    """
    _write(path, [data], _link, LEAST_BYTES)


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that dead writers left in `folder` and below, and return their paths.

    A temporary file stays while its writer holds the lock on it. Where the file system has no locks, it stays while a
    process with that number runs on this machine.

    Raises:
        OSError: A temporary file could not be removed.
    """
    removed = []
    for root, _, names in os.walk(folder):
        for name in names:
            match = _TEMPORARY.match(name)
            path = Path(root) / name
            if match and not _is_in_use(path, int(match["pid"])):
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def sweep_next_to(destination: Path) -> None:
    """Remove the temporary files for `destination` that dead processes of this machine left in its parent folder."""
    for path in destination.parent.iterdir():
        match = _TEMPORARY.match(path.name)
        if match and path.name.lstrip(".").startswith(f"{destination.name}.") and not is_alive(int(match["pid"])):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that a rename or a new file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, buffers: Iterable[Buffer], place: Callable[[Path, Path], None], direct_bytes: int | None) -> int:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        make_folders(path.parent)
        try:
            n_bytes = _write_durably(temporary, buffers, direct_bytes)
            place(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        sync_folder(path.parent)
    except (FileExistsError, ResiduaError):  # the buffers may come from somewhere that fails
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "see the cause, and try again")
        if isinstance(error, _NoLinksError):
            advice = _NO_LINKS
        raise OSError(error.errno, f"cannot write {path} ({error.strerror}): {advice}") from error
    return n_bytes


def make_folders(folder: Path) -> None:
    """Create `folder` and its missing parents; the new names are durable."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, f"{new} is a file") from None
        sync_folder(new.parent)


def _write_durably(path: Path, buffers: Iterable[Buffer], direct_bytes: int | None) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try_flock(descriptor)
        views = map(bytes_of, buffers)
        head: list[memoryview] = []
        while direct_bytes and direct_bytes > 0 and (view := next(views, None)) is not None:
            head.append(view)
            direct_bytes -= view.nbytes
        is_direct = direct_bytes is not None and direct_bytes <= 0 and set_direct(descriptor)
        n_bytes = write_all(descriptor, chain(head, views), is_direct=is_direct)
        _sync_data(descriptor)
    finally:
        os.close(descriptor)
    return n_bytes


def _sync_data(descriptor: int) -> None:
    """Flush a file's bytes to the disk; macOS has no fdatasync, and its fsync stops at the disk's own cache."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def bytes_of(buffer: Buffer) -> memoryview:
    """Return the bytes of a buffer, without a copy."""
    if isinstance(buffer, np.ndarray):
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, f"{path} exists already and is not overwritten") from None
    except OSError as error:
        if error.errno in _WITHOUT_LINKS:
            raise _NoLinksError(error.errno, error.strerror) from error
        raise


def _is_in_use(path: Path, pid: int) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        is_free = try_flock(descriptor)
    finally:
        os.close(descriptor)
    return is_alive(pid) if is_free is None else not is_free
