"""The small files of an archive at an address, which a copy takes whole: each bounded, and compared where it can be."""

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from residua.store.base.errors import DamagedArchiveError
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import SideTable
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, SIDECAR_FOLDERS
from residua.store.format.array_metadata import METADATA
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import INDEX

_STEP_BYTES = 16 * 2**20  # of the index, that one request brings


class SmallFile(NamedTuple):
    """Largest size of a file, and its SHA-256, in hex, if that is known."""

    most_bytes: int
    sha256: str | None = None


def small_files(archive: RemoteArchive, specs: Iterable[ArraySpec]) -> dict[str, SmallFile]:
    """Return the files of an archive but shards, index, root and side tables, by their paths.

    Args:
        archive: The archive.
        specs: Arrays that are copied.
    """
    nodes = {str(node) for spec in specs for node in (PurePosixPath(spec.path), *PurePosixPath(spec.path).parents)}
    found = {f"{node}/{METADATA}": SmallFile(MAX_METADATA_BYTES) for node in sorted(nodes - {"."})}
    for name, sha256 in archive.metadata.files.items():
        found[name] = SmallFile(SIDECAR_FOLDERS[PurePosixPath(name).parts[0]], sha256)
    return found


def side_table_files(tables: Iterable[SideTable]) -> dict[str, SmallFile]:
    """Return the files of side tables, by their paths."""
    return {
        name: SmallFile(SIDECAR_FOLDERS["examples"], sha256)
        for table in tables
        for name, sha256 in zip(table.paths(), table.files, strict=True)
    }


def fetch_small(archive: RemoteArchive, name: str, file: SmallFile) -> bytes:
    """Return the content of a file; one that is not what the archive says is asked for once more.

    Raises:
        DamagedArchiveError: It is missing, or came twice with other bytes.
        StorageError: It cannot be read, or is larger.
    """
    place, known = f"{archive.place}/{name}", archive.path / name
    if file.sha256 and known.is_file() and hashlib.sha256(content := known.read_bytes()).hexdigest() == file.sha256:
        return content  # which was needed already
    for _ in range(2):
        try:
            content = archive.folder.read(name, file.most_bytes)
        except FileNotFoundError:
            raise DamagedArchiveError(
                f"{place} is missing: copy the archive there again from where it came from"
            ) from None
        if file.sha256 in (None, hashlib.sha256(content).hexdigest()):
            return content
    raise DamagedArchiveError(
        f"{place} was altered: its SHA-256 is not the one that the archive says, and it came twice like this: copy the "
        "archive there again from where it came from"
    )


def fetch_index(archive: RemoteArchive) -> Iterable[bytes]:
    """Yield the packed index, some MiB at a time."""
    n_bytes = archive.index.n_bytes
    for start in range(0, n_bytes, _STEP_BYTES):
        yield bytes(archive.folder.read_range(INDEX, start, min(start + _STEP_BYTES, n_bytes)))
