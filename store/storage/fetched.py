"""Results at an address, such as a lens or a probe, as files of this machine."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

from residua.store.base.errors import StorageError
from residua.store.storage.address import is_remote, shown
from residua.store.storage.mirror import naming
from residua.store.storage.objects import ObjectFolder

MOST_BYTES = 2**36
"""Most bytes of one file that is fetched, and of all."""


@contextmanager
def fetched(place: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Give a file or folder of results on this machine: for the address of one in a bucket, a copy of it.

    The copy goes with the ``with`` block. Errors inside name the address.

    Args:
        place: Path or address.
        storage_options: For an address, as for `residua.open`.

    Raises:
        FileNotFoundError: There is nothing at that address.
        StorageError: It cannot be read.
    """
    if not is_remote(place):
        yield Path(place)
        return
    address = fspath(place).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="residua-") as made:
        local = Path(made) / PurePosixPath(address).name
        _fetch(address, local, storage_options)
        with naming(local, shown(address)):
            yield local


def _fetch(address: str, local: Path, storage_options: Mapping[str, Any] | None) -> None:
    folder = ObjectFolder(address, storage_options)
    names = {entry.name: entry.n_bytes for entry in folder.list()}
    if sum(names.values()) > MOST_BYTES or any(".." in PurePosixPath(name).parts for name in names):
        raise StorageError(f"{folder} holds more than results, or names that lead out of it: name the folder of them")
    for name in names:
        path = local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(folder.read(name, MOST_BYTES))
    if not names:
        parent, _, name = address.rpartition("/")
        local.write_bytes(ObjectFolder(parent, storage_options).read(name, MOST_BYTES))
