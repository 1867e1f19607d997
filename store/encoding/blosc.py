"""One-block Blosc-1 frames, which the lossless codecs store in a chunk; every Blosc decoder reads them.

Bytes of the same significance are collected into planes (Blosc's shuffle). The planes of floating point numbers differ:
the highest has sign and exponent and shrinks to about a third by entropy coding alone; the lower ones are noise. So the
highest plane is compressed by zstd, with settings that search for almost no matches, and the others are stored as they
are unless a sample shows that they would shrink. A frame in which nothing shrinks is Blosc's plain copy. Format:
c-blosc `README_CHUNK_FORMAT.rst`, version 2.

Every length in a frame is compared here before c-blosc decodes it. Before version 0.17, numcodecs encodes
under a semaphore that forked processes share, so that a killed worker could block all others; it decodes under none.
"""

import struct
import threading
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs.blosc import decompress

from residua.store.storage.crc import Buffer

HEADER = struct.Struct("<BBBBIII")  # version, codec version, flags, item size, bytes, block bytes, frame bytes
_LENGTH = struct.Struct("<I")
_VERSION = 2
_ZSTD_VERSION = 1
_SHUFFLED = 0x1
_COPIED = 0x2
_ZSTD = 4 << 5
_MIN_PLANE = 128  # c-blosc splits no block whose planes are shorter
_MAX_BLOCK = 2**29  # c-blosc's own limit is a little higher
_SAMPLES = 2048
_UNEVEN = 1.2  # two equal bytes must be that much likelier than in noise before a plane is compressed

Plane: TypeAlias = "npt.NDArray[np.uint8]"
Array: TypeAlias = "npt.NDArray[np.generic]"

_settings = partial(zstandard.ZstdCompressionParameters, chain_log=6, search_log=1, min_match=7, strategy=1)
_FAST = _settings(window_log=17, hash_log=6, write_content_size=True)
_REPEATS = _settings(window_log=20, hash_log=12, write_content_size=True)
_EFFORTS = {
    "fast": (_FAST,),
    "small": (_FAST, _REPEATS),  # the smaller result of both: searching for repeats helps in early layers only
    "matches": (zstandard.ZstdCompressionParameters.from_level(3, write_content_size=True),),
}
_local = threading.local()


def encode_frame(values: Array, effort: str) -> list[Buffer]:
    """Return the buffers of a frame that keeps every bit of `values`, to be written one after the other.

    Args:
        values: C-contiguous, little endian, items of 1, 2, 4 or 8 bytes.
        effort: ``fast`` or ``small`` for floating point and codes; ``matches`` for counters and other integers.
    """
    itemsize = values.dtype.itemsize
    n_items = values.size
    if n_items < _MIN_PLANE or values.nbytes > _MAX_BLOCK:
        return _copy_frame(values)
    planes = [_plane(values, k) for k in range(itemsize)]
    stored = [
        _shrink(plane, effort) if effort == "matches" or plane is planes[-1] or _is_uneven(plane) else plane
        for plane in planes
    ]
    size = HEADER.size + _LENGTH.size * (1 + itemsize) + sum(len(plane) for plane in stored)
    if size > HEADER.size + values.nbytes:
        return _copy_frame(values)
    header = HEADER.pack(_VERSION, _ZSTD_VERSION, _SHUFFLED | _ZSTD, itemsize, values.nbytes, values.nbytes, size)
    buffers: list[Buffer] = [header + _LENGTH.pack(HEADER.size + _LENGTH.size)]
    for plane in stored:
        buffers += [_LENGTH.pack(len(plane)), plane]
    return buffers


def decode_frame(frame: Plane, out: Array) -> None:
    """Decode `frame`, as `encode_frame` makes it, into `out`.

    Args:
        frame: The frame's bytes.
        out: C-contiguous, of exactly the size and item size that were encoded.

    Raises:
        ValueError: `encode_frame` does not make such a frame, it has another size, or its content is damaged.
    """
    if frame.size < HEADER.size:
        raise ValueError(f"a Blosc frame has at least {HEADER.size} bytes, this one has {frame.size}")
    version, codec, flags, *sizes = HEADER.unpack_from(frame.data)
    expected = [out.dtype.itemsize, out.nbytes, min(out.nbytes, _MAX_BLOCK), frame.size]
    if sizes != expected or (version, codec) != (_VERSION, _ZSTD_VERSION):
        raise ValueError(f"the Blosc header says {[version, codec, *sizes]}, expected {[2, 1, *expected]}")
    if flags == _COPIED | _ZSTD:
        if frame.size != HEADER.size + out.nbytes:
            raise ValueError(f"a copied Blosc frame of {out.nbytes} bytes has {frame.size}")
        out.reshape(-1).view(np.uint8)[:] = frame[HEADER.size :]
    elif flags == _SHUFFLED | _ZSTD:
        _check_planes(frame, out)
        try:
            decompress(frame, out)
        except RuntimeError as error:
            raise ValueError(f"a zstd plane cannot be decoded: {error}") from error
    else:
        raise ValueError(f"the Blosc flags are {flags:#x}, expected zstd with byte shuffle, or a copy")


def _check_planes(frame: Plane, out: Array) -> None:
    """Raise ValueError unless every length in a shuffled frame for `out` is one that `encode_frame` writes."""
    at, n_items = HEADER.size + _LENGTH.size, out.size
    if not _MIN_PLANE <= n_items <= _MAX_BLOCK // out.dtype.itemsize:
        raise ValueError(f"a Blosc frame of {out.nbytes} bytes is shuffled, expected a copy")
    if frame.size < at or _LENGTH.unpack_from(frame.data, HEADER.size) != (at,):
        raise ValueError(f"the block of the Blosc frame does not begin at byte {at}")
    for _ in range(out.dtype.itemsize):
        if at + _LENGTH.size > frame.size:
            raise ValueError("the Blosc frame ends before its last plane")
        (length,) = _LENGTH.unpack_from(frame.data, at)
        at += _LENGTH.size
        if length > min(n_items, frame.size - at):
            raise ValueError(f"a Blosc plane says {length} bytes; {frame.size - at} are left for {n_items} items")
        if length < n_items and (size := _content_size(frame[at : at + length])) != n_items:
            raise ValueError(f"a zstd plane says {size} bytes, expected {n_items}")
        at += length
    if at != frame.size:
        raise ValueError(f"the Blosc frame has {frame.size - at} bytes after its last plane")


def _content_size(stored: Plane) -> int:
    try:
        size: int = zstandard.frame_content_size(stored.data)
    except zstandard.ZstdError as error:
        raise ValueError(f"a zstd plane cannot be decoded: {error}") from error
    return size


def _copy_frame(values: Array) -> list[Buffer]:
    size = HEADER.size + values.nbytes
    block = min(values.nbytes, _MAX_BLOCK)
    itemsize = values.dtype.itemsize
    return [
        HEADER.pack(_VERSION, _ZSTD_VERSION, _COPIED | _ZSTD, itemsize, values.nbytes, block, size),
        values,
    ]


def _plane(values: Array, k: int) -> Plane:
    """Return byte `k` of every item; shifting and truncating runs four times as fast as a strided copy."""
    itemsize = values.dtype.itemsize
    items = values.reshape(-1).view(f"<u{itemsize}")
    if itemsize == 1:
        return items
    plane = np.empty(items.size, np.uint8)
    np.copyto(plane, items >> (8 * k) if k else items, casting="unsafe")
    return plane


def _is_uneven(plane: Plane) -> bool:
    """Say whether a sample of `plane` repeats values more often than noise (its collision entropy)."""
    sample = plane[:: max(1, plane.size // _SAMPLES)]
    counts = np.bincount(sample)
    pairs = int(counts @ counts) - sample.size
    return pairs * 256 > _UNEVEN * sample.size * (sample.size - 1)


def _shrink(plane: Plane, effort: str) -> Buffer:
    packed: bytes = min((compressor.compress(plane.data) for compressor in _compressors(effort)), key=len)
    return packed if len(packed) < plane.size else plane


def _compressors(effort: str) -> list[zstandard.ZstdCompressor]:
    """Return those of this thread: zstd contexts are expensive to make and must not be shared."""
    kept: dict[str, list[zstandard.ZstdCompressor]] = _local.__dict__
    if effort not in kept:
        kept[effort] = [zstandard.ZstdCompressor(compression_params=each) for each in _EFFORTS[effort]]
    return kept[effort]
