"""Shard files as they are stored, here or at an address: each read once, chunk by chunk, and compared on the way."""

import os
from collections.abc import Iterator

import numpy as np

from residua.store.base.errors import DamagedArchiveError
from residua.store.encoding.shard import (
    RESTORE,
    ChunkTable,
    describe_chunk,
    index_bytes,
    open_shard,
    read_chunk_table,
    shard_index,
    shard_path,
    shard_rows,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.read.archive import Archive
from residua.store.read.remote import Bytes, RemoteChunks, chunk_problem
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import file_record
from residua.store.storage.crc import Buffer

_AHEAD_BYTES = 16 * 2**20  # that are asked for at once of an archive at an address, and held in memory


def shard_file(archive: Archive, spec: ArraySpec, shard: int) -> Iterator[Buffer]:
    """Yield the bytes of a shard file, each chunk in memory of its own; see `stored_chunks`."""
    yield from stored_chunks(archive, spec, shard)
    yield shard_index(_table(archive, spec, shard), spec)


def stored_chunks(archive: Archive, spec: ArraySpec, shard: int) -> Iterator[Bytes]:
    """Yield the chunks of a shard file as they are stored, crc32c included, each compared with the shard's record.

    Memory does not grow with the shard.

    Args:
        archive: The archive.
        spec: The array, or one of its column shards.
        shard: Number of the shard.

    Raises:
        DamagedArchiveError: The file is missing, or is not what its record says; the message names it and the chunk.
        StorageError: The server does not give it.
    """
    table = _table(archive, spec, shard)
    if not isinstance(archive, RemoteArchive):
        yield from _read(archive, spec, shard, table)
        return
    chunks = RemoteChunks(archive.folder, archive.chunks.index)  # which has fetched nothing ahead, so all come in order
    first = shard * spec.chunks_per_shard
    numbers = range(first, first + len(table))
    for found in chunks.stream(spec, archive.n_rows, numbers, window_bytes=_AHEAD_BYTES):
        yield from found.values()


def _table(archive: Archive, spec: ArraySpec, shard: int) -> ChunkTable:
    table = file_record(archive.commits, spec.key, shard).chunk_table
    if len(table):
        return table
    path = shard_path(archive.path, spec, shard)  # the records of format 1.0 have none
    return read_chunk_table(path, spec, shard_rows(spec, archive.n_rows, shard))


def _read(archive: Archive, spec: ArraySpec, shard: int, table: ChunkTable) -> Iterator[Bytes]:
    path, end = shard_path(archive.path, spec, shard), 0
    with open_shard(path) as descriptor:
        for chunk, (size, crc) in enumerate(table.tolist()):
            stored = np.empty(size, np.uint8)
            n_read = os.preadv(descriptor, [stored.data], end)
            if problem := chunk_problem(stored[:n_read], size, crc):
                n_rows = shard_rows(spec, archive.n_rows, shard)
                where = describe_chunk(spec, chunk, n_rows, shard * spec.rows_per_shard)
                raise DamagedArchiveError(f"{path}: {where} is damaged: {problem}: {RESTORE}")
            yield stored
            end += size
        if os.pread(descriptor, index_bytes(spec) + 1, end) != shard_index(table, spec):
            raise DamagedArchiveError(f"{path}: the shard's index is damaged: {RESTORE}")
