"""Committed shards that lost files since, found from names and sizes alone: no record is read.

A capture that is run again calls `drop_lost` before it begins. Of an archive with a packed index every size is known.
Of one that is not finished it is known for arrays stored raw; sealing compares the others with their records.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.encoding.codecs import PRESETS, max_chunk_bytes
from residua.store.encoding.shard import index_bytes, shard_path, shard_rows
from residua.store.encoding.spec import ArraySpec
from residua.store.format.archive_metadata import ROOT, Metadata, write_metadata
from residua.store.format.commits import FOLDER, committed_shards, publish_commit, record_name, shard_of
from residua.store.sealing.packed_index import PackedIndex
from residua.store.storage.destination import BucketFolder, Destination, destination_of

_HERE = Path()


def drop_lost(archive: Path | Destination, metadata: Metadata) -> list[str]:
    """Delete the records of shards whose files are missing or of another size, so that they are captured again.

    A shard of a finished archive whose record was deleted counts as lost, too. If there is any, the packed index is
    taken back first: it is made again when the archive is sealed again. A copy that came with the index and without
    any record gets its records back.

    Args:
        archive: Folder of the archive, or where else it is written.
        metadata: Its metadata; read them again afterwards.

    Returns:
        One sentence for each shard that was dropped; it names the first broken file.

    Raises:
        OSError: A file could not be removed or written.
    """
    out = destination_of(archive)
    index = _index(out, metadata)
    committed = committed_shards(out) or _restored(out, index)
    lost = {shard: f"{FOLDER}/{record_name(shard)} is missing" for shard in index or () if shard not in committed}
    size_of = out.sizes()
    for spec in (files for array in metadata.plan.arrays for files in array.file_specs):
        for shard, found in _broken(out, size_of, spec, metadata, index, committed):
            lost.setdefault(shard, found)
    if lost and metadata.index is not None:
        write_metadata(out.path, _without_index(metadata))
        out.upload([ROOT])
    dropped = lost.keys() & committed
    if dropped:
        out.remove(f"{FOLDER}/{name}" for name in out.names(FOLDER) if shard_of(name) in dropped)
    return [f"shard {shard} will be captured again: {found}." for shard, found in sorted(lost.items())]


def _index(out: Destination, metadata: Metadata) -> PackedIndex | None:
    """Return the packed index if there is a sound one."""
    if metadata.index is None or metadata.n_rows is None:
        return None
    place = out.objects if isinstance(out, BucketFolder) else out.path
    try:
        return PackedIndex(place, metadata.plan, metadata.n_rows, metadata.index)
    except (DamagedArchiveError, UnsafeArchiveError):
        return None


def _restored(out: Destination, index: PackedIndex | None) -> set[int]:
    """Write a record for each shard of an index, and return the shards."""
    if index is None:
        return set()
    for shard in index:
        publish_commit(out, index[shard])
    return set(index)


def _without_index(metadata: Metadata) -> Metadata:
    return Metadata(
        plan=metadata.plan,
        provenance=metadata.provenance,
        files=metadata.files,
        sealed=metadata.sealed,
        documents=metadata.documents,
    )


def _broken(
    out: Destination,
    size_of: Callable[[str], int | None],
    spec: ArraySpec,
    metadata: Metadata,
    index: PackedIndex | None,
    shards: Iterable[int],
) -> Iterator[tuple[int, str]]:
    """Yield the shards whose file of `spec` is missing or of another size, and what is wrong."""
    sizes = None if index is None else index.file_bytes(spec.key)
    first = shard_path(_HERE, spec, 0).as_posix()
    before, after = first[: len(spec.path) + 3], first[len(spec.path) + 4 :]
    for shard in sorted(shards):
        name = f"{before}{shard}{after}"
        found = size_of(name)
        expected = _raw_bytes(spec, metadata, shard) if sizes is None or shard >= len(sizes) else int(sizes[shard])
        if found is None or (expected is not None and found != expected):
            found = out.n_bytes(name)  # what was listed may be out of date
        if found is None:
            yield shard, f"{out}/{name} is missing"
        elif expected is not None and found != expected:
            yield shard, f"{out}/{name} has {found:,} bytes, and should have {expected:,}"


def _raw_bytes(spec: ArraySpec, metadata: Metadata, shard: int) -> int | None:
    """Return the size that a shard file must have; None if it depends on the values."""
    if not PRESETS[spec.preset].is_raw or metadata.n_rows is None:
        return None
    n_chunks = -(-shard_rows(spec, metadata.n_rows, shard) // spec.rows_per_chunk)
    return n_chunks * max_chunk_bytes(spec.preset, spec.chunk_bytes) + index_bytes(spec)
