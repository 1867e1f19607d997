"""Creating an archive: everything but the rows, built next to its destination and moved there in one step.

An archive under construction is a hidden folder next to its destination. Renaming it makes the complete archive appear.
The next run recognises by that name what a killed run left, and removes it.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from residua.store.base.canonical import Json
from residua.store.encoding.codecs import INT8
from residua.store.format.archive_metadata import Metadata, is_archive, sidecar_digests, sidecar_files, write_metadata
from residua.store.format.array_metadata import create_array, resize_array
from residua.store.format.commits import FOLDER, Commit, ShardFile, named_example_files
from residua.store.format.losses import loss_notes
from residua.store.format.plan import Plan, SitePlan
from residua.store.storage.files import sync_folder
from residua.store.storage.lock import naming_archive, try_flock


@contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to `destination`; what is left in it is removed at the end.

    The folder is locked meanwhile, so that a second capture of the same archive does not remove it.

    Raises:
        FileExistsError: `destination` exists and is not an archive; the user's files are not overwritten.
        BlockingIOError: Another capture is making the same archive.
        OSError: The parent folder cannot be written.
    """
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


def create_archive(folder: Path, destination: Path, plan: Plan, provenance: Mapping[str, Json]) -> None:
    """Complete the archive in `folder`, which holds its sidecar files already, and move it to `destination`.

    Raises:
        FileExistsError: `destination` exists.
    """
    n_rows = plan.n_rows or 0
    for site in plan.sites:
        for spec in site.arrays(plan.rows_per_shard):
            create_array(folder, spec, n_rows, attributes=_attributes(site, spec.path))
    for spec in plan.row_arrays:
        create_array(folder, spec, n_rows, attributes={})
    (folder / FOLDER).mkdir(exist_ok=True)
    _sync_sidecars(folder)
    write_metadata(folder, Metadata(plan=plan, provenance=provenance, files=sidecar_digests(folder)))
    refuse_occupied(destination)
    folder.rename(destination)
    sync_folder(destination.parent)


def _sync_sidecars(folder: Path) -> None:
    """Flush what other libraries wrote, so that the archive is complete after a power cut that follows the move."""
    for path in sidecar_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)


def _attributes(site: SitePlan, path: str) -> dict[str, Json]:
    if site.codec == INT8 and path == site.path:
        scales = site.arrays(1)[1].path
        return {"quantised": {"scheme": INT8, "scales": scales, "logical_dtype": site.dtype}}
    return {}


def seal(
    archive: Path, metadata: Metadata, commits: Mapping[int, Commit], sealed: Mapping[str, Json] | None = None
) -> None:
    """Write what is known only at the end: that all shards are captured, the error of lossy sites, and open sizes.

    Shards that are missing afterwards are lost: no reader takes the archive for one that is still being captured.

    Args:
        archive: Folder of the archive.
        metadata: Its metadata.
        commits: The commit of every shard.
        sealed: For an archive of open size, `n_rows`, `n_examples` and the examples' digest; they follow from the plan
            of any other archive.
    """
    plan = metadata.plan
    if metadata.sealed is None:
        metadata = _with_notes(metadata, loss_notes(plan, commits))
    if sealed is None:
        if metadata.sealed is None:
            write_metadata(archive, replace(metadata, sealed=_sealed_as_planned(plan)))
    else:
        n_rows = sealed["n_rows"]
        if not isinstance(n_rows, int):
            raise TypeError(f"n_rows is {n_rows!r}")
        for spec in plan.arrays:
            resize_array(archive, spec, n_rows)
        # Files with a known digest may be damaged by now, so only files that have none yet are read.
        files = sidecar_digests(archive, {**metadata.files, **named_example_files(commits)})
        write_metadata(archive, Metadata(plan=plan, provenance=metadata.provenance, files=files, sealed=sealed))
    for site in plan.sites:
        if any(file.squares is not None for file in _files(site, commits)):
            _write_error(archive, plan, site, commits)


def _with_notes(metadata: Metadata, notes: list[str]) -> Metadata:
    """Return the metadata with more notes in the provenance."""
    if not notes:
        return metadata
    known = metadata.provenance.get("notes")
    all_notes: list[Json] = [*(known if isinstance(known, list) else []), *notes]
    return replace(metadata, provenance={**metadata.provenance, "notes": all_notes})


def _sealed_as_planned(plan: Plan) -> dict[str, Json]:
    return {
        "n_rows": plan.n_rows,
        "n_examples": plan.dataset.get("n_examples"),
        "examples": plan.dataset.get("digest"),
    }


def _files(site: SitePlan, commits: Mapping[int, Commit]) -> list[ShardFile]:
    specs = site.arrays(1)[0].file_specs  # their keys are the same at every height
    return [commit.arrays[spec.key] for commit in commits.values() for spec in specs]


def relative_error(site: SitePlan, commits: Mapping[int, Commit]) -> float:
    """Return the root of summed squared errors over summed squares of a site with a lossy codec."""
    files = _files(site, commits)
    squares = sum(file.squares or 0.0 for file in files)
    return float((sum(file.error_squares or 0.0 for file in files) / squares) ** 0.5) if squares else 0.0


def _write_error(archive: Path, plan: Plan, site: SitePlan, commits: Mapping[int, Commit]) -> None:
    spec = site.arrays(plan.rows_per_shard)[0]
    n_rows = max(commit.rows[1] for commit in commits.values())
    attributes = {**_attributes(site, spec.path), "relative_rms_error": relative_error(site, commits)}
    create_array(archive, spec, n_rows, attributes=attributes)
