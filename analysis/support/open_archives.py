"""One open archive per process and place, so that jobs only need the place.

A job opens the archive where it runs, so nothing is sent. Later jobs of the process use what the reader has cached:
indexes of shards, and which chunks were verified. An archive in a folder that has grown or was sealed is opened again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import distributed

from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER
from residua.store.read.archive import Archive
from residua.store.read.joined import JoinedArchive
from residua.store.read.mapped import OPEN_SHARDS
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.stacks import open_archive
from residua.store.storage.address import is_remote

_State = tuple[int, ...]
_MAPPED_DIVISOR = 8


@dataclass(frozen=True)
class Location:
    """Where an archive is, for a job in another process.

    Attributes:
        place: Its absolute path, or its address.
        options: What opening an address takes besides, credentials for example; shown nowhere.
        others: Archives of the same rows that are read with it.
    """

    place: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    others: "tuple[Location, ...]" = ()

    def __str__(self) -> str:
        return self.place


# No lock: a fork could leave it locked. If two threads open the same archive at once, one of the objects is kept.
_OPEN: dict[Location, tuple[_State, Archive]] = {}


def location(archive: Archive) -> Location:
    """Return where an archive is, for `opened` in another process."""
    if isinstance(archive, JoinedArchive):
        first, *others = map(location, archive.archives)
        return replace(first, others=tuple(others))
    if isinstance(archive, RemoteArchive):
        return Location(archive.place, archive.options)
    return Location(str(archive.path.absolute()))


def opened(where: Location) -> Archive:
    """Return the archive at a location, opened once per process.

    In a Dask worker the job's own thread decodes chunks, since every core has a worker. At most an eighth of the
    worker's memory limit stays mapped, since Dask counts mapped files as memory.

    Several threads may read its sites and rows at once, but only one thread its example table.

    Raises:
        FileNotFoundError: There is no archive at that place.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: The metadata is malformed or hostile.
        StorageError: An address cannot be read.
    """
    state = tuple(number for one in (where, *where.others) for number in _state(one.place))
    known = _OPEN.get(where)
    if known is None or known[0] != state:
        known = state, _open(where)
        _OPEN[where] = known
    return known[1]


def _open(where: Location) -> Archive:
    dask: Any = distributed  # its functions have no types
    settings: dict[str, Any] = {}
    try:
        worker = dask.get_worker()
    except ValueError:
        return _of(where, settings)
    if worker.memory_manager.memory_limit is not None:
        OPEN_SHARDS.limit(worker.memory_manager.memory_limit // _MAPPED_DIVISOR)
    return _of(where, {"threads": 1})


def _of(where: Location, settings: Mapping[str, Any]) -> Archive:
    opened_ones = [open_archive(one.place, **settings, **one.options) for one in (where, *where.others)]
    return opened_ones[0] if len(opened_ones) == 1 else JoinedArchive(opened_ones)


def _state(path: str) -> _State:
    """Return numbers that change with the archive: sealing replaces its metadata, and commits are added."""
    found: list[int] = []
    if is_remote(path):
        return ()
    for name in (ROOT, FOLDER):
        try:
            status = (Path(path) / name).stat()
        except FileNotFoundError:
            continue  # `Archive` will report what is missing
        found += (status.st_ino, status.st_mtime_ns, status.st_size)
    return tuple(found)
