"""An archive at an address: the same as in a folder, with the files behind it fetched when they are needed.

Opening takes two requests at once, whatever the archive's size: for the root's metadata, which have copies of the
arrays', and for the head of the packed index. Rows come as `residua.store.read.remote` says. Examples, tokenizer and LM
head come whole when they are used first.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import zarr

from residua.store.base.errors import NotCapturedError, PlanError, StorageError
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.growing import each_part
from residua.store.examples.index import ExampleIndex
from residua.store.examples.side_tables import SIDE_TABLES, SideColumns, SideTable
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT, SIDECAR_FOLDERS, read_metadata
from residua.store.format.array_metadata import METADATA
from residua.store.format.commits import FOLDER, MAX_RECORD_BYTES, Commit, check_commits, is_record, read_commits
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.read.remote import JOIN_GAP_BYTES, PACK, REQUEST_BYTES, RecordTables, RemoteChunks, RemoteReader
from residua.store.read.rows_in_shards import ArrayReader, Check
from residua.store.read.zarr_group import RemoteArchiveStore, open_zarr_group
from residua.store.sealing.packed_index import INDEX, WHOLE_BYTES, PackedIndex
from residua.store.storage.address import scheme_of
from residua.store.storage.destination import Destination
from residua.store.storage.disk_cache import DiskCache
from residua.store.storage.hub import HubFolder, folder_at
from residua.store.storage.mirror import Mirror
from residua.store.storage.objects import DeniedError, ObjectFolder, in_parallel
from residua.store.storage.place import WRITABLE, bucket_at

Cache: TypeAlias = str | PathLike[str] | DiskCache | bool | None

_CACHED_SCHEMES = ("hf", "http", "https")


class RemoteArchive(Archive):
    """An archive at an address. Of one that is not finished, the rows are there that were committed when it was opened.

    Args:
        address: Where it is.
        check: As for `Archive`; what arrives over the network is always compared.
        threads: As for `Archive`.
        storage_options: Arguments of obstore's store, credentials for example; they are not kept in any result.
        cache: Keeps what was fetched on the local disk: its folder, a `DiskCache`, True for the user's folder of
            caches, or False for none. By default there is one for web servers and the Hub.
        join_gap_bytes: Chunks of one shard that are this near share a request.
        request_bytes: Bytes of one request for rows, unless a chunk has more.
        index_bytes: An index of at most so many bytes comes whole while the metadata are asked for.

    Attributes:
        chunks: The stored chunks.

    Raises:
        FileNotFoundError: There is no archive at that address.
        NotCapturedError: It has no packed index, because it is not finished or of format 1.0, and its server does not
            list its records.
        StorageError: The address cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        check: Check = "once",
        threads: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache: Cache = None,
        join_gap_bytes: int = JOIN_GAP_BYTES,
        request_bytes: int = REQUEST_BYTES,
        index_bytes: int = WHOLE_BYTES,
    ) -> None:
        folder = folder_at(address, storage_options)
        self._requests = {"join_gap_bytes": join_gap_bytes, "request_bytes": request_bytes}
        self._settings = {
            "check": check,
            "threads": threads,
            "storage_options": storage_options,
            "cache": cache,
            "index_bytes": index_bytes,
            **self._requests,
        }
        self._cache = _cache_of(address, cache)
        self._mirror = Mirror(folder, self._cache)
        self._n_annotated = 0
        with ThreadPoolExecutor(1, thread_name_prefix="residua-open") as pool:
            start = pool.submit(
                _start_of_index, folder, index_bytes
            )  # meanwhile, for each request waits for its answer
            try:
                self._mirror.need(ROOT, MAX_METADATA_BYTES)
            except StorageError:  # no bucket, for example
                raise
            except FileNotFoundError:
                raise FileNotFoundError(f"{folder} is not an archive: it has no {ROOT}. Check the address.") from None
        with self._mirror.naming():
            found = read_metadata(self._mirror.path)
        self._index: PackedIndex | None = None
        if found.index is None or found.n_rows is None:
            self._bring_records(found.plan)
        else:
            self._index = PackedIndex(folder, found.plan, found.n_rows, found.index, start.result(), index_bytes)
        with self._mirror.naming():
            super().__init__(self._mirror.path, check=check, threads=threads)
        tables = RecordTables(self.plan, self.commits) if self._index is None else self._index
        kept = None if self._index is None else self._cache
        self.chunks = RemoteChunks(folder, tables, kept, join_gap_bytes, request_bytes)

    def _bring_records(self, plan: Plan) -> None:
        """Bring what opens an archive without a packed index: the metadata of its arrays, and its records.

        Raises:
            NotCapturedError: The server does not list its files.
        """
        folder = self._mirror.folder
        try:
            records = [entry.name for entry in folder.list(FOLDER) if is_record(entry.name)]
        except StorageError as error:
            raise NotCapturedError(
                f"{folder} has no packed index, with which an archive is read over the network, and its records cannot "
                f"be listed: {PACK}"
            ) from error
        need = [(name, MAX_RECORD_BYTES) for name in records]
        need += [(f"{spec.path}/{METADATA}", MAX_METADATA_BYTES) for spec in plan.arrays]
        in_parallel(lambda each: self._mirror.need(*each), need)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._mirror.folder.address, self._settings)

    @property
    def place(self) -> str:
        """The address of the archive."""
        return str(self._mirror.folder)

    @property
    def is_remote(self) -> bool:
        """Always."""
        return True

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """What `residua.open` was given for the address."""
        return self._mirror.folder.options

    @property
    def folder(self) -> ObjectFolder:
        """The objects of the archive."""
        return self._mirror.folder

    @property
    def options(self) -> Mapping[str, Any]:
        """What `residua.open` needs beside the address to open the archive elsewhere."""
        return {"storage_options": self._mirror.folder.options, "cache": self._cache or False, **self._requests}

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of the plan; of a copy that lacks sites, reading one says that its shards are missing."""
        return self.plan.arrays

    @property
    def index(self) -> PackedIndex:
        """The packed index.

        Raises:
            NotCapturedError: There is none, because the archive is not finished or of format 1.0.
        """
        if self._index is None:
            raise NotCapturedError(f"{self.place} is not finished, or has no packed index: {PACK}")
        return self._index

    @cached_property
    def commits(self) -> Mapping[int, Commit]:
        """The commit of each shard, from the packed index; of an archive that is not finished, from its records."""
        if self._index is not None:
            return self._index
        with self._mirror.naming():
            commits = read_commits(self.path, self.plan.digest)
            check_commits(self.path, self.plan, commits, self.metadata.n_rows)
        return commits

    def _open_examples(self) -> ExampleTable:
        if self.metadata.n_rows is None:  # its metadata name those of its start alone
            each_part(lambda name: self._mirror.need(name, SIDECAR_FOLDERS["examples"]))
        return super()._open_examples()

    def file_reader(self, spec: ArraySpec, *, check: Check | None = None) -> ArrayReader:
        """Return what reads the rows of one array, or of one of its column shards; see `Archive.file_reader`."""
        return RemoteReader(self.chunks, spec, self.n_rows, check=check or self._check, threads=self._threads)

    def file(self, name: str, most_bytes: int, sha256: str | None = None) -> Path:
        """Return the local copy of a file of the archive, fetched unless it is there; there may be none."""
        try:
            return self._mirror.need(name, most_bytes, sha256)
        except FileNotFoundError:
            return self.path / name
        except DeniedError:  # S3 answers so for what is not there, unless a caller may list
            if sha256 is not None:
                raise
            return self.path / name

    def _side_state(self) -> tuple[int, ...]:
        return (self._n_annotated,)  # what was fetched stays, unless this object wrote

    def _side_columns(self, index: ExampleIndex) -> list[SideColumns]:
        with self._mirror.naming():
            return super()._side_columns(index)

    def _for_side_tables(self) -> Destination:
        super()._for_side_tables()
        if scheme_of(self.place) not in WRITABLE:
            raise PlanError(
                f"a side table is kept in the archive, and {self.place} is only read from: fetch it with residua pull, "
                "annotate the copy, and push that"
            )
        return bucket_at(self.folder.address, self.folder.options)

    def annotate(self, table: Any, **settings: Any) -> SideTable:
        """Keep columns that came later in a side table, beside the archive's examples; see `Archive.annotate`.

        Archives of that address that are open already, here or elsewhere, go on as they were opened.
        """
        with self._writing_side_tables():
            return super().annotate(table, **settings)

    def remove_annotations(self, name: str) -> None:
        """Remove a side table; see `Archive.remove_annotations`."""
        with self._writing_side_tables():
            super().remove_annotations(name)

    @contextmanager
    def _writing_side_tables(self) -> Iterator[None]:
        """Look at the side tables anew before and after."""
        self._forget_side_tables()
        try:
            yield
        finally:
            self._forget_side_tables()

    def _forget_side_tables(self) -> None:
        (self.path / SIDE_TABLES).unlink(missing_ok=True)
        self._n_annotated += 1

    @property
    def head(self) -> Path:
        """The folder of the LM head, fetched unless it is there; there may be none."""
        for name in self.metadata.files:
            if name.startswith("head/"):
                self.file(name, SIDECAR_FOLDERS["head"], self.metadata.files[name])
        return self.path / "head"

    def side_file(self, name: str) -> bytes | None:
        """Return the content of a sidecar file; None if there is none."""
        with self._mirror.naming():
            return super().side_file(name)

    @property
    def group(self) -> zarr.Group:
        """The archive as a Zarr group, read-only, for zarr-python and Dask; see `Archive.group`."""
        documents = {"": _group_document(), **self.metadata.documents}
        captured = frozenset(self.commits) if self._index is None else self._index
        return open_zarr_group(RemoteArchiveStore(self.folder, self.plan, documents, captured, self._missing))


def _start_of_index(folder: ObjectFolder, most_bytes: int) -> bytes:
    """Return the first bytes of an archive's index; none if there is none, or if the Hub has to say a commit first."""
    try:
        return b"" if isinstance(folder, HubFolder) else folder.read_start(INDEX, most_bytes)
    except OSError:  # what is wrong is said when the index is needed
        return b""


def _group_document() -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _reopen(address: str, settings: Mapping[str, Any]) -> RemoteArchive:
    return RemoteArchive(address, **settings)


def _cache_of(address: str, cache: Cache) -> DiskCache | None:
    if cache is None:
        cache = scheme_of(address) in _CACHED_SCHEMES
    if isinstance(cache, bool):
        return DiskCache() if cache else None
    return cache if isinstance(cache, DiskCache) else DiskCache(Path(cache))
