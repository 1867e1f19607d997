"""Local copies of what lies at an address: an archive's small files when they are needed, and results as a whole.

Small files of an archive (metadata, examples, tokenizer, LM head) are read by the same code wherever the archive is.
From an address they come whole, once, and each reader checks them as it checks any file. What is known by its SHA-256
is kept in the cache on the local disk.
"""

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

from residua.store.base.errors import ResiduaError, StorageError
from residua.store.base.untrusted import name_problem
from residua.store.storage.address import is_remote, scheme_of, shown
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.hub import folder_at
from residua.store.storage.objects import ObjectFolder

MOST_BYTES = 2**36
"""Most bytes of results that are fetched: of one file, and of all."""

_UNLISTED = ("http", "https", "hf")
_LEAST_SLASHES = {"hf": 4}  # of hf://datasets/ORG/NAME


@contextmanager
def naming(path: Path, place: object) -> Iterator[None]:
    """Let errors name the place, where they name the local folder that has copies of its files."""
    try:
        yield
    except ResiduaError as error:
        error.args = tuple(arg.replace(str(path), str(place)) if isinstance(arg, str) else arg for arg in error.args)
        raise


class Mirror:
    """The local folder of one remote one; it goes when this object does.

    Args:
        folder: The remote folder.
        cache: Where files are looked for before they are asked for; None: nowhere.

    Attributes:
        path: The local folder.
        folder: As given.
    """

    def __init__(self, folder: ObjectFolder, cache: DiskCache | None = None) -> None:
        self.folder = folder
        self._cache = cache
        made = tempfile.TemporaryDirectory(prefix="residua-")
        self.path = Path(made.name)
        weakref.finalize(self, made.cleanup)

    def need(self, name: str, most_bytes: int, sha256: str | None = None) -> Path:
        """Return the local copy of a file, fetched unless it is there.

        Args:
            name: Its path in the folder.
            most_bytes: Largest size; a larger one is refused before it is fetched.
            sha256: What it should be, in hex, if that is known; the reader of the file compares it.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It cannot be read, or is larger.
        """
        path = self.path / name
        if not path.exists():
            kept = self._cache.get(sha256) if self._cache and sha256 else None
            if kept is None or hashlib.sha256(kept).hexdigest() != sha256:
                kept = self.folder.read(name, most_bytes)
                if self._cache and sha256:
                    self._cache.put(sha256, kept)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept)
        return path

    def naming(self) -> AbstractContextManager[None]:
        """Let errors name the address, where they name the local folder."""
        return naming(self.path, self.folder)


@contextmanager
def fetched(
    place: str | PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] = (),
    most_bytes: int = MOST_BYTES,
) -> Iterator[Path]:
    """Give a file or folder of results on this machine: for an address, a copy of what is there.

    The copy goes with the ``with`` block. Errors inside name the address.

    Args:
        place: Path or address.
        storage_options: For an address, as for `residua.open`.
        names: Files that such a folder may have. They are fetched where nothing is listed: on web servers and the Hub.
        most_bytes: Most bytes to fetch, of one file and of all.

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
        _fetch(address, local, storage_options, names, most_bytes)
        with naming(local, shown(address)):
            yield local


def _fetch(
    address: str, local: Path, storage_options: Mapping[str, Any] | None, names: Sequence[str], most_bytes: int
) -> None:
    """Fetch a folder, or, if there is none, the file of that name."""
    folder, is_listed = folder_at(address, storage_options), scheme_of(address) not in _UNLISTED
    for name in _listed(folder, most_bytes) if is_listed else names:
        with nullcontext() if is_listed else suppress(FileNotFoundError):
            content = folder.read(name, most_bytes)
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if not local.exists():
        parent, _, name = address.rpartition("/")
        if parent.count("/") < _LEAST_SLASHES.get(scheme_of(address), 2):
            raise FileNotFoundError(f"there is nothing to read at {folder}: name the folder or the file itself")
        local.write_bytes(folder_at(parent, storage_options).read(name, most_bytes))


def _listed(folder: ObjectFolder, most_bytes: int) -> list[str]:
    found = {entry.name: entry.n_bytes for entry in folder.list()}
    if problem := next(filter(None, map(name_problem, found)), ""):
        raise StorageError(f"{folder}: {problem}")
    if (n_bytes := sum(found.values())) > most_bytes:
        raise StorageError(f"{folder} holds {n_bytes:,} bytes, more than results have: name the folder of the results")
    return list(found)
