"""Creating an archive: everything but the rows, built next to its destination and moved there in one step.

An archive under construction is a hidden folder next to its destination. Renaming it makes the complete archive appear.
The next run recognises by that name what a killed run left, and removes it.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from residua.store.base.canonical import Json
from residua.store.base.local_paths import shortened
from residua.store.encoding.codecs import INT8
from residua.store.format.archive_metadata import (
    ROOT,
    Metadata,
    is_archive,
    read_metadata,
    sidecar_digests,
    sidecar_files,
    write_metadata,
)
from residua.store.format.array_metadata import create_array
from residua.store.format.commits import FOLDER
from residua.store.format.dimensions import dimension_names
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.row_columns import MODALITIES
from residua.store.storage.destination import BucketFolder, Destination, destination_of
from residua.store.storage.files import sync_folder
from residua.store.storage.lock import naming_archive, try_flock
from residua.store.storage.mirror import naming


@contextmanager
def workspace(destination: Path | Destination) -> Iterator[Path]:
    """Yield an empty hidden folder next to `destination`; what is left in it is removed at the end.

    The folder is locked meanwhile, so that a second capture of the same archive does not remove it. For an archive in a
    bucket it lies where that has its local copies.

    Raises:
        FileExistsError: `destination` exists and is not an archive; the user's files are not overwritten.
        BlockingIOError: Another capture is making the same archive.
        OSError: The parent folder cannot be written.
    """
    destination = destination_of(destination).path
    if not is_archive(destination):
        refuse_occupied(destination)
    folder = destination.parent / f".{destination.name}.making"
    with naming_archive(destination):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    if try_flock(descriptor) is False:  # without locks, two captures of one archive are the user's to avoid
        os.close(descriptor)
        raise BlockingIOError(
            errno.EWOULDBLOCK, f"another capture is making {destination}: wait for it, or choose another place"
        )
    try:
        _clear(folder)
        yield folder
    finally:
        if _is_at(folder, descriptor):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _is_at(folder: Path, descriptor: int) -> bool:
    """Say whether `folder` is the open one: after the move, another capture may have made a folder of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False


def refuse_occupied(destination: Path) -> None:
    """Raise FileExistsError if `destination` exists and is not an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            errno.EEXIST, f"{destination} exists and is not an empty folder: choose another place, or remove it"
        )


def create_archive(
    folder: Path,
    destination: Path | Destination,
    plan: Plan,
    provenance: Mapping[str, Json],
    *,
    keep_paths: bool = False,
) -> list[str]:
    """Complete the archive in `folder`, which holds its sidecar files already, and move it to `destination`.

    In a bucket the root's metadata go last, and only if there are none, so that the archive appears complete.

    Args:
        folder: The folder.
        destination: Where the archive will be.
        plan: Its plan.
        provenance: How it is made.
        keep_paths: Whether absolute paths of this machine stay in the provenance of an archive in a bucket; by default
            it has only their last part, as a copy that `residua push` makes.

    Returns:
        What to say about such paths.

    Raises:
        FileExistsError: `destination` exists.
        StorageError: A bucket could not be written.
    """
    out = destination_of(destination)
    n_rows, names = plan.n_rows or 0, dimension_names(plan)
    for site in plan.sites:
        for spec in site.arrays(plan.rows_per_shard):
            attributes = _attributes(site, spec.path)
            create_array(folder, spec, n_rows, attributes=attributes, dimensions=names[spec.path])
    for spec in plan.row_arrays:
        create_array(folder, spec, n_rows, attributes=_values(spec.path), dimensions=names[spec.path])
    (folder / FOLDER).mkdir(exist_ok=True)
    _sync_sidecars(folder)
    provenance, notes = shortened(provenance, keep=keep_paths or not isinstance(out, BucketFolder))
    write_metadata(folder, Metadata(plan=plan, provenance=provenance, files=sidecar_digests(folder)))
    refuse_occupied(out.path)
    folder.rename(out.path)
    sync_folder(out.path.parent)
    if isinstance(out, BucketFolder):
        _send(out)
    return notes


def _send(out: BucketFolder) -> None:
    """Send a new archive from the local folder to its bucket; remove what a start that was killed left there."""
    files = [path.relative_to(out.path).as_posix() for path in sorted(out.path.rglob("*")) if path.is_file()]
    parts = {FOLDER, *(name.partition("/")[0] for name in files)}
    left = [entry.name for part in sorted(parts - {ROOT}) for entry in out.objects.list(part)]
    out.remove(name for name in left if name not in files)
    out.upload([name for name in files if name != ROOT])
    out.create(ROOT, (out.path / ROOT).read_bytes())


def bring_archive(out: Destination) -> None:
    """Bring the metadata and the examples of an archive in a bucket to the local folder, where they are read.

    Does nothing if there is no archive yet, or if it is in a folder.
    """
    if not isinstance(out, BucketFolder) or (out.path / ROOT).exists() or out.n_bytes(ROOT) is None:
        return
    out.fetch([ROOT])
    if not is_archive(out.path):
        return
    with naming(out.path, out):
        metadata = read_metadata(out.path)
    nodes = {
        str(node)
        for spec in metadata.plan.arrays
        for node in (PurePosixPath(spec.path), *PurePosixPath(spec.path).parents)
    }
    out.fetch(f"{node}/{ROOT}" for node in sorted(nodes - {"."}))
    out.fetch(name for name in metadata.files if name.startswith("examples/"))


def _sync_sidecars(folder: Path) -> None:
    """Flush what other libraries wrote, so that the archive is complete after a power cut that follows the move."""
    for path in sidecar_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)


def _values(path: str) -> dict[str, Json]:
    return {"values": list(MODALITIES)} if path == "rows/modality" else {}


def _attributes(site: SitePlan, path: str) -> dict[str, Json]:
    if site.codec == INT8 and path == site.path:
        scales = site.arrays(1)[1].path
        return {"quantised": {"scheme": INT8, "scales": scales, "logical_dtype": site.dtype}}
    return {}
