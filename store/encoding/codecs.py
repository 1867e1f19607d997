"""Codec presets: what is done to the values of one chunk before they lie on disk.

Every preset ends in crc32c, so that no altered byte goes unnoticed. The lossless ones keep every bit pattern,
NaN payloads included. Rounding and quantising (`residua.store.encoding.lossy`) happen before a chunk is encoded; on
disk a rounded array is an ordinary float32 array, and a quantised site is two ordinary arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import PlanError
from residua.store.encoding.blosc import HEADER, decode_frame, encode_frame
from residua.store.encoding.dtypes import storage_dtype
from residua.store.storage.crc import CRC_BYTES, Buffer, crc32c, crc_bytes

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One way of storing values.

    Attributes:
        description: One line for a user who has to choose.
        is_lossless: Whether every bit comes back.
        effort: How hard floating point is compressed (`residua.store.encoding.blosc`); None stores it as it is.
        kept_bits: Mantissa bits that are kept of a float32; None keeps all.
        n_arrays: Arrays that a site takes on disk.
    """

    description: str
    is_lossless: bool = True
    effort: str | None = "fast"
    kept_bits: int | None = None
    n_arrays: int = 1


def _rounded(bits: int, error: str) -> Preset:
    return Preset(
        description=f"float32 rounded to {bits} mantissa bits, relative error about {error}",
        is_lossless=False,
        kept_bits=bits,
    )


DEFAULT_PRESET = "fast"
INT8 = "int8-block32"
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "raw": Preset(description="the values as they are, fastest to read at random", effort=None),
        "fast": Preset(
            description="lossless, about 1.5 times smaller for bfloat16 activations, at the speed of the disk"
        ),
        "small": Preset(description="lossless, never larger than fast, at a third of its speed", effort="small"),
        "bitround7": _rounded(7, "2e-3"),
        "bitround10": _rounded(10, "2e-4"),
        "bitround12": _rounded(12, "5e-5"),
        INT8: Preset(
            description="int8 with a float32 scale for every 32 values, relative error about 7e-3",
            is_lossless=False,
            n_arrays=2,
        ),
    }
)


def check_preset(preset: str, dtype: str) -> Preset:
    """Return the preset that one stored array of data type `dtype` is encoded with.

    Raises:
        PlanError: (a ValueError) The preset is not known, or not for that data type, or not for a single
        array.
    """
    found = PRESETS.get(preset)
    if found is None:
        raise PlanError(f"codec {preset!r} is not known; the presets are {', '.join(PRESETS)}")
    storage_dtype(dtype)
    if found.n_arrays > 1:
        raise PlanError(f"codec {preset} makes two arrays of a site; encode its codes and scales with fast")
    if found.kept_bits is not None and dtype != "float32":
        raise PlanError(f"codec {preset} is for float32, not for {dtype}: use fast or small")
    return found


def codecs_metadata(preset: str, dtype: str) -> list[dict[str, Any]]:
    """Return the Zarr `codecs` entry of the chunks inside a shard, for an array of data type `dtype`.

    Raises:
        PlanError: As `check_preset` does.
    """
    found = check_preset(preset, dtype)
    itemsize = storage_dtype(dtype).itemsize
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    compressors = [] if found.effort is None else [_blosc_metadata(itemsize)]
    return [to_bytes, *compressors, {"name": "crc32c"}]


def _blosc_metadata(itemsize: int) -> dict[str, Any]:
    settings = {"typesize": itemsize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0}
    return {"name": "blosc", "configuration": settings}


def encode_chunk(values: Array, preset: str) -> list[Buffer]:
    """Return the bytes of one chunk as it is stored, in parts that are written one after the other.

    The last part is the crc32c of all others. Parts may be views of `values`: write them before it changes.

    Args:
        values: C-contiguous values of the whole chunk, in storage dtype; rounded already if the preset
        rounds.
        preset: Name of a preset.
    """
    effort = PRESETS[preset].effort
    parts: list[Buffer]
    if effort is None:
        parts = [values]
    elif values.dtype.kind in "iu" and values.dtype.itemsize > 2:
        parts = encode_frame(values, "matches")
    else:
        parts = encode_frame(values, effort)
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return [*parts, crc_bytes(crc)]


def check_chunk(stored: npt.NDArray[np.uint8]) -> None:
    """Raise ValueError unless the last four bytes of a stored chunk are the crc32c of the others."""
    if stored.size < CRC_BYTES:
        raise ValueError(f"a chunk has at least {CRC_BYTES} bytes, this one has {stored.size}")
    found, kept = crc_bytes(crc32c(stored[:-CRC_BYTES])), stored[-CRC_BYTES:].tobytes()
    if found != kept:
        raise ValueError(f"its crc32c is {found.hex()}, but {kept.hex()} is written behind it")


def decode_chunk(stored: npt.NDArray[np.uint8], out: Array, preset: str, *, check: bool = True) -> None:
    """Decode one stored chunk into `out`.

    Args:
        stored: The chunk's bytes, crc32c included.
        out: C-contiguous array of the whole chunk's shape, in storage dtype.
        preset: Name of the preset it was encoded with.
        check: Whether to compare the crc32c.

    Raises:
        ValueError: The chunk is altered, or not of that shape and preset.
    """
    if check:
        check_chunk(stored)
    body = stored[:-CRC_BYTES]
    if PRESETS[preset].effort is not None:
        decode_frame(body, out)
    elif body.size != out.nbytes:
        raise ValueError(f"the chunk has {body.size} bytes, expected {out.nbytes}")
    else:
        out.reshape(-1).view(np.uint8)[:] = body


def max_chunk_bytes(preset: str, chunk_bytes: int) -> int:
    """Return the most bytes that a chunk of `chunk_bytes` logical bytes takes on disk, crc32c included."""
    return chunk_bytes + CRC_BYTES + (0 if PRESETS[preset].effort is None else HEADER.size)
