"""An archive with larger shards, for places that count files and requests: the same rows in fewer, larger files.

Stored chunks are copied as they are, so values do not change and lossy codecs round nothing again; only chunks that
were small because the shards were are decoded and encoded anew. Memory holds a chunk of one array at a time. The plan
names the archive that the rows are from, and the height of its shards, in whose groups examples ran together: a sample
can be run again as before.

It is taken up after a kill: shards that have a record are not written again.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from residua.store.base.canonical import Json
from residua.store.base.errors import PlanError
from residua.store.base.sizes import Size, n_bytes
from residua.store.encoding.codecs import encode_chunk
from residua.store.encoding.shard import (
    ChunkTable,
    shard_bytes,
    shard_digest,
    shard_index,
    shard_path,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import SIDE_TABLES
from residua.store.format.archive_metadata import SIDECAR_FOLDERS, is_archive, notes_in, read_metadata
from residua.store.format.commits import Commit, ShardFile, committed_shards, publish_commit
from residua.store.format.create import bring_archive, create_archive, workspace
from residua.store.format.plan import REPACKED_RULE, Plan
from residua.store.read.archive import Archive
from residua.store.read.shard_files import stored_chunks
from residua.store.read.stacks import open_source, open_written
from residua.store.sealing.seal import seal
from residua.store.storage.crc import CRC_BYTES, Buffer
from residua.store.storage.destination import Destination
from residua.store.storage.place import try_archive_place

HUB_SHARD_BYTES = 2**30
"""Most bytes of a shard for the Hub, before they are compressed; in most archives, of 512 MiB or more."""

_HERE = Path()
_Progress = Callable[[int, int], None]


def repack(
    archive: Archive | str | PathLike[str],
    out: str | PathLike[str],
    *,
    shard_bytes: Size = HUB_SHARD_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    on_row: _Progress = lambda *_: None,
) -> Archive:
    """Write an archive with larger shards.

    Args:
        archive: The archive, or its folder or address.
        out: Folder of the new archive, or its address in a bucket; if a repacking of the same archive was stopped, it
            goes on there.
        shard_bytes: Most bytes, or a text such as ``1GiB``, of a shard of the widest site, before they are compressed.
        storage_options: For addresses, as for `residua.open`; of `out` alone, if their services differ.
        on_row: Called after each shard, with the rows that are written and the total.

    Returns:
        The new archive.

    Raises:
        PlanError: Its shards are as large already; or `out` is another archive.
        NotCapturedError: The archive is not finished.
        DamagedArchiveError: A chunk of the archive was altered; the message names it.
        FileExistsError: `out` exists, and is no archive.
        OSError: `out` cannot be written.
    """
    source = open_source(archive, out, storage_options)
    source.require_captured(range(source.n_rows))
    plan = _plan(source, n_bytes(shard_bytes, "shard_bytes"))
    place = try_archive_place(out, storage_options).out
    with place.locked():
        bring_archive(place)
        if not is_archive(place.path):
            _create(source, place, plan)
        elif read_metadata(place.path).plan.digest != plan.digest:
            raise PlanError(f"{place} is another archive: choose another place")
        place.sweep()
        done = committed_shards(place)
        for shard in range(plan.n_shards(source.n_rows)):
            if shard not in done:
                publish_commit(place, _write_shard(source, place, plan, shard))
            on_row(min((shard + 1) * plan.rows_per_shard, source.n_rows), source.n_rows)
        seal(place, read_metadata(place.path), source.metadata.sealed if plan.n_rows is None else None)
    return open_written(place)


def _plan(source: Archive, shard_bytes: int) -> Plan:
    sites = tuple(site for site in source.plan.sites if site.name in set(source.sites))
    old, widest = source.plan.rows_per_shard, max(site.row_bytes // site.column_shards for site in sites)
    height = 1 << max(0, (shard_bytes // widest).bit_length() - 1)
    height = min(height, 1 << max(0, source.n_rows - 1).bit_length())  # one shard may hold all rows
    if height <= old:
        raise PlanError(
            f"{source.place} has shards of {old:,} rows, as large as they can be with {shard_bytes:,} bytes: it needs "
            "no repacking"
        )
    repacked: dict[str, Json] = {"archive": source.plan.digest, "rows_per_shard": source.plan.group_rows}
    rules: dict[str, Json] = {**source.plan.rules, REPACKED_RULE: repacked}
    return replace(source.plan, rules=rules, sites=sites, rows_per_shard=height)


def _create(source: Archive, out: Destination, plan: Plan) -> None:
    with workspace(out) as folder:
        for name in source.metadata.files:
            if name.split("/")[0] in SIDECAR_FOLDERS:
                source.side_file(name)  # compares its digest
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.path / name, folder / name)
        if tables := source.side_tables:
            for name in (SIDE_TABLES, *(path for table in tables for path in table.paths())):
                there = source.file(name, SIDECAR_FOLDERS["examples"])
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(there, folder / name)
        of = f"these rows were copied into larger shards from the archive of plan {source.plan.digest[:12]}"
        provenance: dict[str, Any] = {**source.provenance, "notes": [*notes_in(source.provenance), of]}
        create_archive(folder, out, plan, provenance)


def _write_shard(source: Archive, out: Destination, plan: Plan, shard: int) -> Commit:
    """Write the files of one shard, and return its record."""
    first, height = shard * plan.rows_per_shard, source.plan.rows_per_shard
    stop = min(first + plan.rows_per_shard, source.n_rows)
    old = [source.commits[number] for number in range(first // height, -(-stop // height))]
    specs = {spec.key: spec for array in source.plan.arrays for spec in array.file_specs}
    files: dict[str, ShardFile] = {}
    for array in plan.arrays:
        for spec in array.file_specs:
            merged = _Merged(source, specs[spec.key], spec, shard)
            out.write(shard_path(_HERE, spec, shard).as_posix(), merged)
            files[spec.key] = _summed([commit.arrays[spec.key] for commit in old], merged.table, spec)
    return Commit(plan=plan.digest, shard=shard, rows=(first, stop), arrays=dict(sorted(files.items())))


def _summed(parts: list[ShardFile], table: ChunkTable, spec: ArraySpec) -> ShardFile:
    """Return the record of a file whose rows are those of several files."""

    def squares(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else float(sum(values))

    return ShardFile(
        n_bytes=shard_bytes(table, spec),
        digest=shard_digest(table, spec),
        n_nonfinite=sum(part.n_nonfinite for part in parts),
        squares=squares("squares"),
        error_squares=squares("error_squares"),
        n_overflowed=sum(part.n_overflowed for part in parts),
        n_spoiled=sum(part.n_spoiled for part in parts),
        chunks=table.tobytes(),
    )


class _Merged:
    """The bytes of one file of a large shard, made anew each time that they are asked for.

    Args:
        source: Where the rows are from.
        old: The array, or column shard, as it is there.
        new: The same in the new archive.
        shard: Number of the shard.

    Attributes:
        table: Size and crc32c of every chunk; known once all buffers are taken.
    """

    def __init__(self, source: Archive, old: ArraySpec, new: ArraySpec, shard: int) -> None:
        self._source, self._old, self._new, self._shard = source, old, new, shard
        self.table: ChunkTable = np.empty((0, 2), "<u4")

    def __iter__(self) -> Iterator[Buffer]:
        entries: list[tuple[int, int]] = []
        is_same = self._old.rows_per_chunk == self._new.rows_per_chunk
        for stored in self._copied() if is_same else self._encoded():
            sizes = [len(buffer) if isinstance(buffer, bytes) else buffer.nbytes for buffer in stored]
            entries.append((sum(sizes), int.from_bytes(bytes(stored[-1])[-CRC_BYTES:], "little")))
            yield from stored
        self.table = np.array(entries, "<u4").reshape(-1, 2)
        yield shard_index(self.table, self._new)

    def _copied(self) -> Iterator[list[Buffer]]:
        """Yield the stored chunks of the shards that this one is made of, each compared with its record."""
        ratio, n_rows = self._new.rows_per_shard // self._old.rows_per_shard, self._source.n_rows
        first = self._shard * ratio
        for shard in range(first, min(first + ratio, -(-n_rows // self._old.rows_per_shard))):
            for stored in stored_chunks(self._source, self._old, shard):
                yield [stored]

    def _encoded(self) -> Iterator[list[Buffer]]:
        """Yield chunks of more rows than those that are stored."""
        reader = self._source.file_reader(self._old, check="always")
        first, height = self._shard * self._new.rows_per_shard, self._new.rows_per_chunk
        for start in range(first, min(first + self._new.rows_per_shard, self._source.n_rows), height):
            stop = min(start + height, self._source.n_rows)
            rows = np.zeros((height, *self._new.row_shape), self._new.storage_dtype)
            reader.read_into(rows[: stop - start], start, stop)
            yield encode_chunk(rows, self._new.preset)
