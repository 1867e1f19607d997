"""The archive as a plain Zarr group that can be trusted: absent rows are errors, and half-precision values are numbers.

zarr-python reads a shard that is not there as the fill value, zero, since Zarr lets writers leave out empty chunks. An
archive leaves out none: a shard without a file is not captured yet, or lost. `ArchiveStore` raises for both.

numpy sums bfloat16 in bfloat16 and float16 in float16. `ArchiveStore` therefore shows arrays of both as float32, with a
codec in front that converts decoded chunks (`AsFloat32`). Nothing on disk changes.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from zarr.abc.codec import ArrayArrayCodec
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer, default_buffer_prototype
from zarr.dtype import Float16
from zarr.registry import register_codec
from zarr.storage import LocalStore

from residua.store.base.errors import DamagedArchiveError, ResiduaError
from residua.store.base.untrusted import MAX_SHARD_BYTES, parse_json
from residua.store.encoding.dtypes import BFLOAT16, BFloat16
from residua.store.encoding.shard import RESTORE
from residua.store.format.array_metadata import METADATA
from residua.store.format.dimensions import dimension_names
from residua.store.format.plan import Plan
from residua.store.storage.objects import ObjectFolder

_HALF: dict[str, Any] = {BFLOAT16: BFloat16, "float16": Float16}


@dataclass(frozen=True)
class AsFloat32(ArrayArrayCodec):
    """Shows stored values of half precision as float32; only `ArchiveStore` names it.

    Attributes:
        stored: The data type of the stored values, ``bfloat16`` or ``float16``.
    """

    stored: str
    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the codec of a metadata entry."""
        return cls(stored=str(data["configuration"]["stored"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the codec."""
        return {"name": "residua.as_float32", "configuration": {"stored": self.stored}}

    def resolve_metadata(self, chunk_spec: ArraySpec) -> ArraySpec:
        """Return the description of the stored chunk."""
        stored: Any = _HALF[self.stored]()
        return replace(chunk_spec, dtype=stored, fill_value=stored.default_scalar())

    async def _decode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:  # noqa: ARG002  # zarr's
        return chunk_data.astype(np.dtype(np.float32))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:  # noqa: ARG002  # zarr's
        raise TypeError("an archive is written by captures only")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:  # noqa: ARG002  # zarr's
        """Return the bytes of the stored values."""
        return input_byte_length // 2


register_codec("residua.as_float32", AsFloat32)


class _Shown(Store):
    """What a store of an archive shows of the bytes that its other base class reads; see the module.

    Args:
        plan: Plan of the archive.
        captured: Numbers of the captured shards.
        missing: Returns the error for the rows from a given one on, whose shard is not captured.
        place: Where the archive is, for messages.
    """

    def _show(self, plan: Plan, captured: Container[int], missing: Callable[[int], ResiduaError], place: str) -> None:
        self._plan = plan
        self._captured = captured
        self._missing = missing
        self._place = place
        self._names = {f"{path}/{METADATA}": names for path, names in dimension_names(plan).items()}
        self._shards = {f"{spec.path}/c" for spec in plan.arrays}

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return this store; an archive cannot be written through it."""
        if not read_only:
            raise ValueError(f"{self._place} is opened for reading: an archive is written by captures only")
        return self

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return ranges of files, as `get` does."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    def _shard(self, key: str) -> int | None:
        """Return the number of the shard that the file `key` holds; None for other files."""
        array, separator, place = key.rpartition("/c/")
        number = place.partition("/")[0]
        return int(number) if separator and f"{array}/c" in self._shards and number.isdecimal() else None

    def _require(self, key: str) -> None:
        """Raise unless the file `key` belongs to a captured shard, or to none."""
        shard = self._shard(key)
        if shard is None or shard in self._captured:
            return
        raise self._missing(shard * self._plan.rows_per_shard)

    def _shown(self, key: str, found: Buffer | None, prototype: BufferPrototype | None) -> Buffer | None:
        if found is None:
            if self._shard(key) is not None:
                raise DamagedArchiveError(f"{self._place}/{key} is missing: {RESTORE}")
            return None
        if key not in self._names:
            return found
        document: Any = parse_json(found.to_bytes())
        document.setdefault("dimension_names", list(self._names[key]))  # arrays of format 1.0 have none
        if (stored := document["data_type"]) in _HALF:
            document["data_type"] = "float32"
            codecs = document["codecs"][0]["configuration"][
                "codecs"
            ]  # of a chunk, so that parts of a shard can be read
            codecs.insert(0, AsFloat32(stored=stored).to_dict())
        made = default_buffer_prototype() if prototype is None else prototype
        return made.buffer.from_bytes(json.dumps(document).encode())


class ArchiveStore(_Shown, LocalStore):
    """The folder of an archive as a read-only Zarr store; see the module.

    Args:
        root: Folder of the archive.
        plan: Its plan.
        captured: Numbers of the captured shards.
        missing: Returns the error for the rows from a given one on, whose shard is not captured.
    """

    def __init__(
        self, root: Path, plan: Plan, captured: Container[int], missing: Callable[[int], ResiduaError]
    ) -> None:
        LocalStore.__init__(self, root, read_only=True)
        self._show(plan, captured, missing, str(root))

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a file; see the class for what it raises."""
        self._require(key)
        found = await LocalStore.get(self, key, prototype, byte_range)
        return self._shown(key, found, prototype)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a file; see the class for what it raises."""
        self._require(key)
        found = LocalStore.get_sync(self, key, prototype=prototype, byte_range=byte_range)
        return self._shown(key, found, prototype)


class RemoteArchiveStore(_Shown):
    """An archive at an address as a read-only Zarr store; see the module. Its chunks end in their crc32c.

    Args:
        folder: The objects of the archive.
        plan: Its plan.
        documents: Metadata of arrays and groups that are known already, by path.
        captured: Numbers of the captured shards.
        missing: Returns the error for the rows from a given one on, whose shard is not captured.
    """

    def __init__(
        self,
        folder: ObjectFolder,
        plan: Plan,
        documents: Mapping[str, Any],
        captured: Container[int],
        missing: Callable[[int], ResiduaError],
    ) -> None:
        super().__init__(read_only=True)
        self._folder = folder
        self._documents = documents
        self._show(plan, captured, missing, str(folder))

    @property
    def supports_writes(self) -> bool:
        """Whether it can be written: no."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """Whether objects can be deleted: no."""
        return False

    @property
    def supports_listing(self) -> bool:
        """Whether its arrays and groups can be listed: yes, from the metadata that the root holds."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteArchiveStore) and other._place == self._place

    __hash__ = None  # type: ignore[assignment]  # as of all stores of zarr-python

    def __str__(self) -> str:
        return self._place

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of an object; see the class for what it raises."""
        self._require(key)
        found = await asyncio.to_thread(self._read, key, byte_range)
        made = default_buffer_prototype() if prototype is None else prototype
        return self._shown(key, None if found is None else made.buffer.from_bytes(found), prototype)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        node = key.removesuffix(METADATA).rstrip("/")
        if key.endswith(METADATA) and node in self._documents:
            return json.dumps(self._documents[node]).encode()
        try:
            if byte_range is None:
                return self._folder.read(key, MAX_SHARD_BYTES)
            if isinstance(byte_range, RangeByteRequest):
                start, stop = byte_range.start, byte_range.end
            else:
                size = self._folder.size(key)
                if size is None:
                    return None
                start = (
                    max(0, size - byte_range.suffix) if isinstance(byte_range, SuffixByteRequest) else byte_range.offset
                )
                stop = size
            return self._folder.read_range(key, start, stop).tobytes()
        except FileNotFoundError:
            return None

    async def exists(self, key: str) -> bool:
        """Say whether there is such an object."""
        node = key.removesuffix(METADATA).rstrip("/")
        return node in self._documents or await asyncio.to_thread(self._folder.size, key) is not None

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002  # zarr's
        """Refused: an archive is written by captures only."""
        raise ValueError(f"{self._place} is opened for reading: an archive is written by captures only")

    async def delete(self, key: str) -> None:  # noqa: ARG002  # zarr's
        """Refused: an archive is written by captures only."""
        raise ValueError(f"{self._place} is opened for reading: an archive is written by captures only")

    async def list(self) -> AsyncIterator[str]:
        """Yield the metadata of all nodes."""
        for node in self._documents:
            yield f"{node}/{METADATA}".lstrip("/")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the metadata of all nodes below a folder."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of nodes in a folder."""
        folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        names = {key.removeprefix(folder).split("/")[0] async for key in self.list_prefix(folder)}
        for name in sorted(names):
            yield name


def open_zarr_group(store: ArchiveStore | RemoteArchiveStore) -> zarr.Group:
    """Return the archive as a Zarr group, from its own metadata and no consolidated copy of it."""
    return zarr.open_group(store, mode="r", use_consolidated=False)
