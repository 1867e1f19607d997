"""A cache on the local disk for what came over the network: bounded, shared by processes, keyed by content.

Each entry is one file. It appears whole, by a rename, so that two processes may fill the cache at once. A reader
compares what it gets, for a disk may change it: an entry that differs is dropped and asked for again. When the cache
is larger than it may be, the entries that were used longest ago go first.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from residua.store.base.sizes import Size, n_bytes

DEFAULT_BYTES = 10 * 2**30
_LOOKS = 32  # the folder is measured after each 1/32 of its limit that was written
_KEEPS = 0.9


def default_folder() -> Path:
    """Return the folder of the cache: ``$RESIDUA_CACHE``, or ``residua`` in the user's folder for caches."""
    if given := os.environ.get("RESIDUA_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "residua"


class DiskCache:
    """Bytes by key, in files below `folder`.

    Args:
        folder: The folder, made when it is needed; by default `default_folder`.
        max_bytes: Most bytes of all entries together, or a text such as ``50GB``; for a short time, processes that
            write at once may go beyond it.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: Size = DEFAULT_BYTES) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self.max_bytes = n_bytes(max_bytes, "max_bytes")
        self._unmeasured = self.max_bytes // _LOOKS

    def get(self, key: str) -> bytes | None:
        """Return the bytes kept under `key`, None if there are none; the caller compares them."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keep `data` under `key`. A disk that is full or may not be written keeps nothing, and that is no error."""
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            return
        self._unmeasured += len(data)
        if self._unmeasured > self.max_bytes // _LOOKS:
            self._unmeasured = 0
            self._shrink()

    def drop(self, key: str) -> None:
        """Forget what is kept under `key`."""
        with suppress(OSError):
            self._path(key).unlink()

    def n_bytes(self) -> int:
        """Return the bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for path in self.folder.glob("??/*"):
            with suppress(OSError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path

    def _shrink(self) -> None:
        entries = sorted(self._entries())
        left = sum(size for _, size, _ in entries)
        if left <= self.max_bytes:
            return
        for _, size, path in entries:
            if left <= _KEEPS * self.max_bytes:
                return
            with suppress(OSError):
                path.unlink()
            left -= size
