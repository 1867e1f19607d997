"""One open archive per process and path, so that tasks can be given paths and nothing else.

A task opens the archive where it runs: that costs no traffic, and what a reader has learned (indexes of shards,
which chunks were compared) serves every later task of the process. An archive that went on growing, or was sealed,
is opened anew.
"""

from pathlib import Path
from typing import Any

import distributed

from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER
from residua.store.read.archive import Archive
from residua.store.read.mapped import OPEN_SHARDS

_State = tuple[int, ...]
_MAPPED_SHARE = 8

# No lock, which a fork could leave closed: of two threads that open the same archive at once, one wins.
_OPEN: dict[str, tuple[_State, Archive]] = {}


def address(archive: Archive) -> str:
    """Return what `opened` takes in another process: the archive's own path, absolute."""
    return str(archive.path.absolute())


def opened(path: str) -> Archive:
    """Return the archive at `path`, opened once a process.

    In a Dask worker, chunks are decoded by the task's own thread, since every core has a worker; and files stay mapped
    up to an eighth of the worker's memory limit, since Dask counts them.

    Its sites and rows may be read from several threads at once; its example table belongs to one thread.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: The metadata is not what an honest writer makes.
    """
    state = _state(path)
    known = _OPEN.get(path)
    if known is None or known[0] != state:
        known = state, _open(path)
        _OPEN[path] = known
    return known[1]


def _open(path: str) -> Archive:
    dask: Any = distributed  # whose functions have no types
    try:
        worker = dask.get_worker()
    except ValueError:
        return Archive(path)
    if worker.memory_manager.memory_limit is not None:
        OPEN_SHARDS.limit(worker.memory_manager.memory_limit // _MAPPED_SHARE)
    return Archive(path, threads=1)


def _state(path: str) -> _State:
    """Return what changes when the archive does: its metadata is replaced when it is sealed, commits are added."""
    found: list[int] = []
    for name in (ROOT, FOLDER):
        try:
            status = (Path(path) / name).stat()
        except FileNotFoundError:
            continue  # opening it will say what is missing
        found += (status.st_ino, status.st_mtime_ns, status.st_size)
    return tuple(found)
