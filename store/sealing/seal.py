"""Sealing: what is known only at the end is written, so that an archive opens at once, whatever its length.

The order makes a crash harmless. Arrays get their number of rows and their measured errors; `commits.index` is made
from the records; groups get copies of the metadata below them; last, the root says that the archive is sealed, and
names the index. Until then the records alone count, and sealing again does all of it again, with the same bytes. The
records stay: they are what the index is made from.
"""

import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from residua.store.base.canonical import Json
from residua.store.base.errors import DamagedArchiveError, NotCapturedError, PlanError
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.shard import (
    RESTORE,
    ChunkTable,
    chunk_table_of,
    chunk_table_problem,
    read_chunk_table,
    shard_digest,
    shard_path,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.format.archive_metadata import (
    ROOT,
    Metadata,
    read_metadata,
    sidecar_digests,
    with_notes,
    write_metadata,
)
from residua.store.format.array_metadata import (
    METADATA,
    consolidate,
    create_array,
    load_document,
    open_array,
    resize_array,
)
from residua.store.format.commits import FOLDER, Commit, ShardFile, named_example_files, read_commit, record_name
from residua.store.format.create import bring_archive
from residua.store.format.dimensions import dimension_names
from residua.store.format.plan import Plan, SitePlan
from residua.store.sealing.losses import loss_notes
from residua.store.sealing.packed_index import (
    HEADER,
    INDEX,
    MAGIC,
    PAGE_BYTES,
    TOTALS,
    IndexLayout,
    PackedIndex,
    file_totals,
)
from residua.store.storage.address import is_remote, scheme_of, shown
from residua.store.storage.destination import BucketFolder, Destination, DiskFolder, destination_of
from residua.store.storage.files import write_file
from residua.store.storage.mirror import naming
from residua.store.storage.objects import in_parallel
from residua.store.storage.place import WRITABLE, bucket_at

_IN_MEMORY_BYTES = 64 * 1024 * 1024  # of an index while it is made; a larger one is made in a file without a name
_FLUSH_BYTES = 16 * 1024 * 1024  # of entries in memory, of all files together
_HERE = Path()
_Progress = Callable[[int, int], None]


def seal(
    archive: Path | Destination,
    metadata: Metadata,
    sealed: Mapping[str, Json] | None = None,
    *,
    on_shard: _Progress = lambda *_: None,
    page_bytes: int = PAGE_BYTES,
) -> None:
    """Say that every shard is captured, and write what opens the archive at once; nothing if both is done.

    Shards that are missing afterwards are lost: no reader takes the archive for one that is still being captured.

    Args:
        archive: Folder of the archive, or where else it was written; every shard has a record.
        metadata: Its metadata.
        sealed: For an archive of open size, `n_rows`, `n_examples` and the examples' digest; they follow from the plan
            of any other archive.
        on_shard: Called after each shard, with the number done and the total.
        page_bytes: Bytes of a page of the index, which is read and checked as one.

    Raises:
        DamagedArchiveError: A record is missing or damaged, or a file that it names is missing or has another size.
        OSError: A file cannot be written.
    """
    if metadata.sealed is None or metadata.index is None:
        given = sealed or metadata.sealed or _sealed_as_planned(metadata.plan)
        _seal(destination_of(archive), metadata, given, on_shard, page_bytes)


def pack(
    archive: str | PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    on_shard: _Progress = lambda *_: None,
) -> None:
    """Make the packed index of a finished archive, for example of one of format 1.0; an existing one is made again.

    The metadata of the arrays become those of format 1.1, too. No shard and no record is changed.

    Args:
        archive: The archive, its folder, or its address in a bucket. From there records are fetched, and of shards of
            format 1.0 the crc32c of each chunk.
        storage_options: For an address, as for `residua.open`; by default those of the archive, if it is open.
        on_shard: Called after each shard, with the number done and the total.

    Raises:
        FileNotFoundError: There is no archive at that place.
        PlanError: The archive is at an address that is not written to.
        ArchiveInUseError: Another run writes the archive in the bucket.
        StorageError: The bucket cannot be read or written.
        NotCapturedError: The archive is not finished.
        DamagedArchiveError: A record is missing or damaged, or a file that it names is missing or has another size.
        OSError: A file cannot be written.

    Example:
        >>> residua.pack("acts.zarr")  # doctest: +SKIP
    """
    if not is_remote(archive):
        _pack(DiskFolder(Path(archive)), on_shard)
        return
    if scheme_of(archive) not in WRITABLE:
        raise PlanError(
            f"an index is written into the archive, and {shown(archive)} is only read from: download its folder with "
            "the service's own tools (residua pull needs the index), pack the copy, and push it"
        )
    out = bucket_at(archive, storage_options or getattr(archive, "storage_options", None))
    if out.n_bytes(ROOT) is None:
        raise FileNotFoundError(f"{out} is not an archive: it has no {ROOT}. Check the address.")
    with out.locked(), naming(out.path, out):
        bring_archive(out)
        _pack(out, on_shard)


def _pack(out: Destination, on_shard: _Progress) -> None:
    metadata = read_metadata(out.path)
    if metadata.n_rows is None:
        raise NotCapturedError(f"{out} is not finished: its loop is still open, or ended with an error")
    _seal(out, metadata, metadata.sealed or _sealed_as_planned(metadata.plan), on_shard, PAGE_BYTES)


def _seal(
    out: Destination, metadata: Metadata, sealed: Mapping[str, Json], on_shard: _Progress, page_bytes: int
) -> None:
    plan, n_rows = metadata.plan, sealed["n_rows"]
    if not isinstance(n_rows, int):
        raise TypeError(f"n_rows is {n_rows!r}")
    archive = out.path
    _bring_records(out, plan.n_shards(n_rows))
    _update_arrays(archive, plan, n_rows)
    made = _write_index(out, plan, n_rows, on_shard, page_bytes)
    index = PackedIndex(archive, plan, n_rows, made.entry)
    for site in plan.sites:
        if not PRESETS[site.codec].is_lossless:
            _write_error(archive, plan, site, index)
    if metadata.sealed is None:
        metadata = with_notes(metadata, loss_notes(plan, index))
    # Files with a known digest may be damaged by now, so only files that have none yet are read.
    files = sidecar_digests(archive, {**metadata.files, **made.examples}) if plan.n_rows is None else metadata.files
    documents = consolidate(archive, [spec.path for spec in plan.arrays])
    out.upload([*(f"{node}/{METADATA}" for node in documents), INDEX], if_changed=True)
    write_metadata(archive, replace(metadata, files=files, sealed=sealed, index=made.entry, documents=documents))
    out.upload([ROOT])


def _bring_records(out: Destination, n_shards: int) -> None:
    try:
        out.fetch(f"{FOLDER}/{record_name(shard)}" for shard in range(n_shards))
    except FileNotFoundError as error:
        raise DamagedArchiveError(f"{error}: run the same capture again, or restore the record from a copy") from error


def _update_arrays(archive: Path, plan: Plan, n_rows: int) -> None:
    """Give arrays their rows, and those of format 1.0 the metadata of 1.1."""
    names = dimension_names(plan)
    for spec in plan.arrays:
        found = load_document(archive, archive / spec.path / METADATA).get("dimension_names")
        if open_array(archive, spec.path)[1] != n_rows or found != list(names[spec.path]):
            resize_array(archive, spec, n_rows, names[spec.path])


def _sealed_as_planned(plan: Plan) -> dict[str, Json]:
    return {
        "n_rows": plan.n_rows,
        "n_examples": plan.dataset.get("n_examples"),
        "examples": plan.dataset.get("digest"),
    }


def relative_error(site: SitePlan, commits: Mapping[int, Commit]) -> float:
    """Return the root of summed squared errors over summed squares of a site with a lossy codec."""
    files = [file_totals(commits, spec.key) for spec in site.arrays(1)[0].file_specs]  # keys are those of any height
    squares = sum(file.squares for file in files)
    return float((sum(file.error_squares for file in files) / squares) ** 0.5) if squares else 0.0


def _write_error(archive: Path, plan: Plan, site: SitePlan, index: PackedIndex) -> None:
    spec = site.arrays(plan.rows_per_shard)[0]
    _, n_rows, attributes = open_array(archive, spec.path)
    error = {"relative_rms_error": relative_error(site, index)}
    if not error.items() <= attributes.items():
        names = dimension_names(plan)[spec.path]
        create_array(archive, spec, n_rows, attributes={**attributes, **error}, dimensions=names)


class _Made(NamedTuple):
    """An index that was written: its entry in the root's metadata, and the files of examples that the records name."""

    entry: Mapping[str, Json]
    examples: Mapping[str, str]


def _write_index(out: Destination, plan: Plan, n_rows: int, on_shard: _Progress, page_bytes: int) -> _Made:
    """Write the packed index of all records; memory does not grow with their number."""
    archive, layout, size_of = out.path, IndexLayout(plan, n_rows), out.sizes()
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES, dir=str(archive)) as body:
        entries = _Entries(cast("IO[bytes]", body), layout)
        examples: dict[str, str] = {}
        for shard in range(layout.n_shards):
            commit = read_commit(archive, plan, shard, n_rows)
            for spec in layout.files:
                _check_file(out, size_of, spec, shard, commit.arrays[spec.key])
            for number, chunks in enumerate(_chunks_of(out, layout.files, commit)):
                entries.add(number, shard, chunks, commit.arrays[layout.files[number].key])
            examples |= named_example_files({shard: commit})
            on_shard(shard + 1, layout.n_shards)
        n_bytes = entries.finish()
        pages = list(_page_digests(cast("IO[bytes]", body), page_bytes))
        n_losses = int(entries.totals["n_losses"].sum())
        numbers = (MAGIC, page_bytes, len(layout.files), layout.n_shards, n_rows, n_losses, bytes.fromhex(plan.digest))
        head = b"".join([HEADER.pack(*numbers), entries.totals.tobytes(), *pages])
        body.seek(0)
        write_file(archive / INDEX, _joined(head, cast("IO[bytes]", body), page_bytes))
    entry: dict[str, Json] = {
        "n_bytes": len(head) + n_bytes,
        "head_bytes": len(head),
        "sha256": hashlib.sha256(head).hexdigest(),
    }
    return _Made(entry, examples)


def _joined(head: bytes, body: IO[bytes], page_bytes: int) -> Iterator[bytes]:
    yield head
    while page := body.read(page_bytes):
        yield page


def _page_digests(body: IO[bytes], page_bytes: int) -> Iterator[bytes]:
    body.seek(0)
    while page := body.read(page_bytes):
        yield hashlib.sha256(page).digest()


class _Entries:
    """The body of an index while it is filled, shard by shard.

    Attributes:
        totals: Sums over all shards, an entry a file.
    """

    def __init__(self, body: IO[bytes], layout: IndexLayout) -> None:
        self._body = body
        self._layout = layout
        self._tables = [bytearray() for _ in layout.files]  # not written yet, from the shards `_first` on
        self._squares = [bytearray() for _ in layout.files]
        self._losses = [bytearray() for _ in layout.files]
        self._first = 0
        self._n_waiting = 0
        self.totals: npt.NDArray[np.void] = np.zeros(len(layout.files), TOTALS)

    def add(self, number: int, shard: int, chunks: bytes, file: ShardFile) -> None:
        """Take what a record says about one of its files; call this shard by shard, and file by file in each."""
        if number == 0 and self._n_waiting > _FLUSH_BYTES:
            self._flush(shard)
        self._tables[number] += chunks
        self._n_waiting += len(chunks)
        losses = (file.n_nonfinite, file.n_overflowed, file.n_spoiled)
        total = self.totals[number]
        for name, value in zip(TOTALS.names or (), (file.n_bytes, *losses), strict=False):
            total[name] += value
        if self._layout.squares_at(number, shard) is not None:
            squares = (file.squares or 0.0, file.error_squares or 0.0)
            total["squares"] += squares[0]
            total["error_squares"] += squares[1]
            self._squares[number] += struct.pack("<dd", *squares)
        if any(losses):
            total["n_losses"] += 1
            self._losses[number] += struct.pack("<QQQQ", shard, *losses)

    def _flush(self, next_shard: int) -> None:
        for number in range(len(self._layout.files)):
            self._write(self._layout.table_at(number, self._first), self._tables[number])
            self._write(self._layout.squares_at(number, self._first), self._squares[number])
        self._first, self._n_waiting = next_shard, 0

    def _write(self, at: int | None, waiting: bytearray) -> None:
        if at is not None and waiting:
            self._body.seek(at)
            self._body.write(waiting)
            waiting.clear()

    def finish(self) -> int:
        """Write what is left, and return the bytes of the body."""
        self._flush(self._layout.n_shards)
        self._body.seek(self._layout.tables_bytes)
        for losses in self._losses:
            self._body.write(losses)
        return self._layout.tables_bytes + sum(map(len, self._losses))


def _chunks_of(out: Destination, specs: Sequence[ArraySpec], commit: Commit) -> list[bytes]:
    """Return the chunk table of each file of a shard; from a bucket, where they take requests, several at once."""
    is_asked = isinstance(out, BucketFolder) and not all(file.chunks for file in commit.arrays.values())
    if is_asked:
        return in_parallel(lambda spec: _chunks(out, spec, commit), specs)
    return [_chunks(out, spec, commit) for spec in specs]


def _chunks(out: Destination, spec: ArraySpec, commit: Commit) -> bytes:
    """Return the chunk table of a shard file: from the record, or from the file if the record is of format 1.0."""
    file, n_rows = commit.arrays[spec.key], commit.rows[1] - commit.rows[0]
    table = file.chunk_table if file.chunks else _stored_table(out, spec, commit.shard, n_rows, file.n_bytes)
    problem = chunk_table_problem(table, spec, n_rows)
    if problem or shard_digest(table, spec) != file.digest:
        raise DamagedArchiveError(
            f"{out}/{shard_path(_HERE, spec, commit.shard)} or its record commits/{commit.name} was altered: "
            f"{problem or 'the digests of the chunks differ'}: {RESTORE}"
        )
    return table.tobytes()


def _stored_table(out: Destination, spec: ArraySpec, shard: int, n_rows: int, file_bytes: int) -> ChunkTable:
    path = shard_path(out.path, spec, shard)
    if not isinstance(out, BucketFolder):
        return read_chunk_table(path, spec, n_rows)
    objects, name = out.objects, shard_path(_HERE, spec, shard).as_posix()
    return chunk_table_of(
        lambda at, size: objects.read_range(name, at, at + size).tobytes(), file_bytes, spec, n_rows, path
    )


def _check_file(
    out: Destination, size_of: Callable[[str], int | None], spec: ArraySpec, shard: int, file: ShardFile
) -> None:
    name = shard_path(_HERE, spec, shard).as_posix()
    if size_of(name) != file.n_bytes and (found := out.n_bytes(name)) != file.n_bytes:  # a list may be out of date
        what = "is missing" if found is None else f"has {found:,} bytes, and its record says {file.n_bytes:,}"
        raise DamagedArchiveError(f"{out}/{name} {what}: {RESTORE}")
