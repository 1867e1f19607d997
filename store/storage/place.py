"""A trial of the place where results will be written, on small files, before anything runs."""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from residua.store.base.errors import PlanError
from residua.store.storage.address import is_remote, scheme_of, shown
from residua.store.storage.destination import TRIAL, BucketFolder, Destination, DiskFolder
from residua.store.storage.files import make_folders, publish, sweep_next_to, write_file
from residua.store.storage.lease import LEASE
from residua.store.storage.lock import naming_archive, try_flock
from residua.store.storage.objects import ObjectFolder

_ROOT = "zarr.json"
WRITABLE = ("s3", "gs", "az")
_MOST_LISTED = 16


class ResultPlace(NamedTuple):
    """Where results, such as an archive, are written.

    Attributes:
        out: The folder, here or in a bucket; or the file. Where a link was given, what it leads to.
        notes: What the user should know about the place, one sentence each.
    """

    out: Destination
    notes: tuple[str, ...]


def try_place(destination: Path, *, is_file: bool = False, locks: bool = False, links: bool = False) -> ResultPlace:
    """Write and rename a small file where results will be written, durably; then remove it.

    A folder that exists is tried inside. What is written next to it, such as a lock, is tried there.

    Args:
        destination: File or folder that will be written; where there are locks, its parent is made and stays.
        is_file: Whether it is a file; else a folder.
        locks: Whether a lock next to it keeps other runs away.
        links: Whether hard links are needed, as for the commit records of an archive.

    Returns:
        The place. A link is followed, so that lock and results do not depend on the name that was given.

    Raises:
        PlanError: `destination` is the address of a bucket or server, or a link that leads nowhere.
        OSError: The place cannot be written, is full, or has no links; or a file is where a folder should be, or the
            reverse. The message says what to do.
    """
    destination = _followed(destination)
    _refuse_other_kind(destination, is_file=is_file)
    missing = [folder for folder in destination.parents if not folder.exists()]
    with naming_archive(destination):
        make_folders(destination.parent)
    is_inside = destination.is_dir()
    has_locks = True
    if locks or not is_inside:
        with naming_archive(destination):
            sweep_next_to(destination)
        has_locks = _try_folder(destination.parent, destination, links=links)
    if is_inside:
        _try_folder(destination, destination, links=links)
    if not locks:  # with locks other processes may be at work there
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
    if has_locks or not locks:
        return ResultPlace(DiskFolder(destination), ())
    note = f"the file system of {destination} has no file locks: do not start another run there before this one ends"
    return ResultPlace(DiskFolder(destination), (note,))


def try_archive_place(
    out: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, *, locks: bool = True
) -> ResultPlace:
    """Try the place where an archive will be written, as `try_result_place` does.

    Args:
        out: Path or address of the archive.
        storage_options: For an address, as for `residua.open`.
        locks: Whether a lock next to a folder keeps other runs away.

    Raises:
        FileExistsError: Something that is no archive lies at that address.
        As `try_result_place` otherwise.
    """
    place = try_result_place(out, storage_options, locks=locks, links=True)
    if isinstance(place.out, BucketFolder):
        _refuse_other_objects(place.out.objects)
    return place


def try_result_place(
    out: str | PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    locks: bool = False,
    links: bool = False,
) -> ResultPlace:
    """Try the place where results will be written: a folder as `try_place` does, a bucket with a small object.

    Args:
        out: Path or address of the folder.
        storage_options: For an address, as for `residua.open`.
        locks: Whether a lock next to a folder keeps other runs away.
        links: Whether a folder needs hard links.

    Raises:
        PlanError: Nothing can be written at such an address.
        StorageError: The bucket is not there, or may not be written, read or listed.
        OSError: As for `try_place`.
    """
    if not is_remote(out):
        return try_place(Path(out), locks=locks, links=links)
    folder = bucket_at(out, storage_options)
    if _is_kept_apart(folder.objects):
        return ResultPlace(folder, ())
    note = f"{folder} has no objects that are written only once: do not start another run there before this one ends"
    return ResultPlace(folder, (note,))


@contextmanager
def result_folder(
    out: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, *, n_bytes: int = 0
) -> Iterator[Path]:
    """Give a folder for results, after a trial whether they can be written there.

    For a path, it is the folder itself. For the address of a bucket, it is a temporary one, whose files go up at the
    end of the ``with`` block, over what is there; after an error, none does.

    Args:
        out: Path or address.
        storage_options: For an address, as for `residua.open`.
        n_bytes: Bytes that the files take at most, as far as that is known. The disk of a temporary folder needs room
            for them.

    Raises:
        PlanError: Nothing can be written at such an address.
        StorageError: The bucket is not there, or may not be written or read.
        OSError: As for `try_place`; or the files do not fit into the temporary folder.
    """
    folder = try_result_place(out, storage_options).out
    if isinstance(folder, BucketFolder):
        require_room(folder.path, n_bytes, f"the files for {folder}")
    yield folder.path
    if isinstance(folder, DiskFolder):
        return
    folder.upload(sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()))


@contextmanager
def saved_to(folder: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Give a folder for files that are ready to be written, without a trial of a path; see `result_folder`."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with result_folder(folder, storage_options) as local:
        yield local


@contextmanager
def result_file(
    out: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, *, n_bytes: int = 0
) -> Iterator[Path]:
    """Give a file for results, here or for the address of an object; see `result_folder`."""
    if not is_remote(out):
        yield try_place(Path(out), is_file=True).out.path
        return
    _refuse_others(out)
    parent, _, name = fspath(out).rpartition("/")
    with result_folder(parent, storage_options, n_bytes=n_bytes) as folder:
        yield folder / name


def require_room(folder: Path, n_bytes: int, what: str) -> None:
    """Raise OSError if a folder for temporary files has no room for so many bytes; `what` says of what they are."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} lie in {tempfile.gettempdir()} for a while, take up to {n_bytes:,} bytes, and {free:,} are free "
            "there: free some space, or set TMPDIR to a folder on a larger disk",
        )


def is_taken(out: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> bool:
    """Return whether there is a file or folder at a path, or an object at or below an address.

    Raises:
        StorageError: The address cannot be listed.
    """
    if not is_remote(out):
        return Path(out).exists()
    parent, _, name = fspath(out).rstrip("/").rpartition("/")
    return any(ObjectFolder(fspath(out), storage_options).list()) or (
        bool(urlsplit(parent).netloc) and ObjectFolder(parent, storage_options).size(name) is not None
    )


def bucket_at(out: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> BucketFolder:
    """Return the folder in a bucket that an address names.

    Raises:
        PlanError: Nothing is written there file by file.
        StorageError: The address or an option is not understood.
    """
    _refuse_others(out)
    return BucketFolder(fspath(out), storage_options)


def _refuse_others(out: str | PathLike[str]) -> None:
    """Raise PlanError unless an address is in a bucket, where files are written one by one."""
    if (scheme := scheme_of(out)) not in WRITABLE:
        later = (
            "send an archive there with residua push" if scheme == "hf" else "copy it to the server with its own tools"
        )
        raise PlanError(
            f"{shown(out)} is an address ({scheme}) that is read from, and not written to: write into a bucket "
            f"(s3://, gs://, az://) or a folder; when it is finished, {later}"
        )


def _refuse_other_objects(folder: ObjectFolder) -> None:
    """Raise FileExistsError if something that is no archive is there."""
    names = [entry.name for entry in islice(folder.list(), _MOST_LISTED)]
    others = [name for name in names if not name.startswith(TRIAL)]
    if others and folder.size(LEASE) is None and folder.size(_ROOT) is None:
        raise FileExistsError(
            errno.EEXIST,
            f"{folder} has objects already, {others[0]} for example, and no archive: choose another place, or remove "
            "them",
        )


def _is_kept_apart(folder: ObjectFolder) -> bool:
    """Write, read and remove a small object; return whether the service keeps two runs from writing the same one."""
    trial, content = f"{TRIAL}{secrets.token_hex(4)}", secrets.token_bytes(16)
    try:
        folder.create(trial, content)
        is_replaced = _is_replaced(folder, trial) and _is_replaced(folder, trial)  # unless another run swept it
    except OSError:
        with suppress(OSError):  # what went wrong first says more
            folder.delete([trial])
        raise
    folder.delete([trial])
    return not is_replaced


def _is_replaced(folder: ObjectFolder, name: str) -> bool:
    """Return whether the service writes over an object although it was asked not to."""
    try:
        folder.create(name, secrets.token_bytes(16))
    except FileExistsError:
        return False
    return True


def _followed(destination: Path) -> Path:
    """Return the place, or what it is a link to; raises PlanError for an address, and a link that leads nowhere."""
    if is_remote(destination):
        raise PlanError(
            f"{destination} is an address ({scheme_of(destination)}), and these results are written to folders only: "
            "write to a local folder, and copy it when it is finished"
        )
    if destination.is_symlink():
        if not destination.exists():
            raise PlanError(
                f"{destination} is a link to {destination.readlink()}, which does not exist: make that folder, or "
                "choose another place"
            )
        return destination.resolve()
    return destination


def _refuse_other_kind(destination: Path, *, is_file: bool) -> None:
    if is_file and destination.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{destination} is a folder, and a file is to be written: name a file")
    if not is_file and destination.exists() and not destination.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{destination} is a file, and a folder is to be written: choose another place"
        )


def _try_folder(folder: Path, destination: Path, *, links: bool) -> bool:
    """Write a small file in `folder`; return whether a lock on it keeps others away. Errors name `destination`."""
    trial = folder / f".{destination.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with naming_archive(destination):
        trial.touch(exist_ok=False)
    try:
        write_file(trial, [b"a trial"])
        if links:
            trial.unlink(missing_ok=True)
            publish(trial, b"a trial")
        return _has_locks(trial)
    except FileNotFoundError:  # another worker, which cleans up, took it for one that was left
        return True
    except OSError as error:
        raise OSError(error.errno, (error.strerror or str(error)).replace(str(trial), str(destination))) from error
    finally:
        with suppress(FileNotFoundError):
            trial.unlink()


def _has_locks(path: Path) -> bool:
    """Say whether a file that is locked cannot be locked again."""
    first, second = os.open(path, os.O_RDWR | os.O_CLOEXEC), os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return bool(try_flock(first)) and try_flock(second) is False
    finally:
        os.close(first)
        os.close(second)
