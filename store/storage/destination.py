"""Where an archive is written: a folder of this machine, or a folder in a bucket. Both have the same methods.

    write      one file, complete or not at all
    keep       one small file, and its local copy
    create     one small file, never over another
    names      the files of a folder
    n_bytes    the size of one file
    remove     files
    inside     a folder in it

`path` is a local folder in which small files are read: metadata, examples, tokenizer, LM head and commit records. Of a
`DiskFolder` it is the archive itself. Of a `BucketFolder` it is a temporary folder with copies, and `upload` sends
files that were made or changed there; it goes with the process, and those of processes that were killed go when the
next one begins.

Rows never go to that folder. Shards go up from memory: a file of up to `PART_BYTES` in one request, a longer one in
parts, several of which are under way at once. What was sent is let go when the server has it. `memory_bytes` limits the
memory for that.
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError, StorageError
from residua.store.base.naming import named
from residua.store.storage.crc import Buffer
from residua.store.storage.files import bytes_of, publish, sweep, sync_folder, write_file
from residua.store.storage.lease import LEASE, USUAL_TIMES, Lease, LeaseTimes, LeaseWatch, leased
from residua.store.storage.lock import locked, try_flock
from residua.store.storage.objects import ObjectFolder, in_parallel

TRIAL = ".residua-trial/"
"""How the names of objects begin that only tried the place."""

PART_BYTES = 8 * 2**20
"""Bytes of a request that is part of a file; a shorter file takes one request."""

MEMORY_BYTES = 128 * 2**20
"""Most bytes of uploads under way, of all threads."""

THREAD_BYTES = 2 * PART_BYTES
"""Bytes that one thread needs: a part that fills, and one that is under way."""

_LEAST_THREADS = 4  # most of the time they wait for the server
_WRITE_TRIES = 3
_MOST_PARTS = 8
_FETCH_BYTES = 2**38
_PREFIX = "residua-writing-"


class DiskFolder:
    """A folder of this machine that an archive is written to.

    Args:
        path: The folder; it need not exist.

    Attributes:
        path: As given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    def writer_threads(self, asked: int) -> int:
        """Return how many threads should write at once: as many as were asked for."""
        return asked

    def write(self, name: str, buffers: Iterable[Buffer]) -> int:
        """Write a file; see `residua.store.storage.files.write_file`."""
        return write_file(self.path / name, buffers)

    def keep(self, name: str, data: bytes) -> None:
        """Write a file that is read in `path`, over what is there."""
        write_file(self.path / name, [data])

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless there is one; return False if the same is there already.

        Raises:
            FileExistsError: There is one with other content; it stays as it is.
            OSError: It could not be written.
        """
        try:
            publish(self.path / name, data)
        except FileExistsError:
            if (self.path / name).read_bytes() != data:
                raise
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; none if there is no such folder."""
        path = self.path / folder
        return [entry.name for entry in os.scandir(path) if entry.is_file()] if path.is_dir() else []

    def n_bytes(self, name: str) -> int | None:
        """Return the size of a file; None if there is none."""
        try:
            return os.stat(self.path / name).st_size  # noqa: PTH116  # pathlib takes twice the time, and there may be millions
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> Callable[[str], int | None]:
        """Return what says the size of any file, for many questions."""
        return self.n_bytes

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, durably; those that are not there are no error."""
        paths = [self.path / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            sync_folder(folder)

    def inside(self, name: str) -> "DiskFolder":
        """Return a folder in this one."""
        return DiskFolder(self.path / name)

    def is_empty(self) -> bool:
        """Return whether there is no file, or no folder."""
        return not self.path.exists() or not any(self.path.iterdir())

    def remove_all(self) -> None:
        """Remove the folder and all that is in it, as far as this is allowed."""
        shutil.rmtree(self.path, ignore_errors=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Do nothing: the files are here."""

    def upload(self, names: Iterable[str], *, if_changed: bool = False) -> None:
        """Do nothing: the files are where they belong."""

    def sweep(self) -> None:
        """Remove what writers that are dead left."""
        sweep(self.path)

    def locked(self, *, join: Mapping[str, Json] | None = None) -> AbstractContextManager[None]:
        """Keep other runs away; see `residua.store.storage.lock.locked`."""
        return locked(self.path, join=join)

    @property
    def lease(self) -> str:
        """What the lease of the run that holds a bucket is known by; folders have locks, and no leases."""
        return ""

    def following(self, _lease: str) -> AbstractContextManager[None]:
        """Do nothing: the lock of the run that this process works for ends with it."""
        return nullcontext()


class BucketFolder:
    """A folder in a bucket that an archive is written to.

    Args:
        address: Where it is.
        options: As for `ObjectFolder`.
        lease_times: When a lease on it expires and is renewed.

    Attributes:
        objects: The folder in the bucket.
        path: The local folder with copies of small files.
        memory_bytes: Bytes that uploads may take, of all threads together; at least `THREAD_BYTES`.

    Raises:
        StorageError: The address or an option is not understood.
    """

    def __init__(
        self, address: str, options: Mapping[str, Any] | None = None, *, lease_times: LeaseTimes = USUAL_TIMES
    ) -> None:
        self.objects = ObjectFolder(address, options)
        self._lease_times = lease_times
        self.memory_bytes = MEMORY_BYTES
        self._n_threads = 1
        self._there: dict[str, bytes] = {}  # SHA-256 of the files that were sent or fetched
        self.path = _temporary_folder(self) / "files"
        self.path.mkdir()
        self._lease: Lease | LeaseWatch | None = None

    def __str__(self) -> str:
        return str(self.objects)

    @property
    def name(self) -> str:
        """Last part of the address."""
        return PurePosixPath(str(self)).name

    def use_memory(self, n_bytes: int, largest_file: int) -> None:
        """Use no more memory for uploads than this.

        Args:
            n_bytes: Bytes that are left beside the host buffers.
            largest_file: Bytes of the largest file.

        Raises:
            PlanError: They are too few for one upload.
        """
        needed = min(THREAD_BYTES, largest_file)
        if n_bytes < needed:
            raise PlanError(
                f"{named('host_memory')} leaves {n_bytes:,} bytes beside the buffers, and uploads to {self} need "
                f"{needed:,}: raise it by {needed - n_bytes:,}, or lower {named('rows_per_shard')}"
            )
        self.memory_bytes = min(MEMORY_BYTES, n_bytes)

    def writer_threads(self, asked: int) -> int:
        """Return how many threads should write at once, and share the memory among them.

        Args:
            asked: Threads that a disk would have.
        """
        self._n_threads = max(1, min(max(asked, _LEAST_THREADS), self.memory_bytes // THREAD_BYTES))
        return self._n_threads

    def write(self, name: str, buffers: Iterable[Buffer], *, are_kept: bool = False) -> int:
        """Write an object, over what is there: completely, or not at all.

        Args:
            name: Its path in the folder.
            buffers: Bytes or C-contiguous numpy arrays, which are taken again from the beginning if sending them fails.
            are_kept: Whether a buffer's memory stays as it is when the next one is taken, so that none is copied.

        Returns:
            The bytes written.

        Raises:
            StorageError: It could not be written, or another run has taken over.
        """
        self._check_lease()
        for tries_left in reversed(range(_WRITE_TRIES)):
            try:
                return self._write(name, buffers, are_kept=are_kept)
            except (StorageError, FileNotFoundError, FileExistsError) as error:  # of an upload in parts, anything
                if not tries_left:
                    raise StorageError(str(error)) from error
        raise AssertionError

    def _write(self, name: str, buffers: Iterable[Buffer], *, are_kept: bool) -> int:
        sizes: list[int] = []
        parts = _counted(buffers, sizes) if are_kept else _parts(buffers, sizes)
        first: deque[memoryview] = deque()
        for part in parts:
            first.append(part)
            del part  # only `first` holds it, until it is sent
            if sum(sizes) > PART_BYTES:
                n_parts = max(1, min(_MOST_PARTS, self.memory_bytes // self._n_threads // PART_BYTES - 1))
                self.objects.write_parts(name, chain(_taken(first), parts), part_bytes=PART_BYTES, n_parts=n_parts)
                break
        else:
            self.objects.write(name, first)
        return sum(sizes)

    def keep(self, name: str, data: bytes) -> None:
        """Write an object, over what is there, and then its local copy: who finds that may rely on the object.

        Raises:
            StorageError: It could not be written, or another run has taken over.
        """
        self.write(name, [data], are_kept=True)
        write_file(self.path / name, [data])

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object unless there is one; return False if the same is there already.

        Raises:
            FileExistsError: There is one with other content; it stays as it is.
            StorageError: It could not be written, or another run has taken over.
        """
        self._check_lease()
        is_new = self.objects.create(name, data)
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return is_new

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder; none if there is no such folder."""
        found = (PurePosixPath(entry.name) for entry in self.objects.list(folder))
        return [path.name for path in found if str(path.parent) == folder]

    def n_bytes(self, name: str) -> int | None:
        """Return the size of an object; None if there is none."""
        return self.objects.size(name)

    def sizes(self) -> Callable[[str], int | None]:
        """Return what says the size of any object, for many questions: all are listed once.

        A list may lag behind: ask `n_bytes` before you rely on a size that surprises.
        """
        return {entry.name: entry.n_bytes for entry in self.objects.list()}.get

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects and their local copies; those that are not there are no error."""
        self._check_lease()
        gone = list(names)
        self.objects.delete(gone)
        for name in gone:
            self._there.pop(name, None)
            (self.path / name).unlink(missing_ok=True)

    def inside(self, name: str) -> "BucketFolder":
        """Return a folder in this one, with a local folder of its own, that is written as long as this one may be."""
        folder = BucketFolder(f"{self.objects.address}/{name}", self.objects.options)
        folder._lease = self._lease
        return folder

    def is_empty(self) -> bool:
        """Return whether there is no object but those of a run that has just begun."""
        return all(entry.name == LEASE or entry.name.startswith(TRIAL) for entry in self.objects.list())

    def remove_all(self) -> None:
        """Remove all objects of the folder but the lease, as far as this is allowed."""
        self._check_lease()
        names = [entry.name for entry in self.objects.list() if entry.name != LEASE]
        self.objects.delete(sorted(names, key=lambda name: "/" in name))  # what makes it an archive, first

    def fetch(self, names: Iterable[str]) -> None:
        """Bring objects to the local folder, unless they are there.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be read.
        """

        def bring(name: str) -> None:
            path = self.path / name
            data = self.objects.read(name, _FETCH_BYTES)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._there[name] = hashlib.sha256(data).digest()

        in_parallel(bring, [name for name in names if not (self.path / name).exists()])

    def upload(self, names: Sequence[str], *, if_changed: bool = False) -> None:
        """Send files of the local folder, over what is there.

        Args:
            names: Their paths in the folder.
            if_changed: Whether files stay behind that are as this object sent or fetched them last: for files that no
                other process of the run writes.

        Raises:
            StorageError: One could not be written, or another run has taken over.
        """
        self._check_lease()

        def send(name: str) -> None:
            data = (self.path / name).read_bytes()
            digest = hashlib.sha256(data).digest()
            if not (if_changed and self._there.get(name) == digest):
                self.objects.write(name, self.path / name)
                self._there[name] = digest

        in_parallel(send, names)

    def sweep(self) -> None:
        """Remove what trials of writers that are dead left; an object appears whole, so there are no other ones."""
        self.objects.delete([entry.name for entry in self.objects.list(TRIAL.rstrip("/"))])

    @contextmanager
    def locked(self, *, join: Mapping[str, Json] | None = None) -> Iterator[None]:
        """Keep other runs away with a lease; see `residua.store.storage.lease`.

        Raises:
            ArchiveInUseError: Another run holds it.
            StorageError: The bucket cannot be read or written.
        """
        with leased(self.objects, join=join, times=self._lease_times) as self._lease:
            try:
                yield
            finally:
                self._lease = None

    @property
    def lease(self) -> str:
        """What the lease that this process holds is known by; empty if it holds none."""
        return self._lease.token if isinstance(self._lease, Lease) else ""

    @contextmanager
    def following(self, lease: str) -> Iterator[None]:
        """Write only as long as another process, for whose run this one works, holds its lease.

        Args:
            lease: The other's `lease`.
        """
        self._lease = LeaseWatch(self.objects, lease, self._lease_times)
        try:
            yield
        finally:
            self._lease = None

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


Destination: TypeAlias = DiskFolder | BucketFolder


def destination_of(place: Path | Destination) -> Destination:
    """Return the destination that a path is; a destination is returned as it is."""
    return DiskFolder(place) if isinstance(place, Path) else place


def _taken(parts: deque[memoryview]) -> Iterator[memoryview]:
    """Yield parts, and let go of each when it is taken."""
    while parts:
        yield parts.popleft()


def _counted(buffers: Iterable[Buffer], sizes: list[int]) -> Iterator[memoryview]:
    """Yield the bytes of buffers, and add the size of each to `sizes`."""
    for buffer in buffers:
        part = bytes_of(buffer)
        sizes.append(part.nbytes)
        yield part


def _parts(buffers: Iterable[Buffer], sizes: list[int]) -> Iterator[memoryview]:
    """Yield the bytes of buffers in parts of `PART_BYTES`, at least one, each in memory of its own.

    A buffer's memory may change when the next one is taken, and a part is sent later. The size of each is added to
    `sizes`.
    """
    part, filled = np.empty(PART_BYTES, np.uint8), 0
    for buffer in buffers:
        rest = np.frombuffer(bytes_of(buffer), np.uint8)
        while rest.size:
            taken = min(rest.size, PART_BYTES - filled)
            part[filled : filled + taken] = rest[:taken]
            filled, rest = filled + taken, rest[taken:]
            if filled == PART_BYTES:
                sizes.append(filled)
                yield part.data
                part, filled = np.empty(PART_BYTES, np.uint8), 0
    if filled or not sizes:
        sizes.append(filled)
        yield part[:filled].data


def _temporary_folder(owner: object) -> Path:
    """Return a new folder that goes with `owner`, and remove those of processes that are gone.

    Its flock says that its process lives.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            if left.stat().st_uid == os.getuid():
                _remove_unless_locked(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with suppress(FileNotFoundError):  # another process may take it for one that was left, until it is locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if try_flock(descriptor) is not False and folder.exists():
                weakref.finalize(owner, _remove, folder, descriptor, os.getpid())
                return folder
            os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if try_flock(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove(folder: Path, descriptor: int, pid: int) -> None:
    if os.getpid() == pid:  # and not a process that was forked
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
