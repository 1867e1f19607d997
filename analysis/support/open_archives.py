"""One open archive per process and path, so that jobs only need a path.

A job opens the archive where it runs, so nothing is sent. Later jobs of the process use what the reader has cached:
indexes of shards, and which chunks were verified. An archive that has grown or was sealed is opened again.
"""

from pathlib import Path
from typing import Any

import distributed

from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER
from residua.store.read.archive import Archive
from residua.store.read.mapped import OPEN_SHARDS

_State = tuple[int, ...]
_MAPPED_DIVISOR = 8

# No lock: a fork could leave it locked. If two threads open the same archive at once, one of the objects is kept.
_OPEN: dict[str, tuple[_State, Archive]] = {}


def address(archive: Archive) -> str:
    """Return the absolute path of an archive, which `opened` takes in another process."""
    return str(archive.path.absolute())


def opened(path: str) -> Archive:
    """Return the archive at `path`, opened once per process.

    In a Dask worker the job's own thread decodes chunks, since every core has a worker. At most an eighth of the
    worker's memory limit stays mapped, since Dask counts mapped files as memory.

    Several threads may read its sites and rows at once, but only one thread its example table.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: The metadata is malformed or hostile.
    """
    state = _state(path)
    known = _OPEN.get(path)
    if known is None or known[0] != state:
        known = state, _open(path)
        _OPEN[path] = known
    return known[1]


def _open(path: str) -> Archive:
    dask: Any = distributed  # its functions have no types
    try:
        worker = dask.get_worker()
    except ValueError:
        return Archive(path)
    if worker.memory_manager.memory_limit is not None:
        OPEN_SHARDS.limit(worker.memory_manager.memory_limit // _MAPPED_DIVISOR)
    return Archive(path, threads=1)


def _state(path: str) -> _State:
    """Return numbers that change with the archive: sealing replaces its metadata, and commits are added."""
    found: list[int] = []
    for name in (ROOT, FOLDER):
        try:
            status = (Path(path) / name).stat()
        except FileNotFoundError:
            continue  # `Archive` will report what is missing
        found += (status.st_ino, status.st_mtime_ns, status.st_size)
    return tuple(found)
