"""Making an archive: everything but the rows, built beside its place and moved there in one step.

An archive under construction lies in a hidden folder next to its destination. Renaming it makes the archive appear
whole; what a killed run left behind is recognised by that name and cleared by the next.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from residua.store.arrays import create_array, resize_array
from residua.store.canonical import Json
from residua.store.codecs import INT8
from residua.store.commits import FOLDER, Commit
from residua.store.files import sync_folder
from residua.store.lossy import BLOCK
from residua.store.metadata import Metadata, digest_side_files, write_metadata
from residua.store.plan import Plan, SitePlan


@contextmanager
def workspace(destination: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `destination`; whatever is left in it is removed at the end.

    Raises:
        FileExistsError: `destination` exists and is not an archive, so that nothing of the user's is overwritten.
        OSError: The parent folder cannot be written.
    """
    folder = destination.parent / f".{destination.name}.making"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make an archive at {destination}: {error.strerror}. Choose a folder that is writable."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_archive(folder: Path, destination: Path, plan: Plan, provenance: Mapping[str, Json]) -> None:
    """Complete the archive in `folder`, which holds its side files already, and move it to `destination`.

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
    write_metadata(folder, Metadata(plan=plan, provenance=provenance, files=digest_side_files(folder)))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            errno.EEXIST, f"{destination} exists and is not an empty folder: choose another place, or remove it"
        )
    folder.rename(destination)
    sync_folder(destination.parent)


def _attributes(site: SitePlan, path: str) -> dict[str, Json]:
    if site.codec == INT8 and path == site.path:
        scales = site.arrays(BLOCK)[1].path
        return {"quantised": {"scheme": INT8, "scales": scales, "logical_dtype": site.dtype}}
    return {}


def seal(
    archive: Path, metadata: Metadata, commits: Mapping[int, Commit], sealed: Mapping[str, Json] | None = None
) -> None:
    """Write what is known only at the end: the measured error of lossy sites, and sizes that were open.

    Args:
        archive: Folder of the archive.
        metadata: Its metadata.
        commits: A commit of every shard.
        sealed: For an archive of open size, `n_rows`, `n_examples` and the examples' digest.
    """
    plan = metadata.plan
    if sealed is not None:
        n_rows = sealed["n_rows"]
        if not isinstance(n_rows, int):
            raise TypeError(f"n_rows is {n_rows!r}")
        for spec in plan.arrays:
            resize_array(archive, spec, n_rows)
        files = digest_side_files(archive)
        write_metadata(archive, Metadata(plan=plan, provenance=metadata.provenance, files=files, sealed=sealed))
    for site in plan.sites:
        if any(commit.arrays[site.path].squares is not None for commit in commits.values()):
            _write_error(archive, plan, site, commits)


def relative_error(site: SitePlan, commits: Mapping[int, Commit]) -> float:
    """Return the root of summed squared error over summed squares of `site`, as its lossy preset left it."""
    files = [commit.arrays[site.path] for commit in commits.values()]
    squares = sum(file.squares or 0.0 for file in files)
    return float((sum(file.error_squares or 0.0 for file in files) / squares) ** 0.5) if squares else 0.0


def _write_error(archive: Path, plan: Plan, site: SitePlan, commits: Mapping[int, Commit]) -> None:
    spec = site.arrays(plan.rows_per_shard)[0]
    n_rows = max(commit.rows[1] for commit in commits.values())
    attributes = {**_attributes(site, spec.path), "relative_rms_error": relative_error(site, commits)}
    create_array(archive, spec, n_rows, attributes=attributes)


def list_temporaries(archive: Path) -> list[Path]:
    """Return the temporary files that a killed writer left in `archive`."""
    return [Path(root) / name for root, _, names in os.walk(archive) for name in names if name.endswith(".tmp")]
