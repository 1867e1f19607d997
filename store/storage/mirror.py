"""A local folder in which files of a folder at an address appear when they are needed.

Small files of an archive (metadata, examples, tokenizer, LM head) are read by the same code wherever the archive is.
From an address they come whole, once, and each reader checks them as it checks any file. What is known by its SHA-256
is kept in the cache on the local disk.
"""

import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from residua.store.base.errors import ResiduaError
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.objects import ObjectFolder


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
