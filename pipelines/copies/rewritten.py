"""What copies that write rows of archives into a new one share: what they can keep, examples, sidecars and values."""

import errno
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.encoding.codecs import INT8, PRESETS
from residua.store.format.archive_metadata import SIDECAR_FOLDERS, Metadata, is_archive, read_metadata
from residua.store.format.commits import committed_shards
from residua.store.format.create import bring_archive, create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.row_columns import ROW_COLUMNS
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_written
from residua.store.sealing.seal import seal
from residua.store.storage.place import try_archive_place

SOURCE_EXAMPLE = "source_example"
"""Column of the example table: the number of each example in the archive that it was taken from."""


class Planned(NamedTuple):
    """What a new archive will be: its plan, and its provenance."""

    plan: Plan
    provenance: Mapping[str, Any]


Numbers = npt.NDArray[np.int64]


def write_archive(
    out: str | PathLike[str],
    storage_options: Mapping[str, Any] | None,
    plan: Callable[[Path], Planned],
    shards: Callable[[Plan, Collection[int]], Iterator[FilledShard]],
) -> Archive:
    """Write an archive shard by shard, to a folder or into a bucket; go on with one of the same plan that was stopped.

    Args:
        out: Path or address.
        storage_options: For an address, as for `residua.open`.
        plan: Writes examples and sidecars to a folder, and returns what the archive will be.
        shards: Yields the shards of a plan but those that are there.

    Returns:
        The archive, sealed.

    Raises:
        FileExistsError: Something else is there, or the archive is finished.
        OSError: The place cannot be written.
    """
    place = try_archive_place(out, storage_options).out
    with place.locked():
        bring_archive(place)
        with workspace(place) as folder:
            planned = plan(folder)
            if not is_archive(place.path):
                create_archive(folder, place, planned.plan, planned.provenance)
            elif not _is_unfinished(read_metadata(place.path), planned.plan):
                raise FileExistsError(
                    errno.EEXIST, f"{place} exists, and is an archive: choose another place, or remove it"
                )
        place.sweep()
        with ShardWriter(place, planned.plan) as writer:
            for shard in shards(planned.plan, committed_shards(place)):
                writer.submit(shard)
        seal(place, read_metadata(place.path))
    return open_written(place)


def _is_unfinished(found: Metadata, plan: Plan) -> bool:
    return found.sealed is None and found.plan.digest == plan.digest


def refuse_inexact(source: Archive, sites: Sequence[str]) -> None:
    """Raise unless all rows of `sites` are there and can be written again as they are.

    Raises:
        PlanError: A site's values would be rounded again, or the archive has images.
        NotCapturedError: The archive is not finished.
    """
    source.require_captured(range(source.n_rows))
    if int8 := [name for name in sites if source.plan.site(name).codec == INT8]:
        raise PlanError(
            f"{int8[0]} is stored as {INT8}, whose values would be rounded again: choose other sites, or copy the "
            "archive as it is"
        )
    if dict(source.plan.row_columns) != ROW_COLUMNS:
        raise PlanError(
            f"{source.place} has examples with images, which cannot be written into another archive yet: copy it as it "
            "is"
        )


def copy_sidecars(source: Archive, folder: Path) -> None:
    """Copy LM head and tokenizer, compared with their digests."""
    for name in source.metadata.files:
        if name.split("/")[0] in SIDECAR_FOLDERS and not name.startswith("examples/"):
            source.side_file(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)


def lossy_note(source: Archive, sites: Sequence[str]) -> str:
    """Return what the measured error of lossy sites means after they were written again; empty if none is lossy."""
    lossy = [name for name in sites if not PRESETS[source.plan.site(name).codec].is_lossless]
    if not lossy:
        return ""
    return f"{', '.join(lossy)}: relative_rms_error compares with the rounded rows of that archive, and so is 0"


def stored_rows(source: Archive, site: SitePlan, rows: Numbers) -> npt.NDArray[np.generic]:
    """Return rows as they are stored: bfloat16 as its bits."""
    array, storage = source[site.name], site.arrays(1)[0].storage_dtype
    found = array.numpy(rows, dtype=array.stored_dtype)
    return np.ascontiguousarray(found).view(storage)
