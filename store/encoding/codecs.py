"""Codecs: how the values of a site become stored arrays, and how one chunk of an array becomes bytes.

A `Codec` works in two steps. `transform` turns the rows of a site into one or two arrays; only lossy codecs change or
split anything there. `encode` turns one chunk of such an array into bytes and keeps every bit pattern, NaN payloads
included. `PRESETS` has the codecs that an archive may name.

Every stored chunk ends in the crc32c of its bytes (`encode_chunk`), so that no altered byte goes unnoticed. On disk a
rounded array is an ordinary float32 array, and a quantised site is two ordinary arrays.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.encoding.blosc import HEADER, decode_frame, encode_frame
from residua.store.encoding.dtypes import STORAGE_DTYPES, storage_dtype
from residua.store.encoding.lossy import (
    BLOCK,
    Transformed,
    bitround_errors,
    count_in_lost_blocks,
    count_nonfinite,
    dequantise_int8,
    quantise_int8,
)
from residua.store.storage.crc import CRC_BYTES, Buffer, crc32c, crc_bytes

DEFAULT_PRESET = "fast"
INT8 = "int8-block32"

Array = npt.NDArray[np.generic]


class Layout(NamedTuple):
    """One array that a site takes on disk: the top folder, the shape of a row, the dtype, and the codec's name."""

    folder: str
    row_shape: tuple[int, ...]
    dtype: str
    preset: str


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """One way of storing values.

    Attributes:
        name: Its name in plans and in the metadata of arrays.
        description: One line for a user who has to choose.
        is_lossless: Whether every bit comes back.
        is_raw: Whether the bytes of a chunk are its values, so that they can be mapped into memory.
        dtypes: The data types of a site's values that it takes.
        overhead_bytes: Most bytes by which a chunk grows, without its crc32c.
    """

    name: str
    description: str
    is_lossless: ClassVar[bool] = True
    is_raw: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = tuple(STORAGE_DTYPES)
    overhead_bytes: ClassVar[int] = 0

    def arrays(self, row_shape: tuple[int, ...], dtype: str) -> tuple[Layout, ...]:
        """Return the arrays that a site with rows of that shape and dtype takes on disk."""
        return (Layout("sites", row_shape, dtype, self.name),)

    def transform(self, rows: Array, dtype: str) -> Transformed:
        """Return what is stored of `rows`, (rows, *row shape) in the storage dtype of `dtype`."""
        return Transformed([rows])

    def restore(self, arrays: Sequence[Array], dtype: str) -> Array:
        """Return the rows that `transform` made `arrays` of, in the storage dtype of `dtype`."""
        return arrays[0]

    def count_nonfinite(self, arrays: Sequence[Array], dtype: str) -> int:
        """Return the number of NaN and infinite values in what `restore` makes of `arrays`."""
        return count_nonfinite(arrays[0], dtype)

    def compressors(self, itemsize: int) -> list[dict[str, Any]]:
        """Return the entries of Zarr's `codecs` between `bytes` and `crc32c`."""
        return []

    @abstractmethod
    def encode(self, values: Array) -> list[Buffer]:
        """Return the bytes of one chunk, in buffers that are written one after the other.

        Buffers may be views of `values`, which is C-contiguous and in storage dtype.
        """

    @abstractmethod
    def decode(self, stored: npt.NDArray[np.uint8], out: Array) -> None:
        """Decode the bytes of one chunk into `out`, C-contiguous; ValueError if they are not of that chunk."""


class Raw(Codec):
    """The values as they are."""

    is_raw = True

    def encode(self, values: Array) -> list[Buffer]:
        """Return the values themselves."""
        return [values]

    def decode(self, stored: npt.NDArray[np.uint8], out: Array) -> None:
        """Copy the bytes; ValueError if there are more or fewer than `out` has."""
        if stored.size != out.nbytes:
            raise ValueError(f"the chunk has {stored.size} bytes, expected {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = stored


@dataclass(frozen=True, kw_only=True)
class BloscFrame(Codec):
    """A Blosc frame a chunk; `effort` says how hard floating point is compressed (`residua.store.encoding.blosc`)."""

    effort: str = "fast"
    overhead_bytes: ClassVar[int] = HEADER.size

    def compressors(self, itemsize: int) -> list[dict[str, Any]]:
        """Return Zarr's entry for Blosc; the effort is the writer's own business."""
        settings = {"typesize": itemsize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": settings}]

    def encode(self, values: Array) -> list[Buffer]:
        """Return a frame; wide integers are counters, whose repetitions compress well."""
        is_counter = values.dtype.kind in "iu" and values.dtype.itemsize > 2
        return encode_frame(values, "matches" if is_counter else self.effort)

    def decode(self, stored: npt.NDArray[np.uint8], out: Array) -> None:
        """Decode a frame; ValueError if `encode` does not make such a frame for `out`."""
        decode_frame(stored, out)


@dataclass(frozen=True, kw_only=True)
class BitRound(BloscFrame):
    """float32 rounded to `kept_bits` mantissa bits (Klöwer et al. 2021), then a Blosc frame."""

    kept_bits: int
    is_lossless: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    def transform(self, rows: Array, dtype: str) -> Transformed:
        """Return the rounded rows."""
        return bitround_errors(rows, self.kept_bits)


class Int8Blocks(BloscFrame):
    """int8 codes and a float32 scale for every `BLOCK` values, each an array of its own, stored with `fast`."""

    is_lossless = False
    dtypes = ("bfloat16", "float16", "float32")

    def arrays(self, row_shape: tuple[int, ...], dtype: str) -> tuple[Layout, ...]:
        """Return the codes, then the scales."""
        blocks = (*row_shape[:-1], -(-row_shape[-1] // BLOCK))
        return Layout("sites", row_shape, "int8", "fast"), Layout("scales", blocks, "float32", "fast")

    def transform(self, rows: Array, dtype: str) -> Transformed:
        """Return codes and scales."""
        return quantise_int8(rows, dtype)

    def restore(self, arrays: Sequence[Array], dtype: str) -> Array:
        """Return the values of codes and scales; ValueError if their shapes do not belong together."""
        codes, scales = arrays
        return dequantise_int8(codes, scales, dtype)

    def count_nonfinite(self, arrays: Sequence[Array], dtype: str) -> int:
        """Return the number of values in the blocks that have no scale."""
        codes, scales = arrays
        return count_in_lost_blocks(codes, scales)


def _rounded(bits: int, error: str) -> Codec:
    description = f"float32 rounded to {bits} mantissa bits, relative error about {error}"
    return BitRound(name=f"bitround{bits}", description=description, kept_bits=bits)


_CODECS = (
    Raw(name="raw", description="the values as they are, fastest to read at random"),
    BloscFrame(
        name="fast",
        description="lossless, about 1.5 times smaller for bfloat16 activations, at the speed of the disk",
    ),
    BloscFrame(name="small", description="lossless, never larger than fast, at a third of its speed", effort="small"),
    _rounded(7, "2e-3"),
    _rounded(10, "2e-4"),
    _rounded(12, "5e-5"),
    Int8Blocks(name=INT8, description="int8 with a float32 scale for every 32 values, relative error about 7e-3"),
)
PRESETS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in _CODECS})


def check_codec(name: str, dtype: str, of: str = "") -> Codec:
    """Return the codec `name` for values of data type `dtype`.

    Args:
        name: One of `PRESETS`.
        dtype: Data type name.
        of: What the values belong to, for the message, for example ``site q.3``.

    Raises:
        PlanError: (a ValueError) The codec or the data type is not known, or they do not fit.
    """
    what = f"{of}: codec" if of else "codec"
    found = PRESETS.get(name)
    if found is None:
        raise PlanError(f"{what} {name!r} is not known; the presets are {', '.join(PRESETS)}")
    storage_dtype(dtype)
    if dtype not in found.dtypes:
        raise PlanError(f"{what} {name} is for {', '.join(found.dtypes)}, not for {dtype}: use fast or small")
    return found


def codecs_metadata(preset: str, dtype: str) -> list[dict[str, Any]]:
    """Return the Zarr `codecs` entry of the chunks inside a shard, for an array of data type `dtype`.

    Raises:
        PlanError: As `check_codec`; also for a codec that takes two arrays a site, which no single array has.
    """
    codec = check_codec(preset, dtype)
    if codec.arrays((1,), dtype)[0].preset != preset:
        raise PlanError(f"codec {preset} makes two arrays of a site: each of them is encoded with fast")
    itemsize = storage_dtype(dtype).itemsize
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    return [to_bytes, *codec.compressors(itemsize), {"name": "crc32c"}]


def encode_chunk(values: Array, preset: str) -> list[Buffer]:
    """Return the bytes of one chunk as it is stored, in buffers that are written one after the other.

    The last buffer is the crc32c of all others. Buffers may be views of `values`: write them before it changes.

    Args:
        values: C-contiguous values of the full chunk, in storage dtype; rounded already if the codec rounds.
        preset: Name of the codec.
    """
    buffers = PRESETS[preset].encode(values)
    crc = 0
    for buffer in buffers:
        crc = crc32c(buffer, crc)
    return [*buffers, crc_bytes(crc)]


def check_chunk(stored: npt.NDArray[np.uint8]) -> None:
    """Raise ValueError unless the last four bytes of a stored chunk are the crc32c of the others."""
    if stored.size < CRC_BYTES:
        raise ValueError(f"a chunk has at least {CRC_BYTES} bytes, this one has {stored.size}")
    found, kept = crc_bytes(crc32c(stored[:-CRC_BYTES])), stored[-CRC_BYTES:].tobytes()
    if found != kept:
        raise ValueError(f"its crc32c is {found.hex()}, but {kept.hex()} is stored after it")


def decode_chunk(stored: npt.NDArray[np.uint8], out: Array, preset: str, *, check: bool = True) -> None:
    """Decode one stored chunk into `out`.

    Args:
        stored: The chunk's bytes, crc32c included.
        out: C-contiguous array of the full chunk's shape, in storage dtype.
        preset: Name of the codec that encoded it.
        check: Whether to compare the crc32c.

    Raises:
        ValueError: The chunk is altered, or not of that shape and codec.
    """
    if check:
        check_chunk(stored)
    PRESETS[preset].decode(stored[:-CRC_BYTES], out)


def max_chunk_bytes(preset: str, chunk_bytes: int) -> int:
    """Return the most bytes that a chunk of `chunk_bytes` logical bytes takes on disk, crc32c included."""
    return chunk_bytes + PRESETS[preset].overhead_bytes + CRC_BYTES
